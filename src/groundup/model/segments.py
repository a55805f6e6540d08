"""Which tokens of a row belong together: the one definition that every attention maker reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEAN_DOCUMENT_TOKENS = 64
"""Documents of at least this mean length fit into the smallest `cu_seqlens`."""


@dataclass(frozen=True)
class Segments:
    """Rows cut into documents by walls. A token sees itself and the tokens before it in its own document.

    `starts_BT[b, t]` is the index in row b of the first token of the document that token t belongs to. With a window a
    token sees that many tokens at most, itself included. Shapes are static: nothing here depends on how many documents
    a row holds.
    """

    starts_BT: Tensor
    max_documents: int | None = None
    """What the rows hold at most, all together; None where it was not counted: as many as there are tokens."""
    queries: tuple[tuple[int, int], ...] | None = None
    """Begin and end, in every row, of the stretches of tokens that are queries; None: all are. Keys are the whole row's."""

    @staticmethod
    def whole_rows(num_rows: int, row_length: int, device: torch.device | str = "cpu") -> "Segments":
        """One document a row."""
        return Segments(torch.zeros(num_rows, row_length, dtype=torch.int64, device=device), num_rows)

    @staticmethod
    def from_borders(is_start_BT: Tensor) -> "Segments":
        """From a mask that is true where a document begins; the first token of a row always begins one."""
        index_T = torch.arange(is_start_BT.shape[1], device=is_start_BT.device)
        return Segments(torch.where(is_start_BT, index_T, 0).cummax(dim=1).values)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Segments":
        """The same walls elsewhere. Documents of what leaves the host are counted there, where it costs no waiting."""
        starts_BT, max_documents = move(self.starts_BT), self.max_documents
        if max_documents is None and self.starts_BT.device.type == "cpu" and starts_BT.device.type != "cpu":
            rows, length = starts_BT.shape
            max_documents = rows * -(-length // MEAN_DOCUMENT_TOKENS)
            while max_documents < int(self.is_first_BT.sum()):
                max_documents *= 4  # few sizes: what is compiled for one is seldom compiled again
            max_documents = min(max_documents, rows * length)
        return replace(self, starts_BT=starts_BT, max_documents=max_documents)

    @property
    def index_T(self) -> Tensor:
        """0, 1, … over the tokens of a row."""
        return torch.arange(self.starts_BT.shape[1], device=self.starts_BT.device)

    @property
    def query_T(self) -> Tensor:
        """Index in the row of each query."""
        if self.queries is None:
            return self.index_T
        return torch.cat([torch.arange(*stretch, device=self.starts_BT.device) for stretch in self.queries])

    def of_queries(self, x_BT: Tensor) -> Tensor:
        """The columns of the row that belong to queries."""
        if self.queries is None:
            return x_BT
        return torch.cat([x_BT[:, begin:end] for begin, end in self.queries], dim=1)

    @property
    def is_first_BT(self) -> Tensor:
        """True where a document begins."""
        return self.starts_BT == self.index_T

    @property
    def position_ids_BT(self) -> Tensor:
        """Position of each query in its document, from 0."""
        return self.query_T - self.of_queries(self.starts_BT)

    @property
    def lengths_BT(self) -> Tensor:
        """Tokens of each query's document in the row."""
        num_read_BT = self.index_T - self.starts_BT + 1
        longest_BT = torch.zeros_like(self.starts_BT).scatter_reduce(1, self.starts_BT, num_read_BT, "amax")
        return longest_BT.gather(1, self.of_queries(self.starts_BT))

    def first_seen_BT(self, window: int | None = None) -> Tensor:
        """Index in the row of the first key that each query sees; the last one is the query itself."""
        starts_BT = self.of_queries(self.starts_BT)
        if window is None:
            return starts_BT
        return torch.maximum(starts_BT, self.query_T - (window - 1))

    def mask_BTT(self, window: int | None = None) -> Tensor:
        """True where the query (dim 1) may attend to the key (dim 2)."""
        index_T = self.index_T
        return (index_T >= self.first_seen_BT(window)[:, :, None]) & (index_T <= self.query_T[:, None])

    def bias_B1TT(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """The mask as an addend for scores: 0 where attention is allowed, -inf elsewhere."""
        allowed_B1TT = self.mask_BTT(window).unsqueeze(1)
        return torch.zeros(allowed_B1TT.shape, dtype=dtype, device=allowed_B1TT.device).masked_fill_(
            ~allowed_B1TT, float("-inf")
        )

    def cu_seqlens(self) -> Tensor:
        """Where each document begins in the rows laid end to end, then the number of tokens again and again (int32).

        Its length is fixed by the shape and `max_documents`, so that neither a compiler nor a device has to ask how
        many documents there are; the documents of length 0 behind the last one cost nothing but their place.
        """
        num_tokens = self.starts_BT.numel()
        max_documents = num_tokens if self.max_documents is None else self.max_documents
        begins_N = self.is_first_BT.flatten().nonzero_static(size=max_documents, fill_value=num_tokens).squeeze(1)
        return torch.cat((begins_N, begins_N.new_full((1,), num_tokens))).to(torch.int32)
