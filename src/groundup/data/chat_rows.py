"""Rows of whole chats: best-fit packing with walls, the rows visited in another order each epoch."""

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np

from groundup.data.encoded_chats import EncodedChats
from groundup.data.permutation import Permutation
from groundup.data.rows import Row
from groundup.model.loss import IGNORE_INDEX


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Items by bin: longest first, each into the fullest bin that still holds it (best-fit decreasing)."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(free, (lengths[item], -1))
        if at == len(free):
            bins.append([])
            left, number = room, len(bins) - 1
        else:
            left, number = free.pop(at)
        bins[number].append(item)
        insort(free, (left - lengths[item], number))
    return bins


class PackedChats:
    """Rows of several chats each. A chat's last id is only a label, so a chat of n ids takes n - 1 places."""

    def __init__(self, chats: EncodedChats, *, row_length: int, seed: int, is_shuffled: bool = True) -> None:
        self.chats, self.row_length = chats, row_length
        self.bins = best_fit([len(chats.ids(index)) - 1 for index in range(len(chats))], row_length)
        self.rows_per_epoch = len(self.bins)
        self._visit = lru_cache(maxsize=2)(
            lambda epoch: Permutation(self.rows_per_epoch, seed, "rows", epoch) if is_shuffled else int
        )

    @property
    def padding_fraction(self) -> float:
        """Share of the places that hold no chat."""
        used = sum(len(self.chats.ids(index)) - 1 for row in self.bins for index in row)
        return 1 - used / (self.rows_per_epoch * self.row_length)

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the chats in row `index`, counted over all epochs."""
        epoch, visit = divmod(index, self.rows_per_epoch)
        return self.bins[self._visit(epoch)(visit)]

    def row(self, index: int) -> Row:
        """Tokens, labels and chat starts of row `index`, counted over all epochs."""
        tokens = np.zeros(self.row_length, dtype=np.int64)
        labels = np.full(self.row_length, IGNORE_INDEX, dtype=np.int64)
        starts = np.zeros(self.row_length, dtype=np.int64)
        at = 0
        for chat in self.documents_of(index):
            ids, mask = self.chats.ids(chat).astype(np.int64), self.chats.mask(chat)
            end = at + len(ids) - 1
            tokens[at:end] = ids[:-1]
            labels[at:end] = np.where(mask[1:], ids[1:], IGNORE_INDEX)
            starts[at:end] = at
            at = end
        starts[at:] = at
        return tokens, labels, starts
