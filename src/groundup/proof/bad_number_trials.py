"""NaN and infinities at random places of a step: nothing that is not finite is kept, the state before the step stands."""

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.errors import CheckpointError, NumericsError
from groundup.data.rows import RowBatch
from groundup.model.loss import NLL
from groundup.parallel.world import World
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial
from groundup.proof.rank_server import RankGroup
from groundup.proof.tiny_job import SPLITS, tiny_job, tiny_rows, write_tiny_tokens
from groundup.train.engine import TorchEngine
from groundup.train.run import TrainingRun

NUM_STEPS = 6
NUM_MICRO_BATCHES = 2
POISONS = (float("nan"), float("inf"), -float("inf"))
PLACES = ("gradient", "micro-batch", "loss")
EngineStep = Callable[[TorchEngine, float], dict[str, float]]


@dataclass(frozen=True)
class Poison:
    """Where a bad number comes up: on one rank, in one step."""

    place: str
    """The gradient of the whole step, of one micro-batch, or the loss of one micro-batch."""
    step: int
    rank: int
    micro_batch: int
    tensor: str
    element: int
    value: float

    @classmethod
    def drawn(cls, draw: random.Random, engine: TorchEngine) -> "Poison":
        """By chance, the same on every rank."""
        name = draw.choice(sorted(engine.masters))
        return cls(
            place=draw.choice(PLACES),
            step=draw.randrange(NUM_STEPS),
            rank=draw.randrange(engine.world.size),
            micro_batch=draw.randrange(NUM_MICRO_BATCHES // engine.world.size),
            tensor=name,
            element=draw.randrange(engine.masters[name].numel()),
            value=draw.choice(POISONS),
        )


def values_of(engine: TorchEngine) -> dict[str, Tensor]:
    """Copies of weights and moments."""
    state = engine.state_dict()
    return {f"{part} {name}": tensor.clone() for part, group in state.items() for name, tensor in group.items()}


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _are_finite(engine: TorchEngine) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in values_of(engine).values())


def bad_number_trial(
    world: World, folder: str, seed: int, engine_step: EngineStep | None = None
) -> dict[str, list[str] | str]:
    """Train with one bad number, over the token files in `folder`; what must never be, listed, and the case in words."""
    draw = random.Random(seed)
    policy, optimizer = draw.choice(["stop", "skip", "rewind"]), draw.choice(["muon", "adamw"])
    job = tiny_job(
        Path(folder) / f"run-{seed}",
        {split: tiny_rows(Path(folder), split) for split in SPLITS},
        world=world,
        duration=f"{NUM_STEPS} steps",
        checkpoint_every="2 steps",
        on_nonfinite=policy,
        optimizer=optimizer,
        precision=draw.choice(["fp32", "bf16"]),
        attention="dense",
    )
    run = TrainingRun(job)
    engine = run.engine
    poison = Poison.drawn(draw, engine)
    if engine_step is not None:
        engine.optimizer_step = lambda lr_multiplier: engine_step(engine, lr_multiplier)  # type: ignore[method-assign]
    violations: list[str] = []
    before = _watch(run, poison, violations)
    try:
        run.run()
        if policy == "stop":
            violations.append("the run went on")
    except NumericsError:
        if policy != "stop":
            violations.append("the policy was not followed")
        if not before or not _are_equal(values_of(engine), before[0]):
            violations.append("the state before the step does not stand")
    except (ValueError, CheckpointError) as error:  # a later line of defence: JSON, the store
        violations.append(str(error))
        return {"violations": violations, "case": str(poison)}
    if not before:
        violations.append("the fault was not injected")
    if not _are_finite(TrainingRun(job).engine):
        violations.append("a checkpoint holds a value that is not finite")
    return {"violations": violations, "case": str(poison)}


