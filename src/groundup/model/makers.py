"""The ways to compute attention inside the walls of a row: each equals `dense`, forward and backward.

A maker gets queries, keys, values, the walls in the form it reads (`walls_of`) and the window of its layer.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from groundup.model.segments import Segments

AttentionMaker = Literal["sdpa", "chunked", "dense", "varlen", "flex"]
Walls = Tensor | BlockMask
"""A bias (B, 1, T, S), the borders of documents (`Segments.cu_seqlens`) or a BlockMask."""
CHUNK = 256
FLEX_BLOCK = 128
"""Queries and keys in one block of FlexAttention's mask."""


def sdpa(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor, window: int | None = None) -> Tensor:
    """torch's scaled dot product with an additive bias, which holds the window."""
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=bias_B1TS, enable_gqa=True)


def dense(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor, window: int | None = None) -> Tensor:
    """The definition, with all scores at once: what the other makers are compared with."""
    groups = q_BHTK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = k_BGSK.repeat_interleave(groups, dim=1), v_BGSK.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTK @ k_BHSK.transpose(-1, -2)).float() * q_BHTK.shape[-1] ** -0.5 + bias_B1TS.float()
    return scores_BHTS.softmax(-1).to(v_BHSK.dtype) @ v_BHSK


def chunked(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B1TS: Tensor, window: int | None = None) -> Tensor:
    """The definition in chunks of queries, each against the keys from its window to its end: half the arithmetic of
    `dense`, and less where the window is shorter than the row.

    Heads that share keys (R of them) are rows of one product, so keys and values are never repeated. Compiled, in bf16 on
    a CPU, this beats SDPA. With more keys than queries every chunk meets all of them.
    """
    (rows, heads, length, size), groups, num_keys = q_BHTK.shape, *k_BGSK.shape[1:3]
    scale = size**-0.5
    q_BGRTK = q_BHTK.view(rows, groups, heads // groups, length, size)
    weighted_mean = _weighted_mean_late if torch.compiler.is_compiling() else _weighted_mean
    parts = []
    for begin in range(0, length, CHUNK):
        end = min(begin + CHUNK, length)
        first, last = 0, num_keys
        if num_keys == length:
            first, last = 0 if window is None else max(0, begin - (window - 1)), end
        q_BGMK = q_BGRTK[:, :, :, begin:end].flatten(2, 3)
        products_BGMS = q_BGMK @ k_BGSK[:, :, first:last].transpose(-1, -2)
        bias_B11CS = bias_B1TS[:, :, None, begin:end, first:last].float()
        products_BGRCS = products_BGMS.float().view(rows, groups, heads // groups, end - begin, last - first)
        out_BGMK = weighted_mean(products_BGRCS * scale + bias_B11CS, v_BGSK[:, :, first:last])
        parts.append(out_BGMK.view(rows, heads, end - begin, size))
    return torch.cat(parts, dim=2)


def _weighted_mean(scores_BGRCS: Tensor, v_BGSK: Tensor) -> Tensor:
    return scores_BGRCS.softmax(-1).to(v_BGSK.dtype).flatten(2, 3) @ v_BGSK


def _weighted_mean_late(scores_BGRCS: Tensor, v_BGSK: Tensor) -> Tensor:
    """Divided by the sum after the product (as FlashAttention does, arXiv:2205.14135): forward and backward each pass
    over the scores once where softmax needs three passes, if a compiler fuses what is written here."""
    shifted_BGRCS = scores_BGRCS - scores_BGRCS.detach().amax(-1, keepdim=True)
    weights_BGMS = shifted_BGRCS.exp().to(v_BGSK.dtype).flatten(2, 3)
    sums_BGM1 = weights_BGMS.sum(-1, keepdim=True, dtype=torch.float32)
    return ((weights_BGMS @ v_BGSK).float() / sums_BGM1).to(v_BGSK.dtype)


def varlen(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, borders_N: Tensor, window: int | None = None) -> Tensor:
    """FlashAttention over documents laid end to end: what lies behind a wall is never computed. CUDA, bf16 or fp16."""
    rows, _, length, _ = q_BHTK.shape
    q_NHK, k_NGK, v_NGK = (x_BHTK.transpose(1, 2).flatten(0, 1) for x_BHTK in (q_BHTK, k_BGTK, v_BGTK))
    # the kernel counts the tokens to the left of the query, -1 for all of them
    sees = (-1 if window is None else window - 1, 0)
    out_NHK = varlen_attn(q_NHK, k_NGK, v_NGK, borders_N, borders_N, length, length, window_size=sees, enable_gqa=True)
    assert isinstance(out_NHK, Tensor)
    return out_NHK.view(rows, length, *out_NHK.shape[1:]).transpose(1, 2)


def flex(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: BlockMask, window: int | None = None) -> Tensor:
    """FlexAttention: blocks of 128 that no query sees are passed over. Trains on CUDA; a CPU has its forward only."""
    compute: Any = _compiled_flex() if q_BHTK.is_cuda else flex_attention
    out_BHTK: Tensor = compute(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=True)
    return out_BHTK


def choose_flash(capability: tuple[int, int]) -> str:
    """Let varlen use FlashAttention 3 on a Hopper card where its library is installed; returns the version in use.

    torch's own is FlashAttention 2. The two round differently.
    """
    if capability[0] == 9 and "FA3" in list_flash_attention_impls() and find_spec("flash_attn_interface") is not None:
        activate_flash_attention_impl("FA3")
    return current_flash_attention_impl() or "FA2"


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Uncompiled it would hold all scores at once."""
    return torch.compile(flex_attention, dynamic=False)


MAKERS: dict[AttentionMaker, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "chunked": chunked,
    "dense": dense,
    "varlen": varlen,
    "flex": flex,
}
CUDA_MAKERS: tuple[AttentionMaker, ...] = ("varlen", "flex")
"""Makers that cannot train on a CPU."""
RECTANGULAR_MAKERS: tuple[AttentionMaker, ...] = ("sdpa", "chunked", "dense")
"""Makers that compute for some queries of a row against the keys of all of it."""


def walls_of(maker: AttentionMaker, segments: Segments, window: int | None, dtype: torch.dtype) -> Walls:
    """The walls in the form that a maker reads; only a bias has an element for every pair of tokens."""
    assert segments.queries is None or maker in RECTANGULAR_MAKERS, f"{maker} needs as many queries as keys"
    if maker == "varlen":
        return segments.cu_seqlens()
    if maker == "flex":
        return block_mask(segments, window)
    return segments.bias_B1TT(dtype, window)


def block_mask(segments: Segments, window: int | None = None) -> BlockMask:
    """FlexAttention's mask, straight from the first key that each query sees: no mask of all pairs is ever made.

    First keys never go back from one query to the next, so the first query of a block of queries sees furthest back,
    and its last one least far.
    """
    first_seen_BT = segments.first_seen_BT(window)
    length = first_seen_BT.shape[1]
    blocks = -(-length // FLEX_BLOCK)
    begins_C = torch.arange(blocks, device=first_seen_BT.device) * FLEX_BLOCK
    furthest_BC1 = first_seen_BT.index_select(1, begins_C)[:, :, None]
    nearest_BC1 = first_seen_BT.index_select(1, (begins_C + FLEX_BLOCK - 1).clamp(max=length - 1))[:, :, None]
    begins_C1, begins_S = begins_C[:, None], begins_C
    is_seen_BCS = (begins_S <= begins_C1) & (begins_S + FLEX_BLOCK > furthest_BC1)
    is_full_BCS = (begins_S < begins_C1) & (begins_S >= nearest_BC1)

    def is_allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_seen_BT[row, query])

    return BlockMask.from_kv_blocks(
        *_ordered(is_seen_BCS & ~is_full_BCS),
        *_ordered(is_full_BCS),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_allowed,
        seq_lengths=(length, length),
    )


def _ordered(is_chosen_BCS: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers, the chosen ones first."""
    chosen_B1CS = is_chosen_BCS.unsqueeze(1).to(torch.int32)
    order_B1CS = chosen_B1CS.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1CS.sum(-1, dtype=torch.int32), order_B1CS.to(torch.int32)
