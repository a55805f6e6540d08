"""The loop: one optimizer step after another. Whoever iterates decides on logs, looks and checkpoints."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from groundup.data.rows import RowBatch
from groundup.train.engine import Engine, StepSums
from groundup.train.guard import Guard


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step; `step` counts the finished ones."""

    step: int
    sums: StepSums
    grad_norm: float
    lr: dict[str, float]
    is_skipped: bool
    data_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float


def training_steps(
    engine: Engine,
    batches: Iterable[RowBatch],
    lr_multiplier: Callable[[int], float],
    guard: Guard,
    *,
    seed_of: Callable[[int, int], int],
    start_step: int,
) -> Iterator[StepResult]:
    """Yield one StepResult per optimizer step. Raises NumericsError from the guard before a bad step is applied."""
    iterator = iter(batches)
    step = start_step
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        have_data = time.perf_counter()
        sums = engine.forward_backward(batch, lambda row, step=step: seed_of(step, row))  # type: ignore[misc]
        grad_norm = engine.gradient_norm()
        have_gradients = time.perf_counter()
        is_healthy = guard.judge(step, sums, grad_norm)
        if is_healthy:
            rates = engine.optimizer_step(lr_multiplier(step))
        else:
            engine.discard_gradients()
            rates = {}
        finished = time.perf_counter()
        step += 1
        yield StepResult(
            step,
            sums,
            grad_norm,
            rates,
            not is_healthy,
            have_data - began,
            have_gradients - have_data,
            finished - have_gradients,
        )
