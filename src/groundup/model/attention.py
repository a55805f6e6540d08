"""Causal attention with grouped queries, computed by the maker it is told to use."""

from collections.abc import Callable

from torch import Tensor, nn

from groundup.model.cache import LayerCache
from groundup.model.config import ModelConfig
from groundup.model.makers import MAKERS, AttentionMaker, Walls, sdpa
from groundup.model.norm import RMSNorm
from groundup.model.rope import rotate


class Attention(nn.Module):
    """Self-attention of one block; q and k are normalised per head where the model type asks for it."""

    def __init__(self, config: ModelConfig, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        """Tokens that one sees at most, itself included; None: all before it."""
        self.head_dim = config.head_size
        self.maker: AttentionMaker = "sdpa"
        self.gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        """Makes the keys and values (B, G, T, K) of whole rows from those of the queries; None: they are whole."""
        has_bias = config.has_attention_biases
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=has_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=has_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=has_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.has_qk_norm = config.has_qk_norm
        if self.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, walls: Walls, cache: LayerCache | None = None
    ) -> Tensor:
        # -1, not the number of heads: under tensor parallelism a rank holds only its share of the heads
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BGTK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.has_qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BHTK = rotate(q_BTHK, cos_BTK, sin_BTK).transpose(1, 2)
        k_BGTK = rotate(k_BTGK, cos_BTK, sin_BTK).transpose(1, 2)
        if cache is None:
            if self.gather is not None and walls.shape[-1] != k_BGTK.shape[2]:
                k_BGTK, v_BGTK = self.gather(k_BGTK, v_BGTK)
            out_BHTK = MAKERS[self.maker](q_BHTK, k_BGTK, v_BGTK, walls, self.window)
        else:
            k_BGSK, v_BGSK = cache.append(k_BGTK, v_BGTK)
            assert isinstance(walls, Tensor), "what is read from a cache is hidden by a bias"
            out_BHTK = sdpa(q_BHTK, k_BGSK, v_BGSK, walls)
        return self.o_proj(out_BHTK.transpose(1, 2).flatten(-2))
