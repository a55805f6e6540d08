"""One transformer block: attention and a gated MLP, each behind a norm and added to the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from groundup.model.attention import Attention
from groundup.model.cache import LayerCache
from groundup.model.config import ModelConfig
from groundup.model.makers import Walls
from groundup.model.mlp import MLP
from groundup.model.moe import Routing, SparseMLP
from groundup.model.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm transformer block; one with experts gives back where it sent the tokens, too."""

    def __init__(self, config: ModelConfig, window: int | None = None, *, is_sparse: bool = False) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | SparseMLP = SparseMLP(config) if is_sparse else MLP(config)
        self.dropout = nn.Dropout(0.0)
        self.run: Callable[..., Any] | None = None
        """How the backward pass gets what it needs; None: all of it is kept."""

    def forward(
        self, x_BTD: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, walls: Walls, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, Routing]:
        if self.run is None or not torch.is_grad_enabled():
            return self._compute(x_BTD, cos_BTK, sin_BTK, walls, cache)
        return self.run(self._compute, x_BTD, cos_BTK, sin_BTK, walls)

    def _compute(
        self, x_BTD: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, walls: Walls, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, Routing]:
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_BTK, sin_BTK, walls, cache)
        x_BTD = x_BTD + self.dropout(attended_BTD)
        out = self.mlp(self.post_attention_layernorm(x_BTD))
        if isinstance(out, tuple):
            return x_BTD + self.dropout(out[0]), out[1]
        return x_BTD + self.dropout(out)
