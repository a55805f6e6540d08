"""The loop: one optimizer step after another. Whoever iterates decides on logs, looks and checkpoints."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from groundup.base.errors import NumericsError
from groundup.data.rows import RowBatch
from groundup.train.engine import Engine, StepSums
from groundup.train.guard import Guard, Verdict


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step; `step` counts the finished ones."""

    step: int
    sums: StepSums
    grad_norm: float
    lr: dict[str, float]
    is_skipped: bool
    has_overflow: bool
    """Whether it was passed over because gradients left fp16's range."""
    data_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float


class RewindWanted(Exception):
    """The guard wants the run back at its last checkpoint, without the batch of `step` (counted from 0)."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def training_steps(
    engine: Engine,
    batches: Iterable[RowBatch],
    lr_multiplier: Callable[[int], float],
    guard: Guard,
    *,
    seed_of: Callable[[int, int], int],
    start_step: int,
    should_stop: Callable[[], bool] = lambda: False,
    finish: Callable[[StepResult], None] = lambda result: None,
    update: AbstractContextManager[object] | None = None,
) -> Iterator[StepResult]:
    """Yield one StepResult per optimizer step.

    Weights change, and `finish` is told of it, inside `update` only: outside of it they and what `finish` keeps belong
    together. Raises NumericsError or RewindWanted from the guard before a bad step is applied, StepAbandoned from the
    engine where `should_stop` says so.
    """
    iterator = iter(batches)
    update = update or nullcontext()
    step = start_step
    while True:
        began = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        have_data = time.perf_counter()
        if guard.is_passed_over(step):
            sums, grad_norm, verdict, has_overflow = StepSums(torch.zeros(()), 0), 0.0, Verdict.SKIP, False
        else:
            sums = engine.forward_backward(batch, lambda row, step=step: seed_of(step, row), should_stop)  # type: ignore[misc]
            grad_norm = engine.gradient_norm()
            try:
                if has_overflow := engine.has_overflow(sums):
                    guard.note_overflow(step, sums)
                verdict = Verdict.SKIP if has_overflow else guard.judge(step, sums, grad_norm)
            except NumericsError:
                engine.discard_gradients()
                raise
        have_gradients = time.perf_counter()
        if verdict is Verdict.REWIND:
            engine.discard_gradients()
            raise RewindWanted(step)
        with update:
            rates = engine.optimizer_step(lr_multiplier(step)) if verdict is Verdict.APPLY else {}
            if has_overflow:
                engine.shrink_scale()
            engine.discard_gradients()
            step += 1
            result = StepResult(
                step,
                sums,
                grad_norm,
                rates,
                verdict is not Verdict.APPLY,
                has_overflow,
                have_data - began,
                have_gradients - have_data,
                time.perf_counter() - have_gradients,
            )
            finish(result)
        yield result
