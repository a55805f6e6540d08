"""`groundup scale RECIPE`: a ladder of small runs, the law through them, the best size, and the full run's curve."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from groundup.base.config import flatten, numerics
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.base.log import Log
from groundup.insight.budget import parse_budget
from groundup.insight.drawing import count_words, span_words
from groundup.insight.fit import FittedLaw, fit_law, predicted_loss
from groundup.insight.forecast import LEVEL, Forecast, best_size, fit_outcomes, forecast, observations
from groundup.insight.ladder import FullRun, Rung, measured_paces, planned_rungs, rung_seconds
from groundup.insight.laws import PerplexityLaw
from groundup.insight.rungs import Outcome, full_run, run_rung
from groundup.model.config import ModelConfig
from groundup.report.forecast import FORECAST, SCALE
from groundup.stages.config import PretrainConfig
from groundup.stages.text_rows import hashes_of, text_sources
from groundup.stages.work import Work

LADDER, LAW = "ladder.json", "law.json"
NO_CURVE = {
    *("device", "micro_batch_rows", "precision", "allow_tf32", "attention", "activation_checkpointing", "compile"),
    *("validate_every", "sample_every", "sample_prompts", "sample_tokens", "num_threads"),
    *("on_nonfinite", "on_spike", "spike_deviations", "spike_window", "spike_batches", "max_rewinds"),
}
"""Settings of pretraining that leave its curve where it is, or as good as."""
CONSTANTS = ("E", "A", "B", "alpha", "beta")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the best size: sizes that are shown beside it."""


@dataclass(frozen=True)
class Ladder:
    """Finished rungs, and the law through them."""

    full: FullRun
    rungs: list[Rung]
    outcomes: list[Outcome]
    fitted: FittedLaw
    summed: FittedLaw
    """The same in the form of Hoffmann et al., a sum of losses, to be read beside published laws."""


def scale_recipe(work: Work, seconds: float, *, budget: str | None = None) -> Ladder:
    """Run what is not finished of a recipe's ladder, say what it tells, and keep it for the report.

    Raises ConfigError for a time or a recipe that holds no ladder.
    """
    flops = None if budget is None else parse_budget(budget).flops
    if budget is not None and flops is None:
        raise ConfigError("E-CLI", what=f"--budget {budget}: a law counts operations", next="write it as 1e15FLOPs")
    full = full_run(work)
    folder = work.path(SCALE)
    folder.mkdir(exist_ok=True)
    rungs = planned(work, full, seconds, folder / LADDER)
    outcomes = [_one(work, full, rung, folder, f"{number}/{len(rungs)}") for number, rung in enumerate(rungs, start=1)]
    summed = fit_law(observations(outcomes), power=0.0, powers=(0.0, 0.0), draws=0)
    ladder = Ladder(full, rungs, outcomes, fit_outcomes(outcomes), summed)
    whole = full.rung
    curve = forecast(ladder.fitted, outcomes, whole.parameters, whole.tokens, full.unique_tokens)
    write_json(folder / LAW, law_values(ladder))
    write_json(folder / FORECAST, forecast_values(work, ladder, curve))
    for line in scale_lines(ladder, curve, flops or whole.flops):
        work.log.say(line)
    return ladder


def planned(work: Work, full: FullRun, seconds: float, path: Path) -> list[Rung]:
    """The rungs of a file where it holds those of this recipe and time; else they are planned anew, and kept there."""
    key = {"seconds": seconds, **curve_settings(full.shape, full.config), **_inputs(work, full.config)}
    if path.is_file() and (kept := read_json(path)).get("key") == key:
        return [
            Rung(ModelConfig.model_validate(one["shape"]), one["steps"], one["batch_tokens"]) for one in kept["rungs"]
        ]
    pace_of = measured_paces(full, work.log.say)
    rungs = planned_rungs(full, seconds, pace_of)
    expected = sum(rung_seconds(rung, full, pace_of(rung.parameters)) for rung in rungs)
    work.log.say(f"scale  {len(rungs)} runs of about {span_words(expected)} together in {path.parent}")
    values = [
        {"shape": rung.shape.model_dump(mode="json"), "steps": rung.steps, "batch_tokens": rung.batch_tokens}
        for rung in rungs
    ]
    write_json(path, {"key": key, "rungs": values})
    return rungs


def _one(work: Work, full: FullRun, rung: Rung, folder: Path, number: str) -> Outcome:
    log = work.log if work.log.is_live else Log(quiet=True)  # on a terminal a long run shows that it is at work
    outcome = run_rung(work.recipe, full, rung, work.run.path, folder, log)
    work.log.say(
        f"  {number:>5}  {rung.shape.num_hidden_layers} layers of {rung.shape.hidden_size:<5} "
        f"{count_words(rung.parameters):>7} parameters  {count_words(rung.tokens):>7} tokens  loss {outcome.loss:.4f}"
    )
    return outcome


def curve_settings(shape: ModelConfig, config: PretrainConfig) -> dict[str, Any]:
    """What decides the curve of a pretraining beside its text, by dotted name."""
    pretrain = {name: value for name, value in numerics(config).items() if name not in NO_CURVE}
    return flatten({"model": numerics(shape), "pretrain": pretrain})


