"""Learning-rate schedules: pure functions from a step to a multiplier of the peak rate."""

import math
from collections.abc import Callable

from groundup.base.duration import in_steps
from groundup.base.errors import ConfigError
from groundup.optim.config import OptimConfig, parse_warmup


def warmup_share(step: int, warmup_steps: int) -> float:
    """Linear warmup in (0, 1]: step 0 takes the first of `warmup_steps` stairs."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def linear(progress: float, floor: float) -> float:
    """From 1 at progress 0 to `floor` at progress 1."""
    return 1.0 - (1.0 - floor) * progress


def cosine(progress: float, floor: float) -> float:
    """Half a cosine from 1 to `floor` (Loshchilov & Hutter, arXiv:1608.03983)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def one_minus_sqrt(progress: float, floor: float) -> float:
    """Steep at first, from 1 to `floor` (Hägele et al., arXiv:2405.18392)."""
    return floor + (1.0 - floor) * (1.0 - math.sqrt(progress))


SHAPES: dict[str, Callable[[float, float], float]] = {"linear": linear, "cosine": cosine, "sqrt": one_minus_sqrt}


def wsd(step: int, config: OptimConfig, *, total_steps: int, warmup_steps: int) -> float:
    """1 until the last `decay_fraction` of the steps (not before the end of warmup), then down to the floor.

    The stable part is the same whatever the run's length (Hu et al., arXiv:2404.06395).
    """
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    last_stable = max(warmup_steps, total_steps - decay_steps) - 1
    if step <= last_stable:
        return 1.0
    return SHAPES[config.decay_shape](min(1.0, (step - last_stable) / (total_steps - 1 - last_stable)), config.lr_floor)


def inverse_sqrt(step: int, warmup_steps: int, floor: float) -> float:
    """sqrt(warmup / steps taken), not below `floor`; no horizon enters (Vaswani et al., arXiv:1706.03762)."""
    return max(floor, math.sqrt(max(1, warmup_steps) / (step + 1)))


def lr_multiplier(step: int, config: OptimConfig, *, total_steps: int, warmup_steps: int) -> float:
    """Multiplier of the peak learning rate at `step` (from 0) of `total_steps`: at most 1, at least 0."""
    if step < warmup_steps:
        return warmup_share(step, warmup_steps)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inverse_sqrt":
        return inverse_sqrt(step, warmup_steps, config.lr_floor)
    if config.schedule == "wsd":
        return wsd(step, config, total_steps=total_steps, warmup_steps=warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return SHAPES[config.schedule](progress, config.lr_floor)


def warmup_steps_of(warmup: str, total_steps: int, *, batch_rows: int, row_length: int, rows_per_epoch: int) -> int:
    """Steps of a warmup such as `2 %` or `1e6 tokens`. Raises ConfigError for one longer than the run."""
    number, unit = parse_warmup(warmup)
    if unit == "%":
        return round(number / 100 * total_steps)
    if number == 0:
        return 0
    steps = in_steps(warmup, batch_rows=batch_rows, row_length=row_length, rows_per_epoch=rows_per_epoch)
    if steps > total_steps:
        raise ConfigError(
            "E-CONFIG-WARMUP",
            what=f"warmup={warmup!r} is {steps:,} steps, the whole run {total_steps:,}",
            next="shorten the warmup, or give it as a share such as '2 %'",
        )
    return steps
