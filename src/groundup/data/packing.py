"""Packing with walls. The place in the data is a pure function of (seed, epoch, row): nothing else is remembered."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from groundup.base.seeding import derive_seed
from groundup.data.permutation import Permutation
from groundup.data.rows import Row
from groundup.data.token_store import TokenStore
from groundup.model.loss import IGNORE_INDEX

BLOCK = 256
"""Documents between two remembered sums of lengths: 4 bytes a document for the order, 1/32 byte for the sums."""


class _EpochOrder:
    """The documents of one epoch in their order, found by their place in the stream of all tokens."""

    def __init__(self, store: TokenStore, seed: int, epoch: int) -> None:
        self.store = store
        self.order = store.numbers()
        np.random.Generator(np.random.PCG64(derive_seed(seed, "documents", epoch))).shuffle(self.order)
        sums = [
            int(store.lengths(self.order[begin : begin + BLOCK]).sum()) for begin in range(0, len(self.order), BLOCK)
        ]
        self.block_begins = np.cumsum([0, *sums])

    def locate(self, place: int) -> tuple[int, int]:
        """(rank in the order, offset in the document) of a place in the stream."""
        block = int(np.searchsorted(self.block_begins, place, side="right")) - 1
        ends = np.cumsum(self.store.lengths(self.order[block * BLOCK : (block + 1) * BLOCK]))
        inside = place - int(self.block_begins[block])
        local = int(np.searchsorted(ends, inside, side="right"))
        return block * BLOCK + local, inside - (int(ends[local - 1]) if local else 0)


class PackedDocuments:
    """Rows of a token store: documents permuted per epoch and concatenated, row r reading tokens [rT, rT + T].

    Rows are then visited in an order of their own: neighbours in the stream are parts of one document, and a batch
    of them would be far from a sample of the text.

    The one token of overlap makes each token a target exactly once; a document's leading end-of-text is none.
    A document that is cut goes on in the next row, without its earlier tokens. The last row is padded.
    """

    def __init__(self, store: TokenStore, *, row_length: int, seed: int) -> None:
        self.store, self.row_length, self.seed = store, row_length, seed
        self.rows_per_epoch = -(-(store.num_tokens - 1) // row_length)
        self._order = lru_cache(maxsize=2)(lambda epoch: _EpochOrder(store, seed, epoch))
        self._visit = lru_cache(maxsize=2)(lambda epoch: Permutation(self.rows_per_epoch, seed, "rows", epoch))

    @property
    def padding_fraction(self) -> float:
        """Share of the places that hold no token."""
        return 1 - (self.store.num_tokens - 1) / (self.rows_per_epoch * self.row_length)

    @property
    def num_longer(self) -> int:
        """Documents that need more than one row."""
        return sum(
            int((self.store.lengths(numbers) - 1 > self.row_length).sum())
            for numbers in self.store.number_chunks(1 << 16)
        )

    def _pieces(self, index: int) -> list[tuple[int, NDArray[np.int64], bool]]:
        """(document, ids, begins here) of what row `index` and its one token of overlap read."""
        epoch, visit = divmod(index, self.rows_per_epoch)
        order = self._order(epoch)
        place, wanted = self._visit(epoch)(visit) * self.row_length, self.row_length + 1
        rank, offset = order.locate(place)
        pieces = []
        while wanted > 0 and rank < len(order.order):
            document = int(order.order[rank])
            ids = self.store.document(document)[offset : offset + wanted].astype(np.int64)
            pieces.append((document, ids, offset == 0))
            wanted -= len(ids)
            rank, offset = rank + 1, 0
        return pieces

    def row(self, index: int) -> Row:
        """Tokens, labels and document starts of row `index`, counted over all epochs."""
        length = self.row_length
        stream = np.zeros(length + 1, dtype=np.int64)
        is_target = np.zeros(length + 1, dtype=bool)
        starts = np.zeros(length + 1, dtype=np.int64)
        at = 0
        for _, ids, begins_here in self._pieces(index):
            stream[at : at + len(ids)] = ids
            is_target[at + int(begins_here) : at + len(ids)] = True
            starts[at : at + len(ids)] = at
            at += len(ids)
        starts[at:] = at
        labels = np.where(is_target[1:], stream[1:], IGNORE_INDEX)
        return stream[:-1], labels, starts[:-1]

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the documents that row `index` holds a part of."""
        return [document for document, _, _ in self._pieces(index)]
