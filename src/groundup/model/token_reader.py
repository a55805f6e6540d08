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
def fuse_for_reading(blocks: Iterable[Block], head: nn.Linear) -> None:
    """Lay the weights of q, k, v and those of gate, up side by side, so that each group is one product of `TokenReader`;
    on a CPU all matrices by columns, in which order a product with one row reads memory up to 1.8 times as fast.

    Names, shapes and values stay. For a model that is read and no longer trained: who holds the old tensors holds copies.
    """
    for block in blocks:
        if is_plain(block.modules()):
            for layers in (*_products_of_one_input(block), *_products_alone(block)):
                _lay_side_by_side([layer.weight for layer in layers])
                _lay_side_by_side([layer.bias for layer in layers if layer.bias is not None])
    if is_plain([head]):
        _lay_side_by_side([head.weight])


@dataclass(frozen=True, slots=True)
class _Product:
    """One matrix product, and where its result goes."""

    weight: Tensor
    """Transposed."""
    bias: Tensor | None
    out: Tensor

    def of(self, x: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=self.out)
        else:
            torch.addmm(self.bias, x, self.weight, out=self.out)


class _Norm:
    """RMSNorm as √size · weight · x / hypot(‖x‖, √(size · eps)): four calls, where `F.rms_norm` makes twelve."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight * size**0.5
        self.least = weight.new_tensor((size * eps) ** 0.5)

    def into(self, out: Tensor, x: Tensor) -> None:
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.least)
        torch.div(x, length, out=out).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one block computes with."""

    input_norm: _Norm
    qkv: list[_Product]
    qk_norm: _Norm | None
    o: nn.Linear
    post_norm: _Norm
    gate_up: list[_Product]
    mlp: MLP | SparseMLP
    window: int | None


