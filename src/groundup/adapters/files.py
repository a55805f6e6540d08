"""Adapter directories: written so that `peft` loads them onto the `transformers` model, and read back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import ADAPTER, MARK, inject_lora, peft_config
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import write_json
from groundup.base.pickles import refuse_pickle, refuse_pickles_in

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS = ".token_adapter.trainable_tokens_delta"


def file_name(name: str) -> str:
    """A trained tensor's name in a peft file."""
    name = name.replace(".parametrizations.weight.0.lora_rows", ROWS)
    if name.endswith(f".lora_magnitude_vector.{ADAPTER}.weight"):
        return PREFIX + name.removesuffix(f".{ADAPTER}.weight")
    return PREFIX + name.replace(f".{ADAPTER}.", ".")


def adapter_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapter tensors under the names of a peft file."""
    return {file_name(name): tensor for name, tensor in named.items() if MARK in name}


def save_adapter(
    folder: Path,
    config: AdapterConfig,
    weights: Mapping[str, Tensor],
    *,
    targets: Sequence[str],
    base_hash: str,
    token_ids: Sequence[int] = (),
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the base's hash stands in the tensors' metadata, and
    who packed the base it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter_tensors(weights).items()}
    metadata = {"format": "pt", "base_hash": base_hash}
    if config.adapter == "qlora":
        metadata["base_in_training"] = f"nf4 {config.nf4_maker}"
    data = save(tensors, metadata=metadata)
    (folder / WEIGHTS).write_bytes(_with_sorted_metadata(data))
    values = peft_config(config, sorted(targets), token_ids, init_lora_weights=True).to_dict()
    if PREFIX + "lm_head" + ROWS in tensors:
        values["trainable_token_indices"]["lm_head"] = list(token_ids)
    values |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": None}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    write_json(folder / CONFIG, json.loads(json.dumps(values, default=str)))


def _with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file whose metadata stand in order: the library writes them in another order each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's directory says about it."""

    config: AdapterConfig
    token_ids: tuple[int, ...]
    base_hash: str | None
    """Hash of the base it was trained on; None if it was not written by groundup."""
    nf4_maker: str | None
    """Who packed that base in training; None for a base in full precision."""


def read_adapter(folder: Path) -> SavedAdapter:
    """Config and origin of an adapter's directory."""
    config, metadata = read_adapter_config(folder), _metadata(folder)
    packed = metadata.get("base_in_training", "")
    maker = packed.removeprefix("nf4 ") if packed else None
    return SavedAdapter(config, read_token_ids(folder), metadata.get("base_hash"), maker)


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            "E-ADAPTER-NONE", what="no adapter_config.json", where=folder, next="give an adapter's directory"
        )
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        refuse_pickle(path)
        raise ConfigError(
            "E-ADAPTER-CONFIG", what=f"not a JSON object: {str(error)[:120]}", where=path, next="repair the file"
        ) from None


REFUSED = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules", "lora_bias"),
    *(
        "fan_in_fan_out",
        "target_parameters",
        "layer_replication",
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
    ),
)
"""Fields of a peft config that change what is computed, and are not computed here."""


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The part of adapter_config.json that groundup computes. Raises ConfigError for the rest."""
    path, values = folder / CONFIG, _read_values(folder)
    refused = [name for name in REFUSED if values.get(name)]
    targets = values.get("target_modules")
    if values.get("peft_type") != "LORA" or refused or values.get("bias", "none") != "none":
        raise ConfigError(
            "E-ADAPTER-TYPE",
            what=f"not a plain LoRA adapter: {values.get('peft_type')} {refused}",
            where=path,
            next="merge it with peft",
        )
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(
            "E-ADAPTER-TYPE",
            what=f"target_modules is {targets!r}, not a list of names",
            where=path,
            next="save it again with the names of its layers",
        )
    if str(values.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "eva", "lora_ga")):
        raise ConfigError(
            "E-ADAPTER-TYPE",
            what=f"an adapter of {values['init_lora_weights']} fits only the base that it changed when it began",
            where=path,
            next="save it with peft as an ordinary LoRA (path_initial_model_for_weight_conversion)",
        )
    try:
        return AdapterConfig(
            adapter="lora",
            lora_rank=values["r"],
            lora_alpha=values["lora_alpha"],
            lora_targets=tuple(targets),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "E-ADAPTER-CONFIG", what=f"rank or alpha: {str(error)[:120]}", where=path, next="repair the file"
        ) from None


def read_token_ids(folder: Path) -> tuple[int, ...]:
    """Rows of the embedding that were trained with an adapter."""
    rows = _read_values(folder).get("trainable_token_indices") or {}
    ids = rows.get("embed_tokens", []) if isinstance(rows, dict) else rows
    if any(not isinstance(index, int) for index in ids):
        raise ConfigError(
            "E-ADAPTER-CONFIG",
            what="trainable_token_indices are not numbers",
            where=folder / CONFIG,
            next="repair the file",
        )
    return tuple(ids)


def read_base_hash(folder: Path) -> str | None:
    """Hash of the base the adapter was trained on; None if it was not written by groundup."""
    return _metadata(folder).get("base_hash")


def _metadata(folder: Path) -> dict[str, str]:
    path = _weights_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _weights_file(folder: Path) -> Path:
    """Where the adapter's tensors stand. Raises CheckpointError where there are none, or only a pickle."""
    path = folder / WEIGHTS
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
    inject_lora(model, config, seed=0, token_ids=read_token_ids(folder))
    load_adapter_weights(model, folder)


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter's tensors into one that is there. Raises CheckpointError if they do not fit."""
    expected = {name: parameter for name, parameter in model.named_parameters() if MARK in name}
    path = _weights_file(folder)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    names = {key: file_name(key) for key in expected}
    if set(names.values()) != tensors.keys():
        raise CheckpointError(
            "E-KEYS",
            what=f"adapter and model differ in {len(set(names.values()) ^ tensors.keys())} tensors",
            where=folder,
            next="give the base it was trained on",
        )
    with torch.no_grad():
        for key, parameter in expected.items():
            tensor = tensors[names[key]]
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    "E-ADAPTER-BASE",
                    what=f"{key} is {list(tensor.shape)}, the model needs {list(parameter.shape)}",
                    where=folder,
                    next="give the base it was trained on",
                )
            if not tensor.isfinite().all():
                raise CheckpointError(
                    "E-NONFINITE",
                    what=f"{key} holds values that are not finite",
                    where=folder,
                    next="go back to an earlier adapter",
                )
            parameter.copy_(tensor)
