"""Work spread over processes, results in order, memory bounded; a process that dies loses nothing.

Each worker has a pipe of its own: one that dies in the middle of a message leaves a broken pipe, not one that the
others wait at (which the standard library's pool does).
"""

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any, Generic, TypeVar

from groundup.base.log import Log

Batch = TypeVar("Batch")
Result = TypeVar("Result")

IN_FLIGHT = 3
"""Batches at work or done before their turn, for each worker: what bounds the memory."""
LEAVE_SECONDS = 1.0


class _WorkerLost(Exception):
    pass


class _Worker(Generic[Batch, Result]):
    """A process that is given one batch at a time, when it waits for one: neither side ever blocks the other."""

    def __init__(self, context: SpawnContext, function: Callable[[Batch], Result]) -> None:
        self.pipe, theirs = context.Pipe()
        self.number: int | None = None
        """Number of the batch it works on."""
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its death is the end of the pipe

    def give(self, number: int, batch: Batch) -> None:
        """Begin with a batch."""
        self.number = number
        try:
            self.pipe.send(batch)
        except OSError as error:
            raise _WorkerLost from error

    def take(self) -> tuple[int, Result]:
        """The number and result of its batch; an error of the function is raised here."""
        number, self.number = self.number, None
        assert number is not None
        try:
            is_done, value = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise _WorkerLost from error
        if not is_done:
            raise value
        return number, value

    @property
    def is_dead(self) -> bool:
        """Whether the process ended without being asked to."""
        return not self._process.is_alive()

    def leave(self) -> None:
        """End the process."""
        self.pipe.close()
        self._process.join(0 if self.number is not None else LEAVE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent decides
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):  # the parent is done, or gone
            return
        try:
            answer = (True, function(batch))
        except Exception as error:
            answer = (False, error)
        try:
            pipe.send(answer)
        except OSError:
            return


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
    context = multiprocessing.get_context("spawn")
    at_work: deque[Batch] = deque()
    """Batches that were given out and not yielded yet, the next to yield first."""
    done: dict[int, Result] = {}
    first = 0
    workers: list[_Worker[Batch, Result]] = []
    try:
        workers.extend(_Worker(context, function) for _ in range(num_workers))
        is_over = False
        while not is_over or at_work:
            for worker in workers:
                if worker.number is None and not is_over and len(at_work) < IN_FLIGHT * num_workers:
                    for batch in itertools.islice(batches, 1):
                        at_work.append(batch)
                        worker.give(first + len(at_work) - 1, batch)
                        break
                    else:
                        is_over = True
            busy = {worker.pipe: worker for worker in workers if worker.number is not None}
            for pipe in wait(list(busy)) if busy else ():
                number, result = busy[pipe].take()  # type: ignore[index]
                done[number] = result
            while first in done:
                yield at_work[0], done.pop(first)
                at_work.popleft()
                first += 1
        if any(worker.is_dead for worker in workers):
            log.warn("W-WORKER-LOST", "a worker process died with nothing left to do; nothing is missing")
    except _WorkerLost:
        log.warn("W-WORKER-LOST", "a worker process died; the work goes on in one process")
        for number, batch in enumerate(itertools.chain(at_work, batches), start=first):
            yield batch, done.pop(number) if number in done else function(batch)
    finally:
        for worker in workers:
            worker.leave()
