"""DeepSpeed's settings: what the recipe decides, and what a JSON file may add to it."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from groundup.base.config import flatten
from groundup.base.errors import ConfigError
from groundup.parallel.world import World

Settings = dict[str, Any]
AUTO = "auto"
"""A value that leaves it to the recipe."""
ZERO = "zero_optimization"
FREE = {
    "communication_data_type",
    f"{ZERO}.overlap_comm",
    f"{ZERO}.contiguous_gradients",
    f"{ZERO}.reduce_scatter",
    f"{ZERO}.reduce_bucket_size",
    f"{ZERO}.allgather_partitions",
    f"{ZERO}.allgather_bucket_size",
    f"{ZERO}.sub_group_size",
    f"{ZERO}.stage3_prefetch_bucket_size",
    f"{ZERO}.stage3_param_persistence_threshold",
    f"{ZERO}.stage3_model_persistence_threshold",
    f"{ZERO}.stage3_max_live_parameters",
    f"{ZERO}.stage3_max_reuse_distance",
    f"{ZERO}.stage3_module_granularity_threshold",
    f"{ZERO}.offload_optimizer.pin_memory",
    f"{ZERO}.offload_param.pin_memory",
}
"""What a file may set as it likes; its other keys must say what the recipe says."""
MOOT = ("steps_per_print", "wall_clock_breakdown", f"{ZERO}.stage3_gather_16bit_weights_on_model_save", "fp16.")
"""What many files have and nothing comes of here: its own log and saves, the scale of a dtype that is off."""
ELSEWHERE = {
    "train_batch_size": "batch_size_tokens",
    "train_micro_batch_size_per_gpu": "micro_batch_rows",
    "gradient_accumulation_steps": "batch_size_tokens and micro_batch_rows",
    "optimizer": "optimizer, lr, betas, eps and weight_decay",
    "scheduler": "schedule and warmup",
}
"""What the recipe says in other words, by DeepSpeed's key."""
MOST_BUCKET_ELEMENTS = 200_000_000
"""Elements that travel together; a smaller model's buffers are its own size, not DeepSpeed's two gigabytes."""
OFFLOADS = {f"{ZERO}.offload_optimizer.device": ("cpu", "none"), f"{ZERO}.offload_param.device": ("none",)}
"""Where the recipe does not offload, a file may offload the optimizer alone; disks belong to nobody who clears them up."""
PERSISTENT_PER_HIDDEN = 10
"""Parameters of fewer elements than so many times the hidden size (norms, biases) stay whole on every rank."""


def zero_settings(
    world: World, *, dtype: torch.dtype, num_elements: int, hidden_size: int, max_grad_norm: float | None
) -> Settings:
    """All that DeepSpeed is started with; the first rank's file holds for all. Collective.

    Raises ConfigError for a file that cannot be read, has keys that do nothing here, or contradicts the recipe.
    """
    config = world.parallel
    zero: Settings = {"stage": config.zero_stage}
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    said: Settings = {
        ZERO: zero,
        "fp16": {"enabled": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": max_grad_norm or 0.0,
    }
    own = _read(config.deepspeed_config, world)
    _refuse(own, said, config.deepspeed_config or "")
    bucket = min(MOST_BUCKET_ELEMENTS, num_elements + num_elements % 2)
    usual: Settings = {
        "communication_data_type": "fp32",
        ZERO: {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_PER_HIDDEN * hidden_size,
        },
    }
    ours: Settings = {
        # micro-batches and clipping are ours: DeepSpeed is told after each whether it was a step's last
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return _merged(_merged(usual, _without_auto(own)), _merged(said, ours))


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer computes in the host's memory."""
    return bool(settings[ZERO].get("offload_optimizer", {}).get("device") == "cpu")


def _read(path: str | None, world: World) -> Settings:
    if path is None:
        return {}
    found, fault = None, ""
    if world.is_first:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fault = str(error)[:160]
    found, fault = world.broadcast([found, fault])
    if fault or not isinstance(found, dict):
        raise ConfigError(
            "E-CONFIG-DEEPSPEED",
            what=f"{path} cannot be read as DeepSpeed's settings ({fault or 'no object'})",
            where="parallel.deepspeed_config",
            next="give a JSON file with an object in it, or leave deepspeed_config out",
        )
    return found


def _refuse(own: Mapping[str, Any], said: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the first key of a file that contradicts the recipe, or does nothing here."""
    recipe = flatten(said)
    known = sorted(FREE | recipe.keys() | ELSEWHERE.keys() | OFFLOADS.keys())
    for name, value in flatten(own).items():
        if value == AUTO or name in FREE or (name in recipe and recipe[name] == value):
            continue
        if name not in recipe and name.startswith(MOOT):
            continue
        top = name.split(".")[0]
        if top in ELSEWHERE:
            raise ConfigError(
                "E-CONFIG-DEEPSPEED",
                what=f"DeepSpeed's settings have {top}, which the recipe says in other words",
                where=where,
                next=f"leave it out and set {ELSEWHERE[top]} in the recipe",
            )
        if name in recipe:
            raise ConfigError(
                "E-CONFIG-DEEPSPEED",
                what=f"{name}: {json.dumps(value)} contradicts the recipe, which makes it {json.dumps(recipe[name])}",
                where=where,
                next="leave it out, or change the recipe",
            )
        if value not in OFFLOADS.get(name, ()):
            raise ConfigError(
                "E-CONFIG-DEEPSPEED",
                what=f"DeepSpeed's settings have {name}: {json.dumps(value)}, which does nothing here, or leaves files",
                where=where,
                next=f"leave it out; the nearest known is {get_close_matches(name, known, 1, 0.0)[0]}",
            )


def _without_auto(values: Mapping[str, Any]) -> Settings:
    return {
        name: _without_auto(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value != AUTO
    }


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> Settings:
    """Both, the second before the first."""
    found = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found
