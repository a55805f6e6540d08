"""The stage that turns the corpus into token files, split into train and validation by the text's hash."""

import functools
import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.base.amounts import counted
from groundup.base.artifact import SUMMARY, Manifest, StageKey, read_manifest, verify, write_summary
from groundup.base.config import numerics
from groundup.base.errors import ConfigError, DataError
from groundup.base.files import read_json
from groundup.base.machine import num_cores
from groundup.base.processes import map_in_order
from groundup.corpus.storage import Document, explain_full_disk, read_documents
from groundup.data.token_store import TokenWriter
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer

CODE_VERSION = 1
STAGE = "tokens"
BATCH_CHARACTERS = 1 << 20
PARALLEL_BYTES = 8 << 20
"""Corpus from which starting worker processes pays."""


@dataclass
class SplitCount:
    """What one split holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def tokenize(work: Work) -> dict[str, Any]:
    """Make `tokens/` of a run, or leave it if it stands; returns the summary. Raises DataError without validation text."""
    began = time.monotonic()
    config, run = work.recipe.tokens, work.run
    if config.path is not None:
        return _take_over(work, Path(config.path))
    corpus, tokenizer_manifest = run.committed("corpus"), run.committed("tokenizer")
    inputs = {"corpus": corpus.output_hash("corpus-"), "tokenizer": tokenizer_manifest.output_hash("tokenizer.json")}
    attempt = run.begin(StageKey(STAGE, CODE_VERSION, numerics(config), inputs), work.policy)
    if attempt is None:
        return _say_unchanged(work)
    verify(work.path("corpus"), corpus)
    verify(work.path("tokenizer"), tokenizer_manifest)
    tokenizer = TextTokenizer(work.path("tokenizer"))
    counts = {"train": SplitCount(), "validation": SplitCount()}
    writers = {
        split: TokenWriter(
            attempt.folder,
            split,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            max_shard_tokens=config.max_shard_tokens,
        )
        for split in counts
    }
    corpus_bytes = int(read_json(work.path("corpus") / "ledger.json").get("bytes_out", 0))
    num_workers = config.num_workers
    if num_workers == "auto":
        num_workers = num_cores() if corpus_bytes > PARALLEL_BYTES else 1
    encode = functools.partial(_encode, str(work.path("tokenizer")))
    spare = _first_of_least_hash(work.path("corpus"), config.validation_fraction)
    with explain_full_disk(attempt.folder, 1 << 20), work.log.progress() as line:
        for documents, encoded in map_in_order(encode, _batches(work.path("corpus")), num_workers, work.log):
            for document, ids in zip(documents, encoded, strict=True):
                data = document.text.encode()
                is_held_out = _unit_hash(data) < config.validation_fraction or document.id == spare
                split = "validation" if is_held_out else "train"
                size = len(data)
                writers[split].add(ids, {"id": document.id, "source": document.source, **document.meta, "bytes": size})
                counts[split].documents += 1
                counts[split].bytes += size
            line.update(f"tokenize  {sum(writer.num_tokens for writer in writers.values()):,} tokens")
        for split, writer in writers.items():
            writer.close()
            counts[split].tokens = writer.num_tokens
    for split, count in counts.items():
        if not count.documents:
            raise DataError(
                "E-TOKENS-SPLIT",
                what=f"no document is left for {split}: the corpus has {sum(c.documents for c in counts.values())}",
                where=work.path("corpus"),
                next="give more text, or a smaller corpus.max_piece_bytes so that it is cut into more pieces",
            )
    summary: dict[str, Any] = {split: vars(count) for split, count in counts.items()}
    summary["seconds"] = time.monotonic() - began
    write_summary(attempt.folder, summary)
    run.commit(attempt)
    train, held = counts["train"], counts["validation"]
    work.log.say(
        f"tokenize  train {train.tokens:,} tokens of {counted(train.documents, 'document')}  "
        f"validation {held.tokens:,} of {held.documents:,}  {summary['seconds']:.1f} s"
    )
    return summary


def finished_tokens(folder: Path, tokenizer_hash: str) -> Manifest:
    """Manifest of another run's tokens. Raises DataError where none are finished, ConfigError for another tokenizer's."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.stage != STAGE:
        raise DataError(
            "E-TOKENS-NONE",
            what="no finished tokens here (no MANIFEST.json of tokenize)",
            where=folder,
            next="give the tokens/ folder of a run",
        )
    theirs = manifest.inputs.get("tokenizer", "")
    if theirs != tokenizer_hash:
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what=f"these tokens were made with another tokenizer (hash {theirs[:8]}… != {tokenizer_hash[:8]}…)",
            where=folder,
            next=f"take the one in {folder.parent / 'tokenizer'} for all of them, or tokenize that text again",
        )
    return manifest


def _take_over(work: Work, source: Path) -> dict[str, Any]:
    """Make `tokens/` from another run's finished tokens."""
    tokenizer_hash = work.run.committed("tokenizer").output_hash("tokenizer.json")
    manifest = finished_tokens(source, tokenizer_hash)
    inputs = {"tokens": manifest.output_hash(), "tokenizer": tokenizer_hash}
    attempt = work.run.begin(StageKey(STAGE, CODE_VERSION, {}, inputs), work.policy)
    if attempt is None:
        return _say_unchanged(work)
    verify(source, manifest)
    with explain_full_disk(attempt.folder, 1 << 20):
        for name in manifest.files:
            shutil.copyfile(source / name, attempt.folder / Path(name).name)  # never outside, whatever it is called
        summary = read_json(source / SUMMARY)
        write_summary(attempt.folder, summary)
    work.run.commit(attempt)
    work.log.say(f"tokenize  {summary['train']['tokens']:,} tokens taken over from {source}")
    return summary


def _say_unchanged(work: Work) -> dict[str, Any]:
    summary = read_json(work.path(STAGE) / SUMMARY)
    work.log.say(f"tokenize  unchanged  {summary['train']['tokens']:,} tokens")
    return summary


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> TextTokenizer:
    return TextTokenizer(Path(folder))


def _encode(tokenizer_folder: str, documents: list[Document]) -> list[NDArray[np.uint32]]:
    return _tokenizer(tokenizer_folder).encode_batch([document.text for document in documents])


def _batches(corpus: Path) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in read_documents(corpus):
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _unit_hash(data: bytes) -> float:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def _first_of_least_hash(corpus: Path, fraction: float) -> str | None:
    """Id of the document of least hash, where no hash falls below `fraction` and there are two documents or more."""
    least, least_id, num_documents = 1.0, None, 0
    for document in read_documents(corpus):
        num_documents += 1
        value = _unit_hash(document.text.encode())
        if value < fraction:
            return None
        if value < least:
            least, least_id = value, document.id
    return least_id if num_documents > 1 else None
