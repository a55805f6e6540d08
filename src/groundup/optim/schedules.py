"""Learning-rate schedules: pure functions from a step to a multiplier of the peak rate."""

import math

from groundup.optim.config import OptimConfig


def warmup_share(step: int, warmup_steps: int) -> float:
    """Linear warmup in (0, 1]: step 0 takes the first of `warmup_steps` stairs."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def linear(progress: float, floor: float) -> float:
    """From 1 at progress 0 to `floor` at progress 1."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float) -> float:
    """Half a cosine from 1 to `floor` (Loshchilov & Hutter, arXiv:1608.03983)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_multiplier(step: int, config: OptimConfig, total_steps: int) -> float:
    """Multiplier in (0, 1] of the peak learning rate at `step` (from 0) of `total_steps`."""
    warmup_steps = warmup_steps_of(config, total_steps)
    if step < warmup_steps:
        return warmup_share(step, warmup_steps)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    shape = linear if config.schedule == "linear" else cosine
    return shape(progress, config.lr_floor)


def warmup_steps_of(config: OptimConfig, total_steps: int) -> int:
    """Warmup steps with `auto` resolved: 2 % of all steps."""
    return round(0.02 * total_steps) if config.warmup_steps == "auto" else config.warmup_steps
