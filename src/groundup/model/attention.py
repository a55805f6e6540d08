"""Causal attention with grouped queries, and the makers that compute it inside the walls of a row."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.model.cache import LayerCache
from groundup.model.config import ModelConfig
from groundup.model.norm import RMSNorm
from groundup.model.rope import rotate

AttentionMaker = Literal["sdpa", "chunked", "dense"]
CHUNK = 256


def sdpa(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor) -> Tensor:
    """torch's scaled dot product with an additive bias."""
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=bias_B1TS, enable_gqa=True)


def dense(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor) -> Tensor:
    """The definition, with all scores at once: what the other makers are compared with."""
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = k_BGSK.repeat_interleave(groups, dim=1), v_BGSK.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTK @ k_BHSK.transpose(-1, -2)).float() * q_BHTK.shape[-1] ** -0.5 + bias_B1TS.float()
    return scores_BHTS.softmax(-1).to(v_BHSK.dtype) @ v_BHSK


def chunked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor) -> Tensor:
    """The definition in chunks of queries, each against the keys up to its end: half the arithmetic of `dense`.

    In bf16 on a CPU this beats SDPA. Needs as many keys as queries (training, not decoding with a cache).
    """
    length = q_BHTK.shape[2]
    parts = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        parts.append(
            dense(q_BHTK[:, :, begin:end], k_BGSK[:, :, :end], v_BGSK[:, :, :end], bias_B1TS[:, :, begin:end, :end])
        )
    return torch.cat(parts, dim=2)


MAKERS: dict[AttentionMaker, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": sdpa,
    "chunked": chunked,
    "dense": dense,
}


class Attention(nn.Module):
    """Self-attention of one block; q and k are normalised per head where the model type asks for it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        self.maker: AttentionMaker = "sdpa"
        has_bias = config.model_type == "qwen2" or config.attention_bias
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
        self, x_BTD: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, bias_B1TS: Tensor, cache: LayerCache | None = None
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
            out_BHTK = MAKERS[self.maker](q_BHTK, k_BGTK, v_BGTK, bias_B1TS)
        else:
            k_BGSK, v_BGSK = cache.append(k_BGTK, v_BGTK)
            out_BHTK = sdpa(q_BHTK, k_BGSK, v_BGSK, bias_B1TS)
        return self.o_proj(out_BHTK.transpose(1, 2).flatten(-2))
