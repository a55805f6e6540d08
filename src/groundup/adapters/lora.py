"""Low-rank adapters by `peft` on our modules: put on, started again, merged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.adapters.config import AdapterConfig
from groundup.adapters.targets import choose_targets, short_names
from groundup.adapters.token_rows import plain_name, replaced_rows, train_rows
from groundup.base.errors import CheckpointError
from groundup.base.machine import quiet_imports
from groundup.base.piece import Piece, Weights

ADAPTER = "default"
MARK = ".lora_"
"""Stands in the name of every trained tensor, and in no other."""


def peft_config(config: AdapterConfig, targets: Sequence[str], token_ids: Sequence[int] = (), **changes: Any) -> Any:
    """The LoraConfig of a section; `token_ids` are rows of the embedding that are trained too."""
    with quiet_imports():  # takes seconds
        from peft import LoraConfig

    rows = {"trainable_token_indices": {"embed_tokens": list(token_ids)}} if token_ids else {}
    # no task_type and an explicit list: "all-linear" would wrap lm_head and routers too
    values = {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(targets),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True if config.init_lora_weights == "default" else config.init_lora_weights,
        "bias": "none",
    }
    return LoraConfig(**(values | rows | changes))


def inject_lora(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int,
    token_ids: Sequence[int] = (),
    base: Weights | None = None,
) -> list[str]:
    """Put adapters onto the linears that `lora_targets` mean; everything else is frozen, but the rows of `token_ids`.

    A base on the meta device stays there, what is added has its values; where those are made out of the base's, `base` gives
    one of its tensors at a time. Not of a base that changes itself (`AdapterConfig.needs_whole_base`). Returns the adapted
    names. Raises ConfigError if a target means no layer.
    """
    with quiet_imports():
        from peft import inject_adapter_in_model

    targets = choose_targets(model, config.lora_targets)
    torch.manual_seed(seed)
    with _zeros_without_memory(model):
        inject_adapter_in_model(peft_config(config, targets), model, adapter_name=ADAPTER)
    if config.use_dora:
        _measure_rows(model, base)
    if token_ids:
        train_rows(model, token_ids, base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)
    return targets


@torch.no_grad()
def _measure_rows(model: nn.Module, base: Weights | None) -> None:
    """DoRA begins with the lengths of a weight's rows: those of weights that peft saw as zeros."""
    layers = {f"{name}.base_layer.weight": layer for name, layer in lora_layers(model)}
    parameters = dict(model.named_parameters())  # what is packed is none
    pieces = {
        name: Piece.of_whole(tuple(parameters[name].shape))
        for name in layers
        if name in parameters and parameters[name].is_meta
    }
    if not pieces:
        return
    assert base is not None, "what is made out of the base needs its values"
    for name, weight in for_wrapped(base)(pieces):
        layers[name].lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.norm(weight.float(), dim=1))
        del weight  # before the next one is made


@contextmanager
def _zeros_without_memory(model: nn.Module) -> Iterator[None]:
    """Inside, parameters on the meta device pass for zeros on the CPU: peft moves what it adds to where the layer's weight is."""
    empty = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in empty:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module.register_parameter(name, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in empty:
            module.register_parameter(name, parameter)


def for_wrapped(weights: Weights) -> Weights:
    """Where a base's values come from, by the names that its parameters have under an adapter."""

    def give(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
        names = {plain_name(name): name for name in pieces}
        for name, part in weights({plain: pieces[name] for plain, name in names.items()}):
            yield names[name], part
            del part  # before the next one is made

    return give


def target_modules(model: nn.Module) -> list[str]:
    """The adapted layers of a model, as an adapter's file names them."""
    return short_names(model, [name for name, _ in lora_layers(model)])


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer of peft) of every adapted linear."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]


class PissaStart:
    """The additions a PiSSA run began with: the base is the weight without them.

    They are kept in a file: computed again by another library they could be others, and the checkpoint of a run fits
    only the base that it began with.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], file: Path, *, writes: bool = True) -> None:
        """`weights` are the adapted layers' weights before the adapter; what stands in `file` is taken up, else written
        there."""
        layers = lora_layers(model)
        if file.exists():
            self.tensors = load_file(file)
        else:
            self.tensors = {
                f"{name}.{side}": getattr(layer, side)[ADAPTER].weight.detach().clone().contiguous()
                for name, layer in layers
                for side in ("lora_A", "lora_B")
            }
            if writes:
                partial = file.with_suffix(".part")
                save_file(self.tensors, partial, metadata={"format": "pt"})
                partial.rename(file)
        if self.tensors.keys() != {f"{name}.{side}" for name, _ in layers for side in ("lora_A", "lora_B")}:
            raise CheckpointError(
                "E-ADAPTER-START", what="belongs to another adapter", where=file, next="begin again with `--restart`"
            )
        with torch.no_grad():
            for name, layer in layers:
                a_RD, b_DR = self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"]
                layer.lora_A[ADAPTER].weight.copy_(a_RD)
                layer.lora_B[ADAPTER].weight.copy_(b_DR)
                layer.get_base_layer().weight.copy_(weights[name] - layer.scaling[ADAPTER] * (b_DR @ a_RD))

    def as_lora(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained adapter as one of twice the rank on the untouched base: what was learned minus the start."""
        converted = dict(adapter)
        for key, start in self.tensors.items():
            name = f"{key}.{ADAPTER}.weight"
            trained = adapter[name]
            start = start.to(trained)
            is_first = key.endswith("lora_A")
            converted[name] = torch.cat([trained, start] if is_first else [trained, -start], dim=0 if is_first else 1)
        return converted

    @staticmethod
    def config_as_lora(config: AdapterConfig) -> AdapterConfig:
        """The section of the converted adapter: the scale stays, the rank doubles."""
        growth = 2**0.5 if config.use_rslora else 2.0
        return config.model_copy(
            update={
                "lora_rank": 2 * config.lora_rank,
                "lora_alpha": growth * config.lora_alpha,
                "init_lora_weights": "default",
            }
        )


def weights_of_targets(model: nn.Module, config: AdapterConfig) -> dict[str, Tensor]:
    """Copies of the weights that an adapter will be put on."""
    names = choose_targets(model, config.lora_targets)
    return {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights with every adapter added in fp32, under the base's own names."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if MARK not in name:
            weights[plain_name(name)] = parameter.detach().float().clone()
    weights |= {name: weight.float().clone() for name, weight in replaced_rows(model).items()}
    for name, layer in lora_layers(model):
        weight = weights[f"{name}.weight"]
        weight += layer.get_delta_weight(ADAPTER).detach().float()
        if layer.use_dora[ADAPTER]:
            length = layer.lora_magnitude_vector[ADAPTER].weight.detach().float()
            weight *= (length / torch.linalg.norm(weight, dim=1))[:, None]
    return weights
