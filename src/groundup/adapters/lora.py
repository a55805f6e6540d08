"""LoRA by `peft` on our modules, in files that `peft` loads onto the `transformers` model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from groundup.adapters.config import AdapterConfig
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import write_json
from groundup.base.pickles import refuse_pickle, refuse_pickles_in

ADAPTER = "default"
PREFIX = "base_model.model."


def _peft_config(config: AdapterConfig, targets: list[str]) -> Any:
    from peft import LoraConfig  # takes seconds to import

    # no task_type and an explicit list: "all-linear" would wrap lm_head and routers too
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
    )


def inject_lora(model: nn.Module, config: AdapterConfig, *, seed: int) -> list[str]:
    """Put adapters onto the named linears of the blocks; everything else is frozen. Returns the adapted names.

    Raises ConfigError if a target names no layer.
    """
    from peft import inject_adapter_in_model

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    targets = [name for name in linears if name.rpartition(".")[2] in config.lora_targets]
    unused = [target for target in config.lora_targets if not any(name.endswith(f".{target}") for name in linears)]
    if unused or not targets:
        known = sorted({name.rpartition(".")[2] for name in linears})
        raise ConfigError(
            "E-ADAPTER-NOOP", what=f"lora_targets fit no layer: {unused}", next=f"known: {', '.join(known)}"
        )
    torch.manual_seed(seed)
    inject_adapter_in_model(_peft_config(config, targets), model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return targets


def adapter_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapter tensors under the names of a peft file."""
    return {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in named.items() if ".lora_" in name}


def save_adapter(folder: Path, config: AdapterConfig, weights: dict[str, Tensor], *, base_hash: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the base's hash stands in the tensors' metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter_tensors(weights).items()}
    data = save(tensors, metadata={"format": "pt", "base_hash": base_hash})
    (folder / "adapter_model.safetensors").write_bytes(_with_sorted_metadata(data))
    values = _peft_config(config, sorted(config.lora_targets)).to_dict()
    values |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": None}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    write_json(folder / "adapter_config.json", json.loads(json.dumps(values, default=str)))


def _with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file whose metadata stand in order: the library writes them in another order each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The part of adapter_config.json that groundup computes. Raises ConfigError for the rest."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(
            "E-ADAPTER-NONE", what="no adapter_config.json", where=folder, next="give an adapter's directory"
        )
    try:
        values = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        refuse_pickle(path)
        raise ConfigError(
            "E-ADAPTER-CONFIG", what=f"not a JSON object: {str(error)[:120]}", where=path, next="repair the file"
        ) from None
    refused = [
        name
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
        if values.get(name)
    ]
    if values.get("peft_type") != "LORA" or refused:
        raise ConfigError(
            "E-ADAPTER-TYPE",
            what=f"not a plain LoRA adapter: {values.get('peft_type')} {refused}",
            where=path,
            next="merge it with peft",
        )
    return AdapterConfig(
        adapter="lora",
        lora_rank=values["r"],
        lora_alpha=values["lora_alpha"],
        lora_targets=tuple(values["target_modules"]),
    )


def read_base_hash(folder: Path) -> str | None:
    """Hash of the base the adapter was trained on; None if it was not written by groundup."""
    path = _adapter_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return metadata.get("base_hash")


def _adapter_file(folder: Path) -> Path:
    """Where the adapter's tensors stand. Raises CheckpointError where there are none, or only a pickle."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        refuse_pickles_in(folder)
        raise CheckpointError(
            "E-ADAPTER-NONE", what="no adapter_model.safetensors", where=folder, next="give an adapter's directory"
        )
    return path


def _damaged(path: Path, error: Exception) -> CheckpointError:
    refuse_pickle(path)
    return CheckpointError(
        "E-ADAPTER-DAMAGED", what=f"cannot be read: {str(error)[:120]}", where=path, next="copy or make it again"
    )


def load_adapter(model: nn.Module, folder: Path, config: AdapterConfig) -> None:
    """Inject a saved adapter. Raises CheckpointError if its tensors do not fit the model."""
    inject_lora(model, config, seed=0)
    expected = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    path = _adapter_file(folder)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    names = {key: PREFIX + key.replace(f".{ADAPTER}.", ".") for key in expected}
    if set(names.values()) != tensors.keys():
        raise CheckpointError(
            "E-KEYS",
            what=f"adapter and model differ in {len(set(names.values()) ^ tensors.keys())} tensors",
            where=folder,
            next="give the base it was trained on",
        )
    with torch.no_grad():
        for key, parameter in expected.items():
            if tensors[names[key]].shape != parameter.shape:
                raise CheckpointError(
                    "E-ADAPTER-BASE",
                    what=f"{key} is {list(tensors[names[key]].shape)}, the model needs {list(parameter.shape)}",
                    where=folder,
                    next="give the base it was trained on",
                )
            parameter.copy_(tensors[names[key]])


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's weights with every adapter added in fp32, under the base's own names."""
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = parameter.detach().float().clone()
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] += module.get_delta_weight(ADAPTER).detach().float()
    return weights
