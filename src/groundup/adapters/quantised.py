"""Frozen linear layers in 4 bits: NF4 with double quantization, packed by torchao or by bitsandbytes.

Every 64 weights share a scale, and the scales are themselves in 8 bits (Dettmers et al., arXiv:2305.14314). The packed
weight is unpacked in each forward and again in each backward pass: no full copy of it is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.adapters.targets import block_linears
from groundup.base.errors import ConfigError
from groundup.base.machine import quiet_imports
from groundup.base.piece import Piece, Weights

NF4Maker = Literal["torchao", "bitsandbytes"]
BLOCK = 64
"""Weights that share a scale."""
LARGEST_SCALER_BLOCK = 256
"""Scales that share a scale."""


def scaler_block_size(num_weights: int) -> int | None:
    """Scales to a block of torchao's second quantization, which must divide their number; None where 64 does not
    divide the weights."""
    if num_weights % BLOCK:
        return None
    num_scales = num_weights // BLOCK
    return max(size for size in range(1, LARGEST_SCALER_BLOCK + 1) if num_scales % size == 0)


class _FrozenProduct(torch.autograd.Function):
    """x times an unpacked weight that is thrown away; its gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, unpack: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return F.linear(x_BTD, unpack(x_BTD.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.unpack(gradients[0].dtype), None


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed and frozen; casting the module to a dtype leaves the weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as the products see it."""
        raise NotImplementedError

    def packed_bytes(self) -> int:
        """Bytes that hold the weight."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = _FrozenProduct.apply(x_BTD, self.unpacked)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class TorchaoLinear(PackedLinear):
    """Packed by torchao: the weight is a parameter, so that `fully_shard` can shard it."""

    def __init__(self, linear: nn.Linear, weight: Tensor | None = None) -> None:
        """`weight` has the values where the layer itself has none."""
        with quiet_imports():  # seconds
            from torchao.quantization import to_nf4

        super().__init__(linear)
        weight = linear.weight.detach() if weight is None else weight
        size = scaler_block_size(weight.numel())
        assert size is not None
        packed = to_nf4(weight.contiguous(), BLOCK, size)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As torchao unpacks, with both halves of a byte from one table: a fifth of its time on a CPU."""
        packed: Any = self.weight
        high, low = packed.nf4.repeat_interleave(16), packed.nf4.repeat(16)
        pairs = F.embedding(packed.quantized_data.int(), torch.stack([high, low], dim=1))
        scales = packed.dequantize_scalers(
            packed.quantized_scalers, packed.quantization_factor, packed.scaler_block_size
        )
        return (pairs.view(-1, BLOCK) * scales[:, None]).view(self.out_features, self.in_features).to(dtype)

    def packed_bytes(self) -> int:
        packed: Any = self.weight
        parts = (packed.quantized_data, packed.quantized_scalers, packed.quantization_factor, packed.scaler_mean)
        return sum(part.numel() * part.element_size() for part in (*parts, packed.nf4))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a cast of the packed weight would unpack it for good
        packed = self._parameters.pop("weight")
        assert packed is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=packed.device)).device
        moved = packed if device == packed.device else nn.Parameter(packed.to(device), requires_grad=False)
        self._parameters["weight"] = moved
        return self


class BitsandbytesLinear(PackedLinear):
    """Packed by bitsandbytes: any size, but nothing that `fully_shard` could shard."""

    packed: Tensor

    def __init__(self, linear: nn.Linear, weight: Tensor | None = None) -> None:
        """As `TorchaoLinear`."""
        with quiet_imports():
            from bitsandbytes.functional import quantize_4bit  # an extra

        super().__init__(linear)
        weight = linear.weight.detach() if weight is None else weight
        # flat: with AVX512 it unpacks a matrix wrongly whose rows do not end with a block
        packed, self._state = quantize_4bit(
            weight.flatten(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # DoRA asks for the lengths of its rows
        """The unpacked weight."""
        return self.unpacked()

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        if self._state.absmax.device != self.packed.device:
            self._state.to(self.packed.device)
        unpacked: Tensor = dequantize_4bit(self.packed, self._state)
        return unpacked.view(self.out_features, self.in_features).to(dtype)

    def packed_bytes(self) -> int:
        scales = (self._state.absmax, self._state.state2.absmax)
        return sum(part.numel() * part.element_size() for part in (self.packed, *scales))


MAKERS: dict[NF4Maker, type[TorchaoLinear] | type[BitsandbytesLinear]] = {
    "torchao": TorchaoLinear,
    "bitsandbytes": BitsandbytesLinear,
}


@dataclass
class Quantisation:
    """What became of a model's weights, in parameters and bytes."""

    num_packed: int = 0
    packed_bytes: int = 0
    num_others: int = 0
    other_bytes: int = 0
    """Embeddings, norms, heads and the layers that were left as they are."""
    left: list[str] = field(default_factory=list)
    """Linear layers whose size cannot be packed."""

    @property
    def bytes_a_parameter(self) -> float:
        """Bytes of a packed matrix by its parameters."""
        return self.packed_bytes / max(1, self.num_packed)

    def words(self) -> str:
        """One line for people."""
        text = (
            f"{self.num_packed:,} parameters of the blocks in 4 bits ({self.bytes_a_parameter:.3f} bytes each), "
            f"{self.num_others:,} others (embeddings, norms) in {self.other_bytes:,} bytes"
        )
        if self.left:
            text += f"; {len(self.left)} layers whose weights {BLOCK} does not divide stay unpacked: {self.left[0]}"
        return text


def quantise_linears(model: nn.Module, maker: NF4Maker, base: Weights | None = None) -> Quantisation:
    """Pack every linear layer of the blocks and freeze it, in place; of a model on the meta device `base` gives each weight,
    and no two exist at once.

    Raises ConfigError if the maker is not installed or no layer can be packed.
    """
    if maker == "bitsandbytes":
        _need_bitsandbytes()
    account = Quantisation()
    linears = {f"{name}.weight": cast(nn.Linear, model.get_submodule(name)) for name in block_linears(model)}
    for key, linear in list(linears.items()):
        if maker == "torchao" and scaler_block_size(linear.weight.numel()) is None:
            account.left.append(key.removesuffix(".weight"))
            del linears[key]
    for key, weight in _values(linears, base):
        linear = linears.pop(key)
        packed = MAKERS[maker](linear, weight)
        del weight  # before the next one is made
        model.set_submodule(key.removesuffix(".weight"), packed)
        account.num_packed += linear.in_features * linear.out_features
        account.packed_bytes += packed.packed_bytes()
    if not account.num_packed:
        raise ConfigError(
            "E-ADAPTER-NF4",
            what=f"no linear layer has a number of weights that {BLOCK} divides",
            next="use nf4_maker bitsandbytes, or adapter lora",
        )
    others = [p for name, p in model.named_parameters() if not _is_packed(model, name)]
    account.num_others = sum(p.numel() for p in others)
    account.other_bytes = sum(p.numel() * p.element_size() for p in others)
    return account


def _values(linears: Mapping[str, nn.Linear], base: Weights | None) -> Iterator[tuple[str, Tensor]]:
    if base is None:
        yield from ((key, linear.weight.detach()) for key, linear in list(linears.items()))
        return
    pieces = {key: Piece.of_whole(tuple(linear.weight.shape)) for key, linear in linears.items()}
    for key, weight in base(pieces):
        yield key, weight.float()
        del weight


def _is_packed(model: nn.Module, parameter: str) -> bool:
    module, _, name = parameter.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(module), PackedLinear)


def _need_bitsandbytes() -> None:
    try:
        with quiet_imports():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            "E-EXTRA",
            what="nf4_maker bitsandbytes, but bitsandbytes is not installed",
            next="install groundup[bitsandbytes], or use nf4_maker torchao",
        ) from None
