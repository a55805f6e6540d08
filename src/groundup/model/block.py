"""One transformer block: attention and a gated MLP, each behind a norm and added to the residual stream."""

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

    def forward(
        self, x_BTD: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, walls: Walls, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, Routing]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTK, sin_BTK, walls, cache)
        out = self.mlp(self.post_attention_layernorm(x_BTD))
        return (x_BTD + out[0], out[1]) if isinstance(out, tuple) else x_BTD + out
