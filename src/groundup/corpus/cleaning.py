"""Cleaning rows: normalise, filter and fingerprint, a pure function of each row, in one process or several."""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.dedup import Fingerprint, fingerprints
from groundup.corpus.filters import reason_to_drop
from groundup.corpus.normalise import normalise
from groundup.corpus.rows import Row
from groundup.corpus.storage import Document

BATCH_ROWS = 512
BATCH_CHARACTERS = 1 << 20
BATCHES_IN_FLIGHT = 2
"""Batches a worker has waiting; what bounds the memory."""


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
    batches = _batches(rows)
    if num_workers == 1:
        for batch in batches:
            yield from zip(batch, clean_batch(batch, config), strict=True)
        return
    waiting: deque[list[Row]] = deque()
    futures: deque[Future[list[Outcome]]] = deque()
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))

    def oldest() -> Iterator[tuple[Row, Outcome]]:
        outcomes = futures[0].result()
        futures.popleft()
        return zip(waiting.popleft(), outcomes, strict=True)  # a batch leaves the queue only with its outcomes

    try:
        for batch in batches:
            waiting.append(batch)
            futures.append(pool.submit(clean_batch, batch, config))
            if len(waiting) > BATCHES_IN_FLIGHT * num_workers:
                yield from oldest()
        while waiting:
            yield from oldest()
    except BrokenProcessPool:
        log.warn("W-WORKER-LOST", "a worker process died; cleaning goes on in one process")
        for batch in itertools.chain(waiting, batches):
            yield from zip(batch, clean_batch(batch, config), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