def _watch(run: TrainingRun, poison: Poison, violations: list[str]) -> list[dict[str, Tensor]]:
    """Put the bad number in when its step is computed first; look at all that is kept after each step.

    Returns a list that will hold the state before the bad step.
    """
    engine, calls = run.engine, [0]
    before: list[dict[str, Tensor]] = []
    norm, accumulate, applied = engine.gradient_norm, engine._accumulate, engine.optimizer_step
    forward_backward = engine.forward_backward
    is_here = run.world.rank == poison.rank

    def begun(*given: Any, **named: Any) -> Any:
        if run.state.step == poison.step and not before:
            before.append(values_of(engine))
            calls[0] = 0
        else:
            calls[0] = -sys.maxsize
        return forward_backward(*given, **named)

    def accumulated(part: RowBatch, divisor: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sums, gradients = accumulate(part, divisor, seed)
        if calls[0] == poison.micro_batch and is_here and poison.place != "gradient":
            if poison.place == "loss":
                sums[NLL] = sums[NLL] + poison.value
            else:
                gradient = gradients.get(poison.tensor, engine.masters[poison.tensor].grad)
                _spoil(gradient, poison)
        calls[0] += 1
        return sums, gradients

    def measured() -> float:
        if calls[0] >= 0 and is_here and poison.place == "gradient":
            _spoil(engine.masters[poison.tensor].grad, poison)
        return norm()

    def checked(lr_multiplier: float) -> dict[str, float]:
        rates = applied(lr_multiplier)
        if not _are_finite(engine):
            violations.append("a value that is not finite was stored")
        return rates

    engine.forward_backward, engine._accumulate = begun, accumulated  # type: ignore[method-assign]
    engine.gradient_norm, engine.optimizer_step = measured, checked  # type: ignore[method-assign]
    return before


def _spoil(gradient: Tensor | None, poison: Poison) -> None:
    if gradient is None:
        raise AssertionError(f"{poison.tensor} has no gradient: the fault cannot be injected")
    gradient.view(-1)[poison.element] = poison.value


def write_tokens(folder: Path) -> None:
    """The token files of the trials."""
    for seed, split in enumerate(SPLITS):
        write_tiny_tokens(folder, split, seed=seed)


def _planned(count: int) -> list[Trial]:
    return [{"seed": 1000 + number} for number in range(count)]


@contextmanager
def _making(folder: Path) -> Iterator[Make]:
    write_tokens(folder)

    def make(trial: Trial) -> Outcome:
        outcome = bad_number_trial(World(), str(folder), trial["seed"])
        shutil.rmtree(folder / f"run-{trial['seed']}")
        return outcome

    yield make


@contextmanager
def _making_on_ranks(folder: Path) -> Iterator[Make]:
    write_tokens(folder)
    with RankGroup(folder / "meet") as ranks:

        def make(trial: Trial) -> Outcome:
            answers = ranks.run(__name__, "bad_number_trial", str(folder), trial["seed"])
            shutil.rmtree(folder / f"run-{trial['seed']}")
            violations = [
                f"rank {rank}: {text}"
                for rank, answer in enumerate(answers)
                for text in (answer["value"]["violations"] if "value" in answer else [answer["error"]])
            ]
            return {"violations": violations, "case": answers[0].get("value", {}).get("case", "")}

        yield make


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    bad = sum(bool(outcome["violations"]) for outcome in outcomes)
    return [f"{len(outcomes):,}", f"{len(outcomes) - bad:,}", str(bad)]


def _is_kept(outcomes: Sequence[Outcome]) -> bool:
    return not any(outcome["violations"] for outcome in outcomes)


COLUMNS = ("bad numbers", "stopped before the weights", "kept somewhere")
BAD_NUMBERS = Guarantee(
    name="bad-numbers",
    title="NaN and infinities at random (step, micro-batch, tensor, element): never stored, the state before stands",
    columns=COLUMNS,
    usual_count=1_000,
    unit="bad numbers in gradients and losses",
    plan=_planned,
    making=_making,
    figures=_figures,
    is_kept=_is_kept,
)
BAD_NUMBERS_ON_RANKS = Guarantee(
    name="rank-bad-numbers",
    title="NaN and infinities on one of two gloo ranks: never stored on either, the state before stands",
    columns=COLUMNS,
    usual_count=200,
    unit="bad numbers on one of two ranks",
    plan=_planned,
    making=_making_on_ranks,
    figures=_figures,
    is_kept=_is_kept,
)
