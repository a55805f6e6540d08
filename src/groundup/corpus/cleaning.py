"""Cleaning rows: normalise, filter and fingerprint, a pure function of each row, in one process or several."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from groundup.base.log import Log
from groundup.base.processes import map_in_order
from groundup.corpus.config import CorpusConfig
from groundup.corpus.dedup import Fingerprint, fingerprints
from groundup.corpus.filters import reason_to_drop
from groundup.corpus.normalise import normalise
from groundup.corpus.rows import Row
from groundup.corpus.storage import Document

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A row that passed all filters."""

    line: bytes
    """The document as it will stand in the corpus."""
    fingerprint: Fingerprint


Outcome = Cleaned | str
"""A cleaned row, or the name of the filter it did not pass."""


def clean_batch(rows: list[Row], config: CorpusConfig) -> list[Outcome]:
    """What becomes of each row."""
    texts = [normalise(row.text, config) for row in rows]
    reasons = [reason_to_drop(text, config.filters) for text in texts]
    kept = [(row, text) for row, text, reason in zip(rows, texts, reasons, strict=True) if reason is None]
    prints = iter(fingerprints([text for _, text in kept], config.dedup))
    outcomes: list[Outcome] = []
    for row, text, reason in zip(rows, texts, reasons, strict=True):
        if reason is None:
            document = Document(row.id, text, row.source, {"file": row.file, "offset": row.offset})
            outcomes.append(Cleaned(document.as_line(), next(prints)))
        else:
            outcomes.append(reason)
    return outcomes


def clean_in_order(
    rows: Iterable[Row], config: CorpusConfig, num_workers: int, log: Log
) -> Iterator[tuple[Row, Outcome]]:
    """Each row with its outcome, in the rows' order. A worker that dies is warned of and its work done here."""
    clean = functools.partial(clean_batch, config=config)
    for batch, outcomes in map_in_order(clean, _batches(rows), num_workers, log):
        yield from zip(batch, outcomes, strict=True)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += len(row.text)
        if len(batch) >= BATCH_ROWS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
