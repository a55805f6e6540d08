"""Best-fit packing: items into bins of one size, longest first, each into the fullest bin that still holds it.

What decides is lengths alone, so whole groups of equal bins are filled at once: the plan for a million documents is as
small, and made as fast, as the number of different lengths.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class _Group:
    """Bins that hold items of the same lengths, numbered from `first` on."""

    first: int
    count: int
    takes: list[tuple[int, int]] = field(default_factory=list)
    """(rank of the first bin's first item, items a bin) of each length in them."""

    def cut(self, count: int) -> "_Group":
        """Take the first bins away as a group of their own."""
        taken = _Group(self.first, count, list(self.takes))
        self.first, self.count = self.first + count, self.count - count
        self.takes = [(rank + count * size, size) for rank, size in self.takes]
        return taken


class BestFit:
    """Best-fit decreasing (Johnson 1974) for so many items of each length from 0 to `room`; length 0 takes no bin.

    Items are known by their rank from the longest to the shortest. The bins are those that one item after the other
    would give.
    """

    def __init__(self, num_by_length: Sequence[int] | NDArray[np.integer[Any]], room: int) -> None:
        self.num_bins = 0
        finished: list[_Group] = []
        open_bins: dict[int, list[_Group]] = {}  # by room left, in the order of their numbers
        rooms: list[int] = []  # those of open_bins, sorted
        rank = 0
        for length in range(len(num_by_length) - 1, 0, -1):
            left = int(num_by_length[length])
            while left:
                at = bisect_left(rooms, length)
                free = rooms[at] if at < len(rooms) else room
                size = min(free // length, left)  # the fullest bin stays the fullest until it is full
                if at == len(rooms):
                    group = _Group(self.num_bins, left // size)
                    self.num_bins += group.count
                else:
                    group = self._take(open_bins, rooms, free, left // size)
                group.takes.append((rank, size))
                rank, left = rank + size * group.count, left - size * group.count
                self._put_back(open_bins, rooms, free - size * length, group, finished)
        groups = sorted((*finished, *(g for same in open_bins.values() for g in same)), key=lambda group: group.first)
        self._firsts = [group.first for group in groups]
        self._takes = [group.takes for group in groups]

    @staticmethod
    def _take(open_bins: dict[int, list[_Group]], rooms: list[int], free: int, wanted: int) -> _Group:
        same = open_bins[free]
        if wanted < same[0].count:
            return same[0].cut(wanted)
        group = same.pop(0)
        if not same:
            del open_bins[free], rooms[bisect_left(rooms, free)]
        return group

    @staticmethod
    def _put_back(
        open_bins: dict[int, list[_Group]], rooms: list[int], free: int, group: _Group, finished: list[_Group]
    ) -> None:
        if free == 0:
            finished.append(group)
            return
        if free not in open_bins:
            open_bins[free] = []
            insort(rooms, free)
        insort(open_bins[free], group, key=lambda other: other.first)

    def ranks(self, bin_number: int) -> list[int]:
        """Ranks of the items of a bin, longest first."""
        group = bisect_right(self._firsts, bin_number) - 1
        inside = bin_number - self._firsts[group]
        return [rank + inside * size + number for rank, size in self._takes[group] for number in range(size)]
