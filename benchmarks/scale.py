"""Whether what `groundup scale` foretells comes true: a ladder, then a run with eight times the operations of its largest.

    python -m benchmarks.scale [--seed 0] [--tokens 4200000] [--hidden 64] [--vocab 1024] [--batch 2048]

Finished runs stand in runs/.benchmarks and are not made again. Adds a row to docs/scale.md; ends with 1 where the loss on
held-out rows lies more than 2 % from what was foretold before the run began.
"""

import argparse
import json
import sys
import time
from typing import Any

from groundup.base.machine import prepare_process

prepare_process()

from pathlib import Path  # noqa: E402

from benchmarks.material import FOLDER  # noqa: E402
from benchmarks.results import add_row  # noqa: E402
from groundup.base.artifact import RunFolder  # noqa: E402
from groundup.base.files import write_json  # noqa: E402
from groundup.base.log import Log  # noqa: E402
from groundup.base.signals import stop_request  # noqa: E402
from groundup.cli import errors_as_lines  # noqa: E402
from groundup.insight.fit import FittedLaw  # noqa: E402
from groundup.insight.forecast import Forecast, fit_outcomes, forecast  # noqa: E402
from groundup.insight.ladder import FullRun, rungs_below  # noqa: E402
from groundup.insight.rungs import Outcome, full_run, outcome_of, run_rung  # noqa: E402
from groundup.stages.recipe import Recipe, load_recipe  # noqa: E402
from groundup.stages.run import run_stages  # noqa: E402
from groundup.stages.starter import LADDER, shape_of  # noqa: E402
from groundup.stages.work import Work  # noqa: E402

TOLERANCE = 0.02
PAGE = Path("docs/scale.md")


def recipe_of(wanted: argparse.Namespace) -> Recipe:
    """The target: the quickstart's text, a shape of `groundup init`'s ladder, every rate by the law."""
    shape = shape_of(wanted.hidden, dict(LADDER)[wanted.hidden], wanted.vocab)
    steps = wanted.tokens // wanted.batch
    pretrain = {
        **{"duration": f"{steps} steps", "row_length": 256, "batch_size_tokens": wanted.batch},
        **{"lr": "auto", "muon_lr": "auto", "muon_weight_decay": "auto", "schedule": "linear", "lr_floor": 0.0},
        **{"max_validation_rows": 256},
        **{"validate_every": f"{steps // 10} steps", "checkpoint_every": f"{steps // 10} steps"},
    }
    values = {
        "name": f"scale-{wanted.hidden}-{steps}-{wanted.vocab}-{wanted.seed}",
        "seed": wanted.seed,
        "corpus": load_recipe("quickstart").corpus,
        "tokenizer": {"vocab_size": wanted.vocab},
        "tokens": {"validation_fraction": 0.1},  # 67 documents; 2 % are 11, a third of them one file
        "model": shape.model_dump() | {"vocab_size": "auto"},
        "pretrain": pretrain,
    }
    return Recipe.model_validate(values)


def main() -> int:
    """Make the runs that are not there, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4_200_000, help="of the target")
    parser.add_argument("--hidden", type=int, default=64, choices=[width for width, _ in LADDER])
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    with errors_as_lines(), stop_request():
        return compare(parser.parse_args())


def compare(wanted: argparse.Namespace) -> int:
    """Foretell, run, compare; 1 where it did not come true."""
    recipe = recipe_of(wanted)
    work = Work(recipe, RunFolder(FOLDER / recipe.name), Log())
    full = full_run(work)
    rungs = rungs_below(full)
    seconds, outcomes = 0.0, []
    for rung in rungs:
        outcomes.append(run_rung(recipe, full, rung, work.run.path, work.path("scale"), Log(quiet=True)))
        seconds += _seconds(work.path("scale") / rung.name)
        print(
            f"  {rung.name:<16} {rung.parameters:>9,} parameters {rung.tokens:>9,} tokens {outcomes[-1].loss:.4f}",
            flush=True,
        )
    fitted = fit_outcomes(outcomes)
    told = forecast(fitted, outcomes, full.rung.parameters, full.rung.tokens, full.unique_tokens)
    # written before the run begins, so that nobody can have looked
    write_json(work.path("scale") / "foretold.json", {"at": time.time(), "loss": told.loss, "shares": told.shares})
    print(f"foretold {told.loss[-1]:.4f} ({told.low[-1]:.4f} to {told.high[-1]:.4f}), {fitted.law}", flush=True)
    run_stages(work, ("pretrain",))
    came = outcome_of(work.run.path, full)
    ratio = full.rung.flops / rungs[-1].flops
    seconds += _seconds(work.run.path)
    add_row("Foretold and come true", "python -m benchmarks.scale", cells(full, outcomes, fitted, told, came, ratio, seconds), PAGE)  # fmt: skip
    error = came.loss / told.loss[-1] - 1
    print(
        f"came to {came.loss:.4f}: {100 * error:+.2f} % at {ratio:.1f} times the operations, {seconds:.0f} s of training"
    )
    return int(abs(error) > TOLERANCE)


def cells(
    full: FullRun,
    outcomes: list[Outcome],
    fitted: FittedLaw,
    told: Forecast,
    came: Outcome,
    ratio: float,
    seconds: float,
) -> dict[str, str]:
    """The row."""
    whole = full.rung
    curve = [abs(loss / _near(came, share) - 1) for share, loss in zip(told.shares, told.loss, strict=True)]
    best_known = min(outcomes, key=lambda one: one.loss).loss
    return {
        "ladder": f"{len(outcomes)} runs",
        "target": f"{whole.parameters / 1e6:.2f} M on {whole.tokens / 1e6:.2f} M ({whole.tokens / full.unique_tokens:.2f} passes)",
        "operations": f"{ratio:.1f} times",
        "scatter": f"{100 * fitted.scatter:.2f} %",
        "best of the ladder": f"{best_known:.3f}",
        "foretold": f"{told.loss[-1]:.3f} ({told.low[-1]:.3f} to {told.high[-1]:.3f})",
        "came": f"{came.loss:.3f}",
        "error": f"**{100 * (came.loss / told.loss[-1] - 1):+.2f} %**",
        "on the way, worst": f"{100 * max(curve):.1f} %",
        "training": f"{seconds:.0f} s",
    }


def _near(outcome: Outcome, share: float) -> float:
    return min(outcome.looks, key=lambda look: abs(look[0] - share))[1]


def _seconds(run: Path) -> float:
    summary: dict[str, Any] = json.loads((run / "pretrain" / "summary.json").read_text())
    return float(summary["stage_seconds"])


if __name__ == "__main__":
    sys.exit(main())
