"""The stage that makes the tokenizer: trained on the corpus, or an existing one copied and checked."""

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from groundup.base.amounts import counted
from groundup.base.artifact import StageKey, write_summary
from groundup.base.config import numerics
from groundup.base.errors import DataError
from groundup.base.files import read_json, sha256_of
from groundup.corpus.storage import read_documents
from groundup.stages.recipe import Recipe
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer, save_tokenizer, train_bpe
from groundup.tokenizer.chat import BUILT_IN_TEMPLATE, read_template

CODE_VERSION = 1
STAGE = "tokenizer"
ROUND_TRIP_BYTES = 4 << 20


def train_tokenizer(work: Work) -> dict[str, Any]:
    """Make `tokenizer/` of a run, or leave it if it stands; returns the summary."""
    began = time.monotonic()
    config, given = work.recipe.tokenizer, _given_folder(work.recipe)
    has_corpus = work.recipe.tokens.path is None
    inputs = {"corpus": work.run.committed("corpus").output_hash("corpus-")} if has_corpus else {}
    if given is not None:
        inputs["tokenizer.json"] = sha256_of(TextTokenizer(given).folder / "tokenizer.json")
    attempt = work.run.begin(StageKey(STAGE, CODE_VERSION, numerics(config), inputs), work.policy)
    if attempt is None:
        summary = read_json(work.path(STAGE) / "summary.json")
        work.log.say(f"tokenizer  unchanged  {summary['vocab_size']:,} ids")
        return summary
    corpus = work.path("corpus")
    if given is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (given / name).is_file():
                shutil.copyfile(given / name, attempt.folder / name)
        (attempt.folder / "chat_template.jinja").write_text(read_template(given), encoding="utf-8")
    else:
        save_tokenizer(
            train_bpe(_training_texts(corpus, config.max_training_bytes), config),
            attempt.folder,
            chat_template=BUILT_IN_TEMPLATE,
        )
    tokenizer = TextTokenizer(attempt.folder)
    figures = _check_round_trip(tokenizer, corpus) if has_corpus else {}
    np.save(attempt.folder / "token_bytes.npy", tokenizer.token_bytes())
    wanted = config.vocab_size if given is None else tokenizer.vocab_size
    summary = {
        "vocab_size": tokenizer.vocab_size,
        "vocab_size_asked": wanted,
        **figures,
        "seconds": time.monotonic() - began,
    }
    write_summary(attempt.folder, summary)
    work.run.commit(attempt)
    if tokenizer.vocab_size < wanted:
        work.log.say(f"  the text holds no more merges: {tokenizer.vocab_size:,} ids where {wanted:,} were asked for")
    checked = (
        f"{figures['bytes_per_token']:.2f} bytes a token  "
        f"round trip of {counted(figures['round_trip_documents'], 'document')} exact  "
        if figures
        else ""
    )
    work.log.say(f"tokenizer  {tokenizer.vocab_size:,} ids  {checked}{summary['seconds']:.1f} s")
    return summary


def _given_folder(recipe: Recipe) -> Path | None:
    """An existing tokenizer directory: the recipe's, else the one that given tokens were made with."""
    if recipe.tokenizer.path is not None:
        return Path(recipe.tokenizer.path)
    return Path(recipe.tokens.path).absolute().parent / "tokenizer" if recipe.tokens.path is not None else None


def _training_texts(corpus: Path, max_bytes: int) -> Iterator[str]:
    """Texts of the corpus, or a share of them by hash where it is larger than `max_bytes`."""
    total = int(read_json(corpus / "ledger.json").get("bytes_out", 0))
    share = min(1.0, max_bytes / total) if total else 1.0
    for document in read_documents(corpus):
        if share == 1.0 or _unit_hash(document.text) < share:
            yield document.text


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _check_round_trip(tokenizer: TextTokenizer, corpus: Path) -> dict[str, Any]:
    """Encode and decode documents of the corpus. Raises DataError for the first one that does not come back."""
    num_bytes = num_tokens = num_documents = 0
    for document in read_documents(corpus):
        ids = tokenizer.encode(document.text)
        if tokenizer.decode(ids) != document.text:
            raise DataError(
                "E-TOKENIZER-ROUND-TRIP",
                what="decode(encode(text)) is not the text",
                where=document.id,
                next="use a byte-level tokenizer without a normaliser",
            )
        num_bytes += len(document.text.encode())
        num_tokens += len(ids)
        num_documents += 1
        if num_bytes > ROUND_TRIP_BYTES:
            break
    return {"bytes_per_token": num_bytes / max(1, num_tokens), "round_trip_documents": num_documents}
