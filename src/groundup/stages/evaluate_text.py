"""Measuring a model on any text the readers understand."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from groundup.base.config import apply_overrides, validate
from groundup.base.errors import DataError
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.normalise import normalise
from groundup.corpus.readers import read_source
from groundup.corpus.rows import Row
from groundup.corpus.sources import find_sources
from groundup.eval.config import EvalConfig
from groundup.stages.evaluate import evaluate_text
from groundup.stages.models import find_model


def evaluate_model_on(model: str, text: str, text_field: str, overrides: Sequence[tuple[str, str]], log: Log) -> None:
    """Print perplexity and bits per byte, compressors beside them. Raises DataError if no text can be read."""
    values: dict[str, dict[str, object]] = {}
    names = apply_overrides(values, overrides)
    config = validate(EvalConfig, values.get("eval", {}), where="command line", lines={}, overridden=names)
    corpus = CorpusConfig(source=text, text_field=text_field)
    num_bad = 0

    def texts() -> Iterator[str]:
        nonlocal num_bad
        for file in find_sources(text).files:
            for row in read_source(file, corpus, log):
                if isinstance(row, Row):
                    if row.text.strip():
                        yield normalise(row.text, corpus)
                else:
                    num_bad += 1

    folder: Path = find_model(model)
    figures = evaluate_text(folder, texts(), config)
    if not figures:
        raise DataError("E-DATA-EMPTY", what="no text to measure", where=text, next="name a file with text in it")
    if num_bad:
        log.warn("W-ROWS", f"{num_bad} rows could not be read and are not in the figures")
    log.say(
        f"eval {folder}  {figures['held_out_bytes']:,} bytes  {figures['held_out_tokens']:,} tokens  window {config.window} "
        f"stride {config.stride}\n  bits per byte {figures['bits_per_byte']:.4f}  perplexity {figures['perplexity']:.3f}  "
        f"xz -9e {figures['xz_bits_per_byte']:.4f}  gzip -9 {figures['gzip_bits_per_byte']:.4f}"
    )