def _inputs(work: Work, config: PretrainConfig) -> dict[str, str]:
    """Hashes of the text and the tokenizer, named as in the stage's key."""
    tokenizer = work.run.committed("tokenizer").output_hash("tokenizer.json")
    return hashes_of(text_sources(work, config)) | {"tokenizer": tokenizer}


def law_values(ladder: Ladder) -> dict[str, Any]:
    """What law.json holds."""
    fitted = ladder.fitted
    return {
        "law": asdict(fitted.law),
        "intervals": {name: fitted.interval(attrgetter(name), LEVEL) for name in CONSTANTS},
        "level": LEVEL,
        "scatter": fitted.scatter,
        "sum_of_losses": asdict(ladder.summed.law),
        "runs": [
            {"run": rung.name, **{key: value for key, value in asdict(one).items() if key != "looks"}, "loss": one.loss}
            for rung, one in zip(ladder.rungs, ladder.outcomes, strict=True)
        ],
    }


def forecast_values(work: Work, ladder: Ladder, curve: Forecast) -> dict[str, Any]:
    """What forecast.json holds: whose curve, and the curve."""
    full = ladder.full
    assert work.recipe.model is not None
    return {
        "settings": curve_settings(work.recipe.model, full.config),
        "inputs": _inputs(work, full.config),
        "steps": [share * full.steps for share in curve.shares],
        "loss": curve.loss,
        "low": curve.low,
        "high": curve.high,
        "level": LEVEL,
        "num_runs": len(ladder.rungs),
        "to_gain": curve.to_gain,
        "compute_ratio": full.rung.flops / ladder.rungs[-1].flops,
    }


def scale_lines(ladder: Ladder, curve: Forecast, flops: float) -> Iterator[str]:
    """The law, the full run, the best size for some operations."""
    full, fitted = ladder.full, ladder.fitted
    law, whole = fitted.law, full.rung
    yield (
        f"law  exp({law.power:g} L) = exp({law.power:g} × {law.E:.2f}) + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / "
        f"D^{law.beta:.3f}  for L in nats a token of the held-out rows"
    )
    between = {name: fitted.interval(attrgetter(name), LEVEL) for name in ("E", "alpha", "beta")}
    spans = ", ".join(f"{name} {low:.2f} to {high:.2f}" for name, (low, high) in between.items())
    yield f"     {100 * LEVEL:.0f} % of the draws: {spans}; the runs lie within {100 * fitted.scatter:.2f} % of it"
    summed = ladder.summed.law
    loss = predicted_loss(summed, whole.parameters, whole.tokens, full.unique_tokens)
    yield (
        f"     as a sum of losses: L = {summed.E:.3f} + {summed.A:.4g} / N^{summed.alpha:.3f} + {summed.B:.4g} / "
        f"D^{summed.beta:.3f}, which tells {loss:.3f} for the full run: for small models too much"
    )
    if ladder.rungs[0].batch_tokens != full.config.batch_size_tokens:
        yield f"     the runs have batches of {ladder.rungs[0].batch_tokens:,} tokens: the recipe's would leave too few steps"
    passes = whole.tokens / full.unique_tokens
    yield (
        f"full run  {count_words(whole.parameters)} parameters on {count_words(whole.tokens)} tokens, {passes:.2g} passes, "
        f"{whole.flops / ladder.rungs[-1].flops:.1f} times the largest of the runs: loss {curve.loss[-1]:.3f} "
        f"({curve.low[-1]:.3f} to {curve.high[-1]:.3f})"
    )
    yield from _looking_back(ladder.outcomes, curve)
    best, low, high = best_size(fitted, flops, full.unique_tokens)
    yield (
        f"best for {count_words(flops)}FLOP  {count_words(best)} parameters ({count_words(low)} to {count_words(high)}) on "
        f"{count_words(flops / 6 / best)} tokens"
    )
    yield "       parameters     tokens  passes    loss"
    for factor in FACTORS:
        yield _size_line(law, factor * best, flops, full.unique_tokens, is_best=factor == 1.0)
    yield f"Go on with the recipe itself: its report draws this curve under the real one ({SCALE}/{FORECAST})."


def _looking_back(outcomes: Sequence[Outcome], curve: Forecast) -> Iterator[str]:
    """What a law cannot tell of: whether the full run learns to look up what stands in its row already."""
    known = [one for one in outcomes if one.repeat_loss is not None]
    able = sum(one.looks_back for one in known)
    if curve.to_gain:
        yield (
            f"       none of the runs has learned to look up what followed the same token before in its row: if the full run does, it "
            f"ends about {100 * curve.to_gain:.0f} % lower than told"
        )
    elif able < len(known):
        yield (
            f"       {able} of {len(known)} runs have learned to look up what followed the same token before in their row: "
            "the law goes through both kinds, and is worth less than its interval says"
        )


def _size_line(law: PerplexityLaw, parameters: float, flops: float, unique_tokens: float, *, is_best: bool) -> str:
    tokens = flops / 6 / parameters
    loss = predicted_loss(law, parameters, tokens, unique_tokens)
    return (
        f"  {'›' if is_best else ' '} {count_words(parameters):>12}  {count_words(tokens):>9}  "
        f"{tokens / unique_tokens:>6.2g}  {loss:>6.3f}"
    )
