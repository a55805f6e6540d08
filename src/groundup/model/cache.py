"""Keys and values of what was already read, so that a new token costs one position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.model.config import ModelConfig


class LayerCache:
    """Keys and values of one block; rows may be filled to different lengths. `KVCache.advance` says where to write."""

    def __init__(self, k_BGSK: Tensor, v_BGSK: Tensor) -> None:
        self.k_BGSK, self.v_BGSK = k_BGSK, v_BGSK
        self.seen = (k_BGSK, v_BGSK)
        """All that may be visible."""
        self.room: tuple[Tensor, Tensor] | None = None
        """Where all rows write, if that is the same place in each."""
        self.write_at_BT: Tensor | None = None

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values at each row's own place; returns all that may be visible."""
        if self.room is not None:
            self.room[0].copy_(k_BGTK)
            self.room[1].copy_(v_BGTK)
        else:
            assert self.write_at_BT is not None, "make room first"
            index_BGTK = self.write_at_BT[:, None, :, None].expand(k_BGTK.shape)
            self.k_BGSK.scatter_(2, index_BGTK, k_BGTK)
            self.v_BGSK.scatter_(2, index_BGTK, v_BGTK)
        return self.seen


class KVCache:
    """The caches of all blocks, and how far each row is filled."""

    def __init__(
        self,
        num_rows: int,
        config: ModelConfig,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, max_length, config.head_size)
        self.k_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(*both) for both in zip(self.k_LBGSK, self.v_LBGSK, strict=True)]
        self.lengths = [0] * num_rows
        self.visible, self.max_length = 0, max_length
        self.is_level = True
        """Whether the newest tokens stand at the same places in all rows."""

    def advance(self, num_new: Sequence[int], num_columns: int) -> Tensor:
        """Make room for up to `num_columns` new tokens a row, of which the first `num_new` are real.

        Returns the positions (B, T) of the new tokens. Columns past a row's real ones are written behind them and
        hidden; the next call overwrites them. Raises ValueError where they do not fit.
        """
        begin = max(self.lengths)
        visible = begin + num_columns
        if visible > self.max_length:
            raise ValueError(f"{visible=} tokens do not fit into a cache of {self.max_length=}")
        self.visible, self.is_level = visible, len(set(self.lengths)) == 1
        positions_BT = torch.tensor(self.lengths, device=self.k_LBGSK.device)[:, None]
        if num_columns > 1:
            positions_BT = positions_BT + torch.arange(num_columns, device=positions_BT.device)
        both = (self.k_LBGSK, self.v_LBGSK)
        seen = zip(*(whole.narrow(3, 0, visible).unbind() for whole in both), strict=True)
        room = zip(*(whole.narrow(3, begin, num_columns).unbind() for whole in both), strict=True)
        for layer, layer_seen, layer_room in zip(self.layers, seen, room, strict=True):
            layer.seen, layer.room = layer_seen, layer_room if self.is_level else None
            layer.write_at_BT = positions_BT
        self.lengths = [length + new for length, new in zip(self.lengths, num_new, strict=True)]
        return positions_BT

    def bias_B1TS(self, positions_BT: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        """The addend for scores that hides all but the real keys up to each query, and those before its window."""
        index_S = torch.arange(self.visible, device=positions_BT.device)
        is_hidden_BTS = index_S > positions_BT[:, :, None]
        if window is not None:
            is_hidden_BTS |= index_S <= positions_BT[:, :, None] - window
        bias_B1TS = torch.zeros(is_hidden_BTS.shape, dtype=dtype, device=positions_BT.device).unsqueeze(1)
        return bias_B1TS.masked_fill_(is_hidden_BTS.unsqueeze(1), float("-inf"))
