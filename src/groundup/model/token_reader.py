"""One more token of every row, in the fewest calls: at one row a call costs as much as its arithmetic.

The same mathematics as `Decoder.forward_cached`, which reads prompts and every model that is not plain (adapters, 4 bits,
shards, other dtypes than fp32).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.cache import KVCache, LayerCache
from groundup.model.config import ModelConfig
from groundup.model.mlp import MLP
from groundup.model.moe import Experts, Router, SparseMLP
from groundup.model.norm import RMSNorm
from groundup.model.rope import model_rope_table

PLAIN_MODULES = (
    *(nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList, RMSNorm, Attention, MLP, Block),
    *(SparseMLP, Router, Experts),
)


def is_plain(modules: Iterable[nn.Module]) -> bool:
    """Whether the modules' weights are all that they compute with: no adapter, no 4 bits, no shard, no hook, all fp32."""
    return all(
        type(module) in PLAIN_MODULES
        and not (module._forward_hooks or module._forward_pre_hooks)
        and all(type(weight) is nn.Parameter and weight.dtype == torch.float32 for weight in module.parameters(False))
        and not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
        for module in modules
    )


@torch.no_grad()
def fuse_for_reading(blocks: Iterable[Block]) -> None:
    """Lay the weights of q, k, v and those of gate, up side by side, so that each group is one product of `TokenReader`.

    Names, shapes and values stay. For a model that is read and no longer trained: who holds the old tensors holds copies.
    """
    for block in blocks:
        if is_plain(block.modules()):
            for layers in _products_of_one_input(block):
                _lay_side_by_side([layer.weight for layer in layers])
                _lay_side_by_side([layer.bias for layer in layers if layer.bias is not None])


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one block computes with."""

    qkv: list[tuple[Tensor, Tensor | None]]
    qk_norm_HK: Tensor | None
    """Of queries' and keys' heads, one below the other."""
    o: nn.Linear
    gate_up: list[tuple[Tensor, Tensor | None]]
    block: Block
    input_norm_D: Tensor
    post_norm_D: Tensor


class TokenReader:
    """Reads the next token of each row into a cache, which is its own from then on."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: Sequence[Block],
        embedding_VD: Tensor,
        norm_D: Tensor,
        head_VD: Tensor,
        cache: KVCache,
    ) -> None:
        self.config, self.cache = config, cache
        self.embedding_VD, self.norm_D, self.head_VD = embedding_VD, norm_D, head_VD
        self.blocks = [_weights_of(block, config) for block in blocks]
        self.windows = [block.self_attn.window for block in blocks]
        # a row of one token for each place: all that dynamic scaling asks is how far a row has come
        places_S1 = torch.arange(cache.max_length, device=head_VD.device)[:, None]
        self.cos_S1K, sin_S1K = model_rope_table(places_S1, config)
        half = config.head_size // 2
        self.sin_S1K = torch.cat((-sin_S1K[..., :half], sin_S1K[..., half:]), dim=-1)

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) after the next token of each row."""
        positions_B1 = self.cache.advance([1] * len(tokens_B), 1)
        cos_B1K, sin_B1K = self.cos_S1K[positions_B1[:, 0]], self.sin_S1K[positions_B1[:, 0]]
        x_BD = F.embedding(tokens_B, self.embedding_VD)
        biases: dict[int | None, Tensor | None] = dict.fromkeys(self.windows)
        if not self.cache.is_level:
            biases = {window: self.cache.bias_B1TS(positions_B1, x_BD.dtype, window) for window in biases}
        for weights, window, cache in zip(self.blocks, self.windows, self.cache.layers, strict=True):
            x_BD = self._read(x_BD, weights, cos_B1K, sin_B1K, cache, biases[window], window)
        return F.linear(self._norm(x_BD, self.norm_D), self.head_VD)

    def _read(
        self,
        x_BD: Tensor,
        weights: _Weights,
        cos_B1K: Tensor,
        sin_B1K: Tensor,
        cache: LayerCache,
        bias_B1TS: Tensor | None,
        window: int | None,
    ) -> Tensor:
        (rows, _), size, kv_heads = x_BD.shape, self.config.head_size, self.config.num_key_value_heads
        qkv_BHK = _product(self._norm(x_BD, weights.input_norm_D), weights.qkv).view(rows, -1, size)
        qk_BHK, v_BGK = qkv_BHK.split((qkv_BHK.shape[1] - kv_heads, kv_heads), dim=1)
        if weights.qk_norm_HK is not None:
            qk_BHK = F.rms_norm(qk_BHK, (size,), None, self.config.rms_norm_eps) * weights.qk_norm_HK
        qk_BHK = torch.addcmul(qk_BHK * cos_B1K, qk_BHK.roll(size // 2, -1), sin_B1K)
        q_BHK, k_BGK = qk_BHK.split((qk_BHK.shape[1] - kv_heads, kv_heads), dim=1)
        k_BGSK, v_BGSK = cache.append(k_BGK.unsqueeze(2), v_BGK.unsqueeze(2))
        if window is not None and bias_B1TS is None:
            k_BGSK, v_BGSK = k_BGSK[:, :, -window:], v_BGSK[:, :, -window:]
        # the heads that share keys stand where queries of several tokens would: no key is repeated
        q_BGTK = q_BHK.view(rows, kv_heads, -1, size)
        attended_BD = F.scaled_dot_product_attention(q_BGTK, k_BGSK, v_BGSK, attn_mask=bias_B1TS).reshape(rows, -1)
        x_BD = _added(x_BD, attended_BD, weights.o)
        h_BD = self._norm(x_BD, weights.post_norm_D)
        mlp = weights.block.mlp
        if isinstance(mlp, SparseMLP):
            return x_BD + mlp(h_BD.unsqueeze(1))[0].squeeze(1)
        gate_BF, up_BF = _product(h_BD, weights.gate_up).chunk(2, dim=-1)
        return _added(x_BD, F.silu(gate_BF) * up_BF, mlp.down_proj)

    def _norm(self, x_BD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_BD, (x_BD.shape[1],), weight_D, self.config.rms_norm_eps)


def _products_of_one_input(block: Block) -> list[list[nn.Linear]]:
    attention = block.self_attn
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj]]
    return groups + ([[block.mlp.gate_proj, block.mlp.up_proj]] if isinstance(block.mlp, MLP) else [])


def _weights_of(block: Block, config: ModelConfig) -> _Weights:
    attention = block.self_attn
    qkv, *gate_up = (_joined(layers) for layers in _products_of_one_input(block))
    qk_norm_HK = None
    if attention.has_qk_norm:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        norms = (attention.q_norm.weight, attention.k_norm.weight)
        qk_norm_HK = torch.cat([norm_K.expand(count, -1) for norm_K, count in zip(norms, heads, strict=True)])
    return _Weights(
        qkv=qkv,
        qk_norm_HK=qk_norm_HK,
        o=attention.o_proj,
        gate_up=gate_up[0] if gate_up else [],
        block=block,
        input_norm_D=block.input_layernorm.weight,
        post_norm_D=block.post_attention_layernorm.weight,
    )


def _joined(layers: Sequence[nn.Linear]) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of all layers as one product where they lie side by side, else one by one."""
    weight = _as_one([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = _as_one(biases) if biases else None
    if weight is None or (biases and bias is None):
        return [(layer.weight, layer.bias) for layer in layers]
    return [(weight, bias)]


def _lay_side_by_side(parts: Sequence[nn.Parameter]) -> None:
    if parts:
        whole = torch.cat(list(parts))
        for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = place


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as one tensor without a copy; None where they do not follow each other in memory."""
    first = parts[0]
    for part, following in pairwise(parts):
        is_next = following.storage_offset() == part.storage_offset() + part.numel()
        is_same = following.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        if not (is_next and is_same and part.is_contiguous() and following.is_contiguous()):
            return None
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _product(x_BD: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    if len(parts) == 1:
        return F.linear(x_BD, *parts[0])
    return torch.cat([F.linear(x_BD, weight, bias) for weight, bias in parts], dim=-1)


def _added(x_BD: Tensor, h_BD: Tensor, layer: nn.Linear) -> Tensor:
    """x plus what the layer makes of h."""
    if layer.bias is not None:
        x_BD = x_BD + layer.bias
    return torch.addmm(x_BD, h_BD, layer.weight.t())