class _Desk:
    """Where the intermediate results of every block are written, and their parts: a slice costs as much as a sum."""

    def __init__(self, num_rows: int, config: ModelConfig, like: Tensor) -> None:
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_size
        self.h_BD = like.new_empty(num_rows, config.hidden_size)
        self.qkv = like.new_empty(num_rows, (heads + 2 * kv_heads) * size)
        qkv_BHK = self.qkv.view(num_rows, -1, size)
        self.qk_BHK, self.v_BGTK = qkv_BHK[:, : heads + kv_heads], qkv_BHK[:, heads + kv_heads :].unsqueeze(2)
        self.first, self.second = self.qk_BHK.chunk(2, dim=-1)
        self.turned_BHK = torch.empty_like(self.qk_BHK, memory_format=torch.contiguous_format)
        self.turned_first, self.turned_second = self.turned_BHK.chunk(2, dim=-1)
        # heads that share keys stand where queries of several tokens would: no key is repeated
        self.q_BGTK = self.turned_BHK[:, :heads].view(num_rows, kv_heads, -1, size)
        self.k_BGTK = self.turned_BHK[:, heads:].unsqueeze(2)
        self.gate_up = like.new_empty(num_rows, 2 * config.intermediate_size)
        self.gate_BF, self.up_BF = self.gate_up.chunk(2, dim=-1)


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
        self.cache, self.embedding_VD, self.head_VD = cache, embedding_VD, head_VD
        # a row of one token for each place: all that dynamic scaling asks is how far a row has come
        places_S1 = torch.arange(cache.max_length, device=head_VD.device)[:, None]
        self.cos_S1K, self.sin_S1K = model_rope_table(places_S1, config)
        with torch.inference_mode():
            self.desk = _Desk(len(cache.lengths), config, head_VD)
            self.layers = [_layer_of(block, config, self.desk) for block in blocks]
            self.norm = _Norm(norm_D, config.rms_norm_eps)

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) after the next token of each row."""
        positions_B1 = self.cache.advance([1] * len(tokens_B), 1)
        cos_B1K, sin_B1K = (table.index_select(0, positions_B1[:, 0]) for table in (self.cos_S1K, self.sin_S1K))
        half_sin = sin_B1K[..., : sin_B1K.shape[-1] // 2]
        x_BD = F.embedding(tokens_B, self.embedding_VD)
        biases: dict[int | None, Tensor | None] = dict.fromkeys(layer.window for layer in self.layers)
        if not self.cache.is_level:
            biases = {window: self.cache.bias_B1TS(positions_B1, x_BD.dtype, window) for window in biases}
        for layer, cache in zip(self.layers, self.cache.layers, strict=True):
            x_BD = self._attended(x_BD, layer, cos_B1K, half_sin, cache, biases[layer.window])
            x_BD = self._after_mlp(x_BD, layer)
        self.norm.into(self.desk.h_BD, x_BD)
        return F.linear(self.desk.h_BD, self.head_VD)

    def _attended(
        self,
        x_BD: Tensor,
        layer: _Layer,
        cos_B1K: Tensor,
        half_sin: Tensor,
        cache: LayerCache,
        bias_B1TS: Tensor | None,
    ) -> Tensor:
        desk = self.desk
        layer.input_norm.into(desk.h_BD, x_BD)
        for product in layer.qkv:
            product.of(desk.h_BD)
        if layer.qk_norm is not None:
            layer.qk_norm.into(desk.qk_BHK, desk.qk_BHK)
        torch.mul(desk.qk_BHK, cos_B1K, out=desk.turned_BHK)
        desk.turned_first.addcmul_(desk.second, half_sin, value=-1)
        desk.turned_second.addcmul_(desk.first, half_sin)
        k_BGSK, v_BGSK = cache.append(desk.k_BGTK, desk.v_BGTK)
        if layer.window is not None and bias_B1TS is None:
            k_BGSK, v_BGSK = k_BGSK[:, :, -layer.window :], v_BGSK[:, :, -layer.window :]
        out_BGTK = F.scaled_dot_product_attention(desk.q_BGTK, k_BGSK, v_BGSK, attn_mask=bias_B1TS)
        return _added(x_BD, out_BGTK.reshape(len(x_BD), -1), layer.o)

    def _after_mlp(self, x_BD: Tensor, layer: _Layer) -> Tensor:
        desk = self.desk
        layer.post_norm.into(desk.h_BD, x_BD)
        if isinstance(layer.mlp, SparseMLP):
            return x_BD + layer.mlp(desk.h_BD.unsqueeze(1))[0].squeeze(1)
        for product in layer.gate_up:
            product.of(desk.h_BD)
        return _added(x_BD, F.silu(desk.gate_BF) * desk.up_BF, layer.mlp.down_proj)


def _products_of_one_input(block: Block) -> list[list[nn.Linear]]:
    attention = block.self_attn
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj]]
    return groups + ([[block.mlp.gate_proj, block.mlp.up_proj]] if isinstance(block.mlp, MLP) else [])


def _products_alone(block: Block) -> list[list[nn.Linear]]:
    return [[block.self_attn.o_proj], *([[block.mlp.down_proj]] if isinstance(block.mlp, MLP) else [])]


def _layer_of(block: Block, config: ModelConfig, desk: _Desk) -> _Layer:
    attention, eps = block.self_attn, config.rms_norm_eps
    groups = _products_of_one_input(block)
    qk_norm = None
    if attention.has_qk_norm:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        norms = (attention.q_norm.weight, attention.k_norm.weight)
        weights = [weight_K.expand(count, -1) for weight_K, count in zip(norms, heads, strict=True)]
        qk_norm = _Norm(torch.cat(weights), eps)
    return _Layer(
        input_norm=_Norm(block.input_layernorm.weight, eps),
        qkv=_products(groups[0], desk.qkv),
        qk_norm=qk_norm,
        o=attention.o_proj,
        post_norm=_Norm(block.post_attention_layernorm.weight, eps),
        gate_up=[product for layers in groups[1:] for product in _products(layers, desk.gate_up)],
        mlp=block.mlp,
        window=attention.window,
    )


def _products(layers: Sequence[nn.Linear], out: Tensor) -> list[_Product]:
    """One product where the layers' weights lie side by side, else one for each, into its share of the columns."""
    weight = _as_one([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = _as_one(biases) if biases else None
    if weight is not None and (bias is not None or not biases):
        return [_Product(weight.t(), bias, out)]
    parts = torch.split(out, [len(layer.weight) for layer in layers], dim=1)
    return [_Product(layer.weight.t(), layer.bias, part) for layer, part in zip(layers, parts, strict=True)]


def _lay_side_by_side(parts: Sequence[Tensor]) -> None:
    """Make the parts slices of one tensor; matrices on a CPU by columns."""
    if not parts:
        return
    sizes = [len(part) for part in parts]
    if parts[0].dim() == 2 and not parts[0].is_cuda:
        places = [place.t() for place in torch.split(torch.cat([part.t() for part in parts], dim=1), sizes, dim=1)]
    else:
        places = list(torch.split(torch.cat(list(parts)), sizes))
    for part, place in zip(parts, places, strict=True):
        part.data = place


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as one tensor without a copy; None where they do not follow each other in memory."""
    first = parts[0]
    for part, following in pairwise(parts):
        is_next = following.storage_offset() == part.storage_offset() + len(part) * part.stride(0)
        is_same = following.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
        if not (is_next and is_same and part.stride() == following.stride()):
            return None
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _added(x_BD: Tensor, h_BD: Tensor, layer: nn.Linear) -> Tensor:
    """x plus what the layer makes of h."""
    if layer.bias is not None:
        x_BD = x_BD + layer.bias
    return torch.addmm(x_BD, h_BD, layer.weight.t())
