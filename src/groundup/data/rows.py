"""Rows: what a training step reads. A row is named by its number alone, counted over all epochs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

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
class RowSources:
    """Which source each row of a batch belongs to."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    """Place in `names`, by row."""
    numbers_B: Tensor
    """The same, where the rows are."""


@dataclass(frozen=True)
class RowBatch:
    """Some rows as tensors."""

    tokens_BT: Tensor
    labels_BT: Tensor
    """What each position must predict; -100 where nothing."""
    segments: Segments
    num_loss_tokens: int
    """Labels that are supervised."""
    counts: tuple[int, ...] = ()
    """The same by row where they were counted: what is known here need not be read from a device."""
    sources: RowSources | None = None
    """None where all rows are of one source."""

    def slice(self, begin: int, end: int) -> "RowBatch":
        """Rows `begin` to `end` of this batch."""
        labels_BT, counts, sources = self.labels_BT[begin:end], self.counts[begin:end], self.sources
        return RowBatch(
            self.tokens_BT[begin:end],
            labels_BT,
            Segments(self.segments.starts_BT[begin:end], self.segments.max_documents),
            sum(counts) if self.counts else int((labels_BT != IGNORE_INDEX).sum()),
            counts,
            sources and RowSources(sources.names, sources.numbers[begin:end], sources.numbers_B[begin:end]),
        )

    def without_labels(self) -> "RowBatch":
        """The same rows with nothing to learn."""
        counts = (0,) * len(self.counts)
        return replace(self, labels_BT=torch.full_like(self.labels_BT, IGNORE_INDEX), num_loss_tokens=0, counts=counts)

    def padded(self, num_rows: int) -> "RowBatch":
        """These rows, and behind them rows of one document with nothing to learn: so many in all."""
        missing = num_rows - len(self)
        if missing == 0:
            return self

        def with_more(rows: Tensor, value: int) -> Tensor:
            return torch.cat((rows, rows.new_full((missing, *rows.shape[1:]), value)))

        segments, sources = self.segments, self.sources
        max_documents = None if segments.max_documents is None else segments.max_documents + missing
        return replace(
            self,
            tokens_BT=with_more(self.tokens_BT, 0),
            labels_BT=with_more(self.labels_BT, IGNORE_INDEX),
            segments=replace(segments, starts_BT=with_more(segments.starts_BT, 0), max_documents=max_documents),
            counts=(*self.counts, *(0,) * missing) if self.counts else (),
            sources=sources
            and RowSources(sources.names, (*sources.numbers, *(0,) * missing), with_more(sources.numbers_B, 0)),
        )

    def to(self, device: str) -> "RowBatch":
        """The same rows on a device; from pinned memory the copy runs beside what the device computes."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=device != "cpu"))

    def pinned(self) -> "RowBatch":
        """The same rows in memory that a device reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "RowBatch":
        return replace(
            self,
            tokens_BT=move(self.tokens_BT),
            labels_BT=move(self.labels_BT),
            segments=self.segments.moved(move),
            sources=self.sources and replace(self.sources, numbers_B=move(self.sources.numbers_B)),
        )

    def tensors(self) -> list[Tensor]:
        """Everything of it that may lie on a device."""
        parts = [self.tokens_BT, self.labels_BT, self.segments.starts_BT]
        return parts if self.sources is None else [*parts, self.sources.numbers_B]

    def source_tokens(self) -> dict[str, int]:
        """Supervised labels by source."""
        if self.sources is None:
            return {}
        tokens = dict.fromkeys(self.sources.names, 0)
        for number, count in zip(self.sources.numbers, self.counts, strict=True):
            tokens[self.sources.names[number]] += count
        return tokens

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


@runtime_checkable
class ManySources(Protocol):
    """What a source of rows of several sources has besides."""

    names: tuple[str, ...]

    def source_of(self, index: int) -> int:
        """Which of `names` row `index` belongs to."""
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
    counts = tuple((labels != IGNORE_INDEX).sum(1).tolist())
    sources = None
    if isinstance(source, ManySources):
        numbers = tuple(source.source_of(index) for index in range(first, first + count))
        sources = RowSources(source.names, numbers, torch.tensor(numbers))
    return RowBatch(tokens, labels, Segments(starts), sum(counts), counts, sources)
