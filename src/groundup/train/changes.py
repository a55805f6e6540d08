"""What decides the bits of a run, and what of it is not as it was when the last checkpoint was saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention import current_flash_attention_impl

from groundup.train.state import TrainingState


def environment_of(device: str) -> dict[str, str]:
    """What beside the recipe decides the last bits."""
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "device": device}
    return here | {"flash attention": current_flash_attention_impl() or "FA2"} if device == "cuda" else here


def changes_since(state: TrainingState, environment: Mapping[str, str], key: Mapping[str, Any]) -> list[str]:
    """In words, what differs from the settings, inputs and machine that a state was saved with; an older one knows none."""
    return _differences(state.environment or environment, environment) + _differences(state.key or key, key)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [f"{name}: {before.get(name)} → {now.get(name)}" for name in names if before.get(name) != now.get(name)]
