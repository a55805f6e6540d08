"""Best-fit packing of documents: none is cut that fits a row. The place is a pure function of (seed, epoch, row)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from groundup.base.seeding import derive_seed
from groundup.data.best_fit import BestFit
from groundup.data.permutation import Permutation
from groundup.data.rows import Row, row_of_wholes
from groundup.data.token_store import TokenStore

BLOCK = 256
"""Documents between two remembered sums of full rows."""
CHUNK = 1 << 16
"""Documents looked at together while they are sorted."""


class _EpochOrder:
    """The documents of one epoch, the one with the longest rest first, those of equal rests shuffled: 4 bytes each."""

    def __init__(self, store: TokenStore, row_length: int, num_by_rest: NDArray[np.int64], seed: int) -> None:
        self._store, self._row_length = store, row_length
        self.order = np.empty(store.num_documents, dtype=np.uint32)
        ends = np.cumsum(num_by_rest[::-1])[::-1]
        free = ends - num_by_rest  # of each rest, the rank of its next document
        for numbers in store.number_chunks(CHUNK):
            rests = (store.lengths(numbers) - 1) % row_length
            by_rest = np.argsort(rests, kind="stable")
            found, first, count = np.unique(rests[by_rest], return_index=True, return_counts=True)
            ranks = np.repeat(free[found] - first, count) + np.arange(len(rests))
            self.order[ranks] = numbers[by_rest]
            free[found] += count
        generator = np.random.Generator(np.random.PCG64(seed))
        for end, count in zip(ends.tolist(), num_by_rest.tolist(), strict=True):
            generator.shuffle(self.order[end - count : end])
        sums = [int(self._full_rows(begin).sum()) for begin in range(0, len(self.order), BLOCK)]
        self._block_begins = np.cumsum([0, *sums])

    def _full_rows(self, begin: int) -> NDArray[np.int64]:
        full: NDArray[np.int64] = (self._store.lengths(self.order[begin : begin + BLOCK]) - 1) // self._row_length
        return full

    def locate_full(self, number: int) -> tuple[int, int]:
        """(document, first of its ids) of a row that one part of a long document fills."""
        block = int(np.searchsorted(self._block_begins, number, side="right")) - 1
        ends = np.cumsum(self._full_rows(block * BLOCK))
        inside = number - int(self._block_begins[block])
        local = int(np.searchsorted(ends, inside, side="right"))
        part = inside - (int(ends[local - 1]) if local else 0)
        return int(self.order[block * BLOCK + local]), part * self._row_length


class WholeDocuments:
    """Rows of a token store in which every document that fits a row stands whole; the rest of a row is padding.

    A longer document is split: full rows of it, and a rest that is packed with others; the parts do not see each other.
    Each token is a target exactly once an epoch, a document's leading end-of-text is none. Documents of equal length
    change places from epoch to epoch, and rows are visited in another order.
    """

    def __init__(self, store: TokenStore, *, row_length: int, seed: int) -> None:
        self.store, self.row_length, self.seed = store, row_length, seed
        num_by_rest = np.zeros(row_length, dtype=np.int64)
        self._num_full = self.num_longer = 0
        for numbers in store.number_chunks(CHUNK):
            places = store.lengths(numbers) - 1
            num_by_rest += np.bincount(places % row_length, minlength=row_length)
            self._num_full += int((places // row_length).sum())
            self.num_longer += int((places > row_length).sum())
        self._plan = BestFit(num_by_rest, row_length)
        self.rows_per_epoch = self._num_full + self._plan.num_bins
        self._order = lru_cache(maxsize=1)(
            lambda epoch: _EpochOrder(store, row_length, num_by_rest, derive_seed(seed, "documents", epoch))
        )
        self._visit = lru_cache(maxsize=2)(lambda epoch: Permutation(self.rows_per_epoch, seed, "rows", epoch))

    @property
    def padding_fraction(self) -> float:
        """Share of the places that hold no token."""
        places = self.store.num_tokens - self.store.num_documents
        return 1 - places / (self.rows_per_epoch * self.row_length)

    def _parts(self, index: int) -> list[tuple[int, int]]:
        """(document, first of its ids) of the parts in row `index`."""
        epoch, visit = divmod(index, self.rows_per_epoch)
        order, number = self._order(epoch), self._visit(epoch)(visit)
        if number < self._num_full:
            return [order.locate_full(number)]
        documents = order.order[self._plan.ranks(number - self._num_full)]
        places = self.store.lengths(documents) - 1
        return list(zip(documents.tolist(), (places - places % self.row_length).tolist(), strict=True))

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the documents that row `index` holds a part of."""
        return [document for document, _ in self._parts(index)]

    def row(self, index: int) -> Row:
        """Tokens, labels and part starts of row `index`, counted over all epochs."""
        ids = (
            self.store.document(document)[first : first + self.row_length + 1] for document, first in self._parts(index)
        )
        return row_of_wholes(self.row_length, ((part, None) for part in ids))
