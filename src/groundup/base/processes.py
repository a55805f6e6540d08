"""Work spread over processes, results in order, memory bounded; a process that dies loses nothing."""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from groundup.base.log import Log

Batch = TypeVar("Batch")
Result = TypeVar("Result")

IN_FLIGHT = 2
"""Batches that wait for each worker: what bounds the memory."""


def map_in_order(
    function: Callable[[Batch], Result], batches: Iterable[Batch], num_workers: int, log: Log
) -> Iterator[tuple[Batch, Result]]:
    """Each batch with `function(batch)`, in order. With one worker everything happens in this process.

    `function` must be importable and pure. A worker that dies is warned of, and its work is done here.
    """
    batches = iter(batches)
    if num_workers == 1:
        for batch in batches:
            yield batch, function(batch)
        return
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
    submitted: Batch | None = None
    try:
        for batch in batches:
            submitted = batch
            waiting.append((batch, pool.submit(function, batch)))
            submitted = None
            if len(waiting) > IN_FLIGHT * num_workers:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][0], waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        log.warn("W-WORKER-LOST", "a worker process died; the work goes on in one process")
        left = [batch for batch, _ in waiting] + ([] if submitted is None else [submitted])
        for batch in itertools.chain(left, batches):
            yield batch, function(batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
