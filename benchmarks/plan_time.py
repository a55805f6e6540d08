"""What `groundup plan` says a step takes, by its probe, beside the steps of the run that follows.

    python -m benchmarks.plan_time [--cases 0 4 10] [--rounds 3] [--page]

Probe and run take turns, `--rounds` times each, every one in a process of its own that is forked from one with the stack
imported; medians are compared. The recipes are those of `benchmarks/plan.py` with a quarter of the rows, one micro-batch a
lane and step; those in bf16 only where the processor has such products. Seconds are the processor's, all threads of the process together: what else the
machine does takes nothing from them, and waiting does not count. What was measured is kept in `runs/plan_time`; `--page`
writes all of it into docs/plan.md.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from benchmarks.plan import CASES, PAGE, name_of, run_in, sections
from benchmarks.results import replace_table, this_machine
from groundup.base.machine import has_fast_bf16, prepare_process
from groundup.model.config import ModelConfig
from groundup.stages.config import FinetuneConfig

NUMBERS = tuple(
    number for number, (_, changes) in enumerate(CASES) if changes.get("precision") != "bf16" or has_fast_bf16()
)
ROWS_SHARE = 4
TIMED_SECONDS, STEPS, MOST_STEPS = 2.0, 4, 60
"""A run has the first step, which warms up, and as many as fill the seconds."""
LIMIT = 0.10
KEPT = Path("runs/plan_time")
TIMED = "Time"


@dataclass(frozen=True)
class Timed:
    """A case's seconds a step, round by round."""

    number: int
    probed: list[float]
    taken: list[float]

    @property
    def error(self) -> float:
        """Median of the probes over that of the runs, less 1."""
        return statistics.median(self.probed) / statistics.median(self.taken) - 1

    def cells(self) -> tuple[str, ...]:
        """Its row."""
        medians = [f"{1000 * statistics.median(seconds):,.0f} ms" for seconds in (self.probed, self.taken)]
        return (light_name(self.number), *medians, f"{100 * self.error:+.1f} %")


def main() -> int:
    """Print a line a case and the median of the errors; exit 1 where it is above the limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_time", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--cases", type=int, nargs="*", default=NUMBERS, help="their numbers, from 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="write all that was kept into docs/plan.md")
    wanted = parser.parse_args()
    prepare_process()
    outcomes = []
    for number in wanted.cases:
        outcomes.append(keep(compare(number, rounds=wanted.rounds)))
        print(" | ".join(outcomes[-1].cells()), flush=True)
    if wanted.page:
        outcomes = kept()
        rows = (outcome.cells() for outcome in outcomes)
        said = f"`python -m benchmarks.plan_time --page`, {this_machine()}, {date.today()}: {words_of(outcomes)}"
        replace_table(TIMED, said, ("case", "planned step", "taken step", "error"), rows, PAGE)
    print(words_of(outcomes))
    return int(statistics.median(abs(outcome.error) for outcome in outcomes) > LIMIT)


def words_of(outcomes: list[Timed]) -> str:
    """The median, the worst, and how many are within the limit."""
    errors = sorted(abs(outcome.error) for outcome in outcomes)
    within = sum(error <= LIMIT for error in errors)
    median, worst = 100 * statistics.median(errors), 100 * errors[-1]
    return f"a step's time in {len(errors)} recipes: median {median:.1f} %, worst {worst:.1f} %, {within} within {100 * LIMIT:.0f} %"


def keep(outcome: Timed, folder: Path = KEPT) -> Timed:
    """Write a case's figures for `--page`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{outcome.number}.json").write_text(json.dumps(asdict(outcome)))
    return outcome


def kept(folder: Path = KEPT) -> list[Timed]:
    """All that was measured, in the order of the cases."""
    found = [Timed(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    return sorted(found, key=lambda outcome: outcome.number)


def light(number: int) -> tuple[ModelConfig, FinetuneConfig]:
    """A case with a quarter of its rows, one micro-batch a lane and step."""
    shape, config = sections(number)
    assert isinstance(config.micro_batch_rows, int) and isinstance(config.num_threads, int)
    rows = max(1, config.micro_batch_rows // ROWS_SHARE)
    changes = {"micro_batch_rows": rows, "batch_size_tokens": rows * config.num_threads * config.row_length}
    return shape, config.model_copy(update=changes)


def light_name(number: int) -> str:
    """The same in words."""
    rows = f"micro_batch_rows {CASES[number][1]['micro_batch_rows']}"
    return name_of(number).replace(rows, f"micro_batch_rows {light(number)[1].micro_batch_rows}")


def compare(number: int, *, rounds: int) -> Timed:
    """Probe and run, by turns."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["groundup.stages.finetune", "groundup.stages.pretrain", __name__])
    outcome = Timed(number, [], [])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for _ in range(rounds):
            outcome.probed.append(pool.submit(probed, number).result())
            outcome.taken.append(pool.submit(taken, number, steps_of(outcome.probed[-1])).result())
    return outcome


def steps_of(step_seconds: float) -> int:
    """Steps of the run beside a probe of so many seconds a step."""
    return max(STEPS, min(MOST_STEPS, 1 + round(TIMED_SECONDS / step_seconds)))


def probed(number: int) -> float:
    """Seconds of a step by what the plan's probe does."""
    from groundup.train.pace import measure_pace

    return measure_pace(*light(number), clock=time.process_time).step_seconds


def taken(number: int, num_steps: int) -> float:
    """Median seconds of a run's step, from the end of one update of the weights to that of the next."""
    shape, config = light(number)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = run_in(Path(folder), shape, config.model_copy(update={"duration": f"{num_steps} steps"}))
        update = run.engine.optimizer_step

        def timed_update(lr_multiplier: float) -> dict[str, float]:
            rates = update(lr_multiplier)
            ends.append(time.process_time())
            return rates

        run.engine.optimizer_step = timed_update  # type: ignore[method-assign]
        run.run()
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


if __name__ == "__main__":
    sys.exit(main())
