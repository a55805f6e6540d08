"""Runs of a ladder: each an ordinary run in a folder of its own, and what is read of it once it is finished."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from groundup.base.artifact import RunFolder
from groundup.base.log import Log
from groundup.insight.amounts import pretraining
from groundup.insight.ladder import FullRun, Rung, rung_recipe
from groundup.insight.taken_over import take_over
from groundup.report.read import Points, StageRecord, read_run
from groundup.stages.recipe import Recipe
from groundup.stages.run import TEXT_STAGES, run_stages, stages_of
from groundup.stages.work import Work

LOOKS_BACK = 0.75
"""Loss of a pair's second token where the pair comes again in its row, as a part of the loss where it comes first, below
which a run has learned to look it up: before, it is 0.84 to 0.98 in runs of minutes, then it falls to 0.36 to 0.66
(docs/scale.md)."""
ONCE_LEARNED = 0.5
"""Where it then lies."""
TEXT_FOLDERS = ("corpus", "tokenizer", "tokens")


@dataclass(frozen=True)
class Outcome:
    """A finished run: its size, what it read, and its loss on held-out rows on the way."""

    parameters: float
    tokens: float
    unique_tokens: float
    looks: tuple[tuple[float, float], ...]
    """(share of the run, nats a token), the last at its end."""
    bytes_a_token: float
    """Of the held-out text."""
    repeat_loss: float | None = None
    """At the end, nats a token of those whose pair stood in their row before; None where there are none."""
    first_loss: float = 0.0
    """Of the same pairs where they stand for the first time, each as often as it comes again."""
    repeat_share: float = 0.0
    """Of all tokens."""

    @property
    def loss(self) -> float:
        """At the end."""
        return self.looks[-1][1]

    @property
    def looks_back(self) -> bool:
        """Whether it has learned to look up what followed the same token before."""
        return self.repeat_loss is not None and self.repeat_loss < LOOKS_BACK * self.first_loss

    @property
    def to_gain(self) -> float:
        """Share of the loss that looking back would take off."""
        if self.repeat_loss is None or self.looks_back:
            return 0.0
        return self.repeat_share * (self.repeat_loss - ONCE_LEARNED * self.first_loss) / self.loss


def full_run(work: Work) -> FullRun:
    """Make the recipe's tokens where they do not stand yet, and say what its pretraining is."""
    recipe = work.recipe
    shape, config = work.needed(recipe.model, "model"), work.needed(recipe.pretrain, "pretrain")
    run_stages(work, [name for name in stages_of(recipe) if name in TEXT_STAGES])
    shape, amounts = pretraining(recipe, work, shape)
    return FullRun(shape, config, amounts.rows_per_epoch, amounts.tokens_per_epoch, amounts.held_out_rows)


def run_rung(recipe: Recipe, full: FullRun, rung: Rung, text: Path, folder: Path, log: Log) -> Outcome:
    """Train a rung, or leave it where it is finished. The run at `text` has its tokens."""
    work = Work(rung_recipe(recipe, full, rung), RunFolder(folder / rung.name), log)
    with work.run.lock():
        for stage in TEXT_FOLDERS:
            take_over(stage, text, work.run)
    run_stages(work, ("pretrain",))
    return outcome_of(work.run.path, full)


def outcome_of(run: Path, full: FullRun) -> Outcome:
    """What a finished pretraining came to."""
    stage = read_run(run).stages[0]
    weights = {name: entry.weight for name, entry in full.config.mixture.items()}
    losses, bits = (weighted_looks(stage, figure, weights) for figure in ("loss", "bits_per_byte"))
    looks = tuple((step / stage.num_steps, value) for step, value in zip(losses.steps, losses.values, strict=True))
    parameters = stage.figure("num_active_parameters") or stage.figure("num_parameters")
    assert parameters is not None and looks[-1][0] == 1.0
    bytes_a_token = losses.values[-1] / math.log(2) / bits.values[-1]
    names = ("repeat_loss", "first_loss", "repeat_share")
    repeats, firsts, shares = (weighted_looks(stage, figure, weights) for figure in names)
    return Outcome(
        parameters,
        float(stage.summary["tokens"]),
        full.unique_tokens,
        looks,
        bytes_a_token,
        repeats.values[-1] if len(repeats) else None,
        firsts.values[-1] if len(firsts) else 0.0,
        shares.values[-1] if len(shares) else 0.0,
    )


def weighted_looks(stage: StageRecord, figure: str, weights: Mapping[str, float]) -> Points:
    """A figure of held-out rows at each look, one of several sources by their weights."""
    sets = stage.validation.get(figure, {})
    steps = sorted({step for points in sets.values() for step in points.steps})
    values = [_weighted(sets, step, weights) for step in steps]
    return Points(tuple(steps), tuple(values))


def _weighted(sets: Mapping[str, Points], step: float, weights: Mapping[str, float]) -> float:
    found: Sequence[tuple[float, float]] = [
        (weights.get(name, 1.0), points.values[points.steps.index(step)])
        for name, points in sets.items()
        if step in points.steps
    ]
    return math.fsum(weight * loss for weight, loss in found) / math.fsum(weight for weight, _ in found)
