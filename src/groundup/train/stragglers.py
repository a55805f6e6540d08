"""Watches for a rank that computes much longer than the others, waiting left out."""

from collections.abc import Callable

from groundup.base.log import Log
from groundup.parallel.checks import find_straggler
from groundup.parallel.world import World

STEPS_TO_COMPARE = 8
"""Steps between two comparisons of how long the ranks compute."""


class StragglerWatch:
    """Ranks compare their times once in a while; a slow one is named once. `record` is given step and words."""

    def __init__(self, world: World, log: Log, record: Callable[[int, str], None]) -> None:
        self._world, self._log, self._record = world, log, record
        self._busy_seconds = 0.0
        self._named: set[int] = set()

    def note(self, step: int, busy_seconds: float) -> None:
        """Count a step's time; every so many steps all ranks compare."""
        self._busy_seconds += busy_seconds
        if self._world.size == 1 or step % STEPS_TO_COMPARE:
            return
        slowest = find_straggler(self._world, self._busy_seconds)
        self._busy_seconds = 0.0
        if slowest is not None and slowest.rank not in self._named:
            self._named.add(slowest.rank)
            self._record(step, slowest.words)
            self._log.warn("W-STRAGGLER", slowest.words)
