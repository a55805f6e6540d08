"""Keys and values of what was already read, so that a new token costs one position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.model.config import ModelConfig


class LayerCache:
    """Keys and values of one block; rows may be filled to different lengths."""

    def __init__(
        self, num_rows: int, config: ModelConfig, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_rows, config.num_key_value_heads, max_length, config.head_size)
        self.k_BGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_BGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.write_at_BT = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
        self.visible = 0
        self.is_level = True

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values at each row's own place; returns all that may be visible."""
        k_BGSK, v_BGSK = self.k_BGSK[:, :, : self.visible], self.v_BGSK[:, :, : self.visible]
        if self.is_level:
            k_BGSK[:, :, -k_BGTK.shape[2] :] = k_BGTK
            v_BGSK[:, :, -v_BGTK.shape[2] :] = v_BGTK
        else:
            index_BGTK = self.write_at_BT[:, None, :, None].expand(k_BGTK.shape)
            k_BGSK.scatter_(2, index_BGTK, k_BGTK)
            v_BGSK.scatter_(2, index_BGTK, v_BGTK)
        return k_BGSK, v_BGSK


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
        self.device = torch.device(device)
        self.layers = [
            LayerCache(num_rows, config, max_length, dtype, self.device) for _ in range(config.num_hidden_layers)
        ]
        self.lengths = [0] * num_rows
        self.max_length = max_length
        self.is_level = True
        """Whether the newest tokens of all rows stand at the same places."""

    def advance(self, num_new: Sequence[int], num_columns: int) -> Tensor:
        """Make room for up to `num_columns` new tokens a row, of which the first `num_new` are real.

        Returns the positions (B, T) of the new tokens. Columns past a row's real ones are written behind them and
        hidden; the next call overwrites them. Raises ValueError where they do not fit.
        """
        visible = max(self.lengths) + num_columns
        if visible > self.max_length:
            raise ValueError(f"{visible=} tokens do not fit into a cache of {self.max_length=}")
        self.is_level = len(set(self.lengths)) == 1
        positions_BT = torch.tensor(self.lengths, device=self.device)[:, None]
        if num_columns > 1:
            positions_BT = positions_BT + torch.arange(num_columns, device=self.device)
        for layer in self.layers:
            layer.write_at_BT, layer.visible, layer.is_level = positions_BT, visible, self.is_level
        self.lengths = [length + new for length, new in zip(self.lengths, num_new, strict=True)]
        return positions_BT

    def bias_B1TS(self, positions_BT: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        """The addend for scores that hides all but the real keys up to each query, and those before its window."""
        index_S = torch.arange(self.layers[0].visible, device=positions_BT.device)
        is_hidden_BTS = index_S > positions_BT[:, :, None]
        if window is not None:
            is_hidden_BTS |= index_S <= positions_BT[:, :, None] - window
        bias_B1TS = torch.zeros(is_hidden_BTS.shape, dtype=dtype, device=positions_BT.device).unsqueeze(1)
        return bias_B1TS.masked_fill_(is_hidden_BTS.unsqueeze(1), float("-inf"))
