"""Which tokens of a row belong together: the one definition that every attention maker reads."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Rows cut into documents by walls. A token sees itself and the tokens before it in its own document.

    `starts_BT[b, t]` is the index in row b of the first token of the document that token t belongs to.
    Shapes are static: nothing here depends on how many documents a row holds.
    """

    starts_BT: Tensor

    @staticmethod
    def whole_rows(num_rows: int, row_length: int, device: torch.device | str = "cpu") -> "Segments":
        """One document a row."""
        return Segments(torch.zeros(num_rows, row_length, dtype=torch.int64, device=device))

    @staticmethod
    def from_borders(is_start_BT: Tensor) -> "Segments":
        """From a mask that is true where a document begins; the first token of a row always begins one."""
        index_T = torch.arange(is_start_BT.shape[1], device=is_start_BT.device)
        return Segments(torch.where(is_start_BT, index_T, 0).cummax(dim=1).values)

    @property
    def position_ids_BT(self) -> Tensor:
        """Position of each token in its document, from 0."""
        return torch.arange(self.starts_BT.shape[1], device=self.starts_BT.device) - self.starts_BT

    def mask_BTT(self) -> Tensor:
        """True where the query (dim 1) may attend to the key (dim 2)."""
        index_T = torch.arange(self.starts_BT.shape[1], device=self.starts_BT.device)
        return (index_T >= self.starts_BT[:, :, None]) & (index_T <= index_T[:, None])

    def bias_B1TT(self, dtype: torch.dtype) -> Tensor:
        """The mask as an addend for scores: 0 where attention is allowed, -inf elsewhere."""
        allowed_B1TT = self.mask_BTT().unsqueeze(1)
        return torch.zeros(allowed_B1TT.shape, dtype=dtype, device=allowed_B1TT.device).masked_fill_(
            ~allowed_B1TT, float("-inf")
        )
