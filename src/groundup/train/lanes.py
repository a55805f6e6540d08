"""Several micro-batches at once on a CPU: one Python thread each, results in order, the same bits each time.

Products of a small model are too short for two cores to share one; two whole micro-batches side by side have nothing
to wait for.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


class Lanes:
    """`num_lanes` threads that share the process's compute threads; one lane is the calling thread itself."""

    def __init__(self, num_lanes: int) -> None:
        self.num_lanes = 1
        self._pool: ThreadPoolExecutor | None = None
        self.resize(num_lanes)

    def resize(self, num_lanes: int) -> None:
        """Go on with another number of lanes; while none of them works."""
        if num_lanes == self.num_lanes:
            return
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.num_lanes = num_lanes
        if num_lanes == 1:
            return
        threads = torch.get_num_threads()
        all_began = threading.Barrier(num_lanes)
        self._pool = ThreadPoolExecutor(
            num_lanes,
            thread_name_prefix="lane",
            initializer=_use_threads,
            initargs=(max(1, threads // num_lanes),),
        )
        for began in [self._pool.submit(all_began.wait) for _ in range(num_lanes)]:
            began.result()
        # the number is the process's too: later threads, and this one, keep what they had
        torch.set_num_threads(threads)

    def map(self, function: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
        """`function` of each part, in order; no more than `num_lanes` results exist at a time."""
        if self._pool is None:
            yield from map(function, parts)
            return
        at_work: deque[Future[Result]] = deque()
        try:
            for part in parts:
                if len(at_work) == self.num_lanes:
                    yield at_work.popleft().result()
                at_work.append(self._pool.submit(function, part))
            while at_work:
                yield at_work.popleft().result()
        finally:
            wait(at_work)  # after an error, nothing of these parts computes or holds memory any more

    def fold(self, function: Callable[[Part], Result], merge: Callable[[Result], None], parts: Iterable[Part]) -> None:
        """`merge(function(part))` of each part; merging goes part by part, in order, in the lane that computed it.

        A lane merges while the others compute. After an error nothing more is merged.
        """
        turns = _Turns()

        def compute(numbered: tuple[int, Part]) -> None:
            number, part = numbered
            try:
                result = function(part)
                turns.take(number, lambda: merge(result))
            except BaseException:
                turns.end()
                raise

        for _ in self.map(compute, enumerate(parts)):
            pass


class _Turns:
    """Lets threads do something one after another, by number."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._is_over = 0, False

    def take(self, number: int, work: Callable[[], None]) -> None:
        """Wait for the turn, work, pass it on; nothing once the turns are over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._next == number)
            if self._is_over:
                return
        work()
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def end(self) -> None:
        """No turn is taken any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def _use_threads(num_threads: int) -> None:
    # a thread takes the process's number when it first asks, and would undo a number set before that
    torch.get_num_threads()
    torch.set_num_threads(num_threads)
