"""Rows: what a training step reads. A row is named by its number alone, counted over all epochs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundup.data.token_store import TokenStore
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments

Row = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens, labels and the start index of each token's document, each of the row's length."""


@dataclass(frozen=True)
class RowBatch:
    """Some rows as tensors."""

    tokens_BT: Tensor
    labels_BT: Tensor
    """What each position must predict; -100 where nothing."""
    segments: Segments
    num_loss_tokens: int
    """Labels that are supervised."""

    def slice(self, begin: int, end: int) -> "RowBatch":
        """Rows `begin` to `end` of this batch."""
        labels_BT = self.labels_BT[begin:end]
        return RowBatch(
            self.tokens_BT[begin:end],
            labels_BT,
            Segments(self.segments.starts_BT[begin:end]),
            int((labels_BT != IGNORE_INDEX).sum()),
        )

    def to(self, device: str) -> "RowBatch":
        """The same rows on a device."""
        segments = Segments(self.segments.starts_BT.to(device))
        return RowBatch(self.tokens_BT.to(device), self.labels_BT.to(device), segments, self.num_loss_tokens)

    def __len__(self) -> int:
        return len(self.tokens_BT)


class RowSource(Protocol):
    """A source of rows: a pure function of the row's number."""

    row_length: int
    rows_per_epoch: int

    def row(self, index: int) -> Row:
        """Row `index`, counted over all epochs."""
        ...

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the documents that row `index` holds a part of."""
        ...


class DocumentRows(RowSource, Protocol):
    """Rows of a token store."""

    store: TokenStore

    @property
    def num_longer(self) -> int:
        """Documents that need more than one row."""
        ...

    @property
    def padding_fraction(self) -> float:
        """Share of the places that hold no token."""
        ...


def row_of_wholes(row_length: int, parts: Iterable[tuple[NDArray[np.integer[Any]], NDArray[np.bool_] | None]]) -> Row:
    """A row of parts that do not see each other, the rest padding. A part of n + 1 ids takes n places, its last id being
    a label only; the mask says which of its n labels are supervised, None all."""
    tokens = np.zeros(row_length, dtype=np.int64)
    labels = np.full(row_length, IGNORE_INDEX, dtype=np.int64)
    starts = np.zeros(row_length, dtype=np.int64)
    at = 0
    for ids, mask in parts:
        end = at + len(ids) - 1
        tokens[at:end] = ids[:-1]
        labels[at:end] = ids[1:] if mask is None else np.where(mask, ids[1:].astype(np.int64), IGNORE_INDEX)
        starts[at:end] = at
        at = end
    starts[at:] = at
    return tokens, labels, starts


def read_batch(source: RowSource, first: int, count: int) -> RowBatch:
    """Rows `first` to `first + count`; a batch may reach over the end of an epoch."""
    rows = [source.row(index) for index in range(first, first + count)]
    tokens, labels, starts = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return RowBatch(tokens, labels, Segments(starts), int((labels != IGNORE_INDEX).sum()))
