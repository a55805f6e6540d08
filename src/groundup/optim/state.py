"""What each optimizer remembers of a parameter: its tensors' shapes and bytes, and the state as plain tensors and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from groundup.base.errors import CheckpointError
from groundup.base.machine import quiet_imports
from groundup.optim.config import OptimConfig
from groundup.optim.eight_bit import BLOCK, LEAST_VALUES
from groundup.optim.groups import Kind, group_of, kind_of

Shape = Sequence[int]
CODES = 256
"""Entries of the table that gives an 8-bit code its value."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a state."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def state_layout(kind: Kind, shape: Shape) -> dict[str, Slot]:
    """Every tensor that an optimizer keeps for a parameter of a shape, by the name it is saved under."""
    whole, scalar = Slot(tuple(shape)), Slot(())
    if kind in ("muon", "sgd"):
        return {"momentum_buffer": whole}
    if kind == "adamw":
        return {"step": scalar, "exp_avg": whole, "exp_avg_sq": whole}
    if kind == "adafactor":
        if len(shape) < 2:
            return {"step": scalar, "variance": whole}
        return {"step": scalar, "row_var": Slot((*shape[:-1], 1)), "col_var": Slot((*shape[:-2], 1, shape[-1]))}
    return _torchao_layout(tuple(shape)) if kind == "torchao" else _bitsandbytes_layout(tuple(shape))


def _torchao_layout(shape: tuple[int, ...]) -> dict[str, Slot]:
    if prod(shape) < LEAST_VALUES or prod(shape) % BLOCK:
        return {"step": Slot(()), "exp_avg": Slot(shape), "exp_avg_sq": Slot(shape)}
    parts = {"codes": Slot(shape, torch.uint8), "scale": Slot((prod(shape) // BLOCK,)), "qmap": Slot((CODES,))}
    moments = {f"{moment}.{part}": slot for moment in ("exp_avg", "exp_avg_sq") for part, slot in parts.items()}
    return {"step": Slot(())} | moments


def _bitsandbytes_layout(shape: tuple[int, ...]) -> dict[str, Slot]:
    step = {"step": Slot((), torch.int64)}
    if prod(shape) < LEAST_VALUES:
        return step | {"state1": Slot(shape), "state2": Slot(shape)}
    parts = {"state": Slot(shape, torch.uint8), "qmap": Slot((CODES,)), "absmax": Slot((-(-prod(shape) // BLOCK),))}
    return step | {f"{part}{number}": slot for number in (1, 2) for part, slot in parts.items()}


def state_bytes(shapes: Mapping[str, Shape], config: OptimConfig) -> int:
    """Bytes of the optimizers' state after their first step, for trained parameters by name."""
    total = 0
    for name, shape in shapes.items():
        kind = kind_of(group_of(name, len(shape), config), config)
        if kind != "sgd" or config.sgd_momentum:
            total += sum(slot.num_bytes for slot in state_layout(kind, shape).values())
    return total


def plain_state(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizers' state as plain tensors, `PARAMETER:KEY`, or `PARAMETER:KEY.PART` for a tensor of several."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                place = f"{names[id(parameter)]}:{key}"
                if isinstance(value, int):
                    tensors[place] = torch.tensor(value)
                elif hasattr(value, "__tensor_flatten__"):
                    tensors |= {f"{place}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
                elif value is not None:
                    tensors[place] = value
    return tensors


def load_plain_state(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `plain_state` gave. Raises CheckpointError for the state of another optimizer, before any change."""
    found: dict[str, dict[str, Tensor]] = {}
    for place, value in tensors.items():
        name, _, key = place.rpartition(":")
        found.setdefault(name, {})[key] = value
    owners = {
        id(parameter): (optimizer, group["kind"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, values in found.items():
        has = {key: Slot(tuple(value.shape), value.dtype) for key, value in values.items()}
        wanted = state_layout(owners[id(parameters[name])][1], parameters[name].shape) if name in parameters else {}
        if has != wanted:
            raise CheckpointError(
                "E-OPTIMIZER-STATE",
                what=f"the checkpoint keeps {sorted(has)} of {name}, the run's optimizer {sorted(wanted)}",
                next="set the optimizer it was saved with, or begin again with `--restart`",
            )
    for optimizer in optimizers:
        optimizer.state.clear()  # a state from before the first step has no moments
    for name, values in found.items():
        parameter = parameters[name]
        optimizer, kind = owners[id(parameter)]
        optimizer.state[parameter] = _restored(kind, values, parameter)


def _restored(kind: Kind, values: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Any]:
    """A parameter's state as its optimizer keeps it."""
    if kind == "bitsandbytes":
        moved = {key: value.to(parameter.device).clone() for key, value in values.items() if key != "step"}
        return {"step": int(values["step"])} | moved
    state: dict[str, Any] = {}
    for key, value in values.items():
        if "." not in key:
            # a fused AdamW counts on its device, the others on the CPU
            stays = key == "step" and kind != "adamw"
            state[key] = value.clone() if stays else value.to(parameter.device).clone()
    if "exp_avg.codes" in values:
        with quiet_imports():
            from torchao.optim.subclass_8bit import OptimState8bit
        for moment, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
            parts = (values[f"{moment}.{part}"].to(parameter.device).clone() for part in ("codes", "scale", "qmap"))
            state[moment] = OptimState8bit(*parts, signed=is_signed, dtype=parameter.dtype)
    return state
