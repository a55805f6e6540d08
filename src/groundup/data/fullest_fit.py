"""Fullest-fit packing: each bin begins with the longest item left and is filled as full as the others can fill it."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence


def fullest_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Items by bin, each of at most `room`; of equal items the first in the list comes first.

    What fills a bin is found exactly, by the subset sums that the lengths left can reach: the minimum bin slack of Gupta
    and Ho (1999), by dynamic programming over bits. A filling is used for as many bins as there are items for it, so
    that the work grows with the number of different lengths. Raises ValueError for an item longer than a bin.
    """
    if any(not 0 < length <= room for length in lengths):
        raise ValueError(f"every item must be between 1 and {room}")
    items: defaultdict[int, deque[int]] = defaultdict(deque)
    for item, length in enumerate(lengths):
        items[length].append(item)
    left = Counter({length: len(found) for length, found in items.items()})
    bins = []
    while left:
        filling = _filling(left, room)
        for _ in range(min(left[length] // count for length, count in filling.items())):
            bins.append(
                [items[length].popleft() for length in sorted(filling, reverse=True) for _ in range(filling[length])]
            )
        left = Counter({length: len(items[length]) for length in left if items[length]})
    return bins


def _filling(left: Counter[int], room: int) -> Counter[int]:
    """Lengths that fill a bin best, the longest among them.

    Bit s of a state says that some of the lengths seen so far add up to s. Several items of a length are taken in
    groups of 1, 2, 4, …: any number of them is a sum of such.
    """
    first = max(left)
    free = room - first
    mask = (1 << (free + 1)) - 1
    states, groups = [1], []
    for length in sorted(left, reverse=True):
        unused = min(left[length] - (length == first), free // length)
        size = 1
        while unused:
            size = min(size, unused)
            states.append((states[-1] | states[-1] << (size * length)) & mask)
            groups.append((length, size))
            unused, size = unused - size, 2 * size
        if states[-1] >> free & 1:
            break
    sum_left = states[-1].bit_length() - 1
    filling = Counter({first: 1})
    for (length, size), before in zip(reversed(groups), reversed(states[:-1]), strict=True):
        if not before >> sum_left & 1:  # not to be had without this group
            filling[length] += size
            sum_left -= size * length
    return filling
