"""What `groundup plan` says beside what then happens: peak memory and time of small recipes, each in a fresh process.

    python -m benchmarks.plan [--only WORDS | --cases 0 4 10] [--rounds 3] [--page]

Memory is VmHWM of the process that trains, by the operating system. Time is the median step of probe and run, taken back
to back, `--rounds` times each; medians are compared. The cases that are `held out` were not looked at while the formulas were
written. What was measured is kept in `runs/plan`, so that the matrix can be gone through in pieces; `--page` writes all of
it into docs/plan.md.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.footprint import SHAPES, RandomRows, peak_bytes
from benchmarks.results import this_machine
from groundup.base.machine import prepare_process
from groundup.insight.probe import Probe, probe
from groundup.model.config import ModelConfig
from groundup.stages.config import FinetuneConfig
from groundup.train.footprint import Footprint

MICRO_BATCHES = 2
STEPS = 5
"""Of a run: the first one warms up."""
TIMED_SECONDS, MOST_STEPS = 2.0, 60
"""A run that is timed has as many steps as the probe takes in so long."""
KEPT = Path("runs/plan")
PAGE = Path("docs/plan.md")
MEASURED = "## Measured"
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tiny", {"micro_batch_rows": 8}),
    ("tiny", {"micro_batch_rows": 4, "num_threads": 2, "optimizer": "muon"}),
    ("tiny", {"row_length": 1024, "micro_batch_rows": 4}),
    ("tiny", {"row_length": 1024, "micro_batch_rows": 2, "attention": "dense"}),
    ("wide vocabulary", {"micro_batch_rows": 4}),
    ("wide vocabulary", {"micro_batch_rows": 4, "precision": "bf16", "attention": "chunked"}),
    ("wide vocabulary", {"micro_batch_rows": 8, "optimizer": "adamw_8bit"}),
    ("small", {"micro_batch_rows": 16}),
    ("small", {"micro_batch_rows": 4, "optimizer": "muon"}),
    ("small", {"micro_batch_rows": 4, "num_threads": 2}),
    ("small", {"micro_batch_rows": 4, "precision": "bf16"}),
    ("small", {"micro_batch_rows": 8, "precision": "bf16", "num_threads": 2, "optimizer": "muon"}),
    ("small", {"micro_batch_rows": 8, "activation_checkpointing": "block"}),
    ("small", {"micro_batch_rows": 8, "activation_checkpointing": "selective"}),
    ("small", {"micro_batch_rows": 8, "dropout": 0.1}),
    ("small", {"micro_batch_rows": 8, "adapter": "lora"}),
    ("small", {"micro_batch_rows": 8, "adapter": "qlora"}),
    ("small", {"micro_batch_rows": 2, "row_length": 1024, "attention": "chunked"}),
    ("peers", {"micro_batch_rows": 2, "optimizer": "adafactor"}),
    ("peers", {"micro_batch_rows": 2, "optimizer": "muon"}),
    ("peers", {"micro_batch_rows": 4, "row_length": 512}),
    ("peers", {"micro_batch_rows": 4, "row_length": 512, "activation_checkpointing": "block"}),
    ("peers", {"micro_batch_rows": 2, "optimizer": "adamw_8bit"}),
    ("peers", {"micro_batch_rows": 2, "precision": "bf16", "optimizer": "sgd"}),
    ("peers", {"micro_batch_rows": 4, "adapter": "lora", "precision": "bf16"}),
    ("peers", {"micro_batch_rows": 4, "adapter": "qlora"}),
    ("peers", {"micro_batch_rows": 1, "ema_decay": 0.99, "checkpoint_every": "2 steps"}),
    ("deep", {"micro_batch_rows": 2}),
    ("deep", {"micro_batch_rows": 4, "precision": "bf16", "checkpoint_every": "2 steps"}),
    ("experts", {"micro_batch_rows": 8}),
    ("experts", {"micro_batch_rows": 4, "optimizer": "muon"}),
)
HELD_OUT = (2, 3, 11, 14, 16, 20, 21, 22, 23, 25)
FAST = (0, 4, 10)
"""Numbers of cases for a quick look."""


@dataclass(frozen=True)
class Outcome:
    """A case as it was planned and as it happened."""

    number: int
    name: str
    plan: Footprint
    measured: int
    probed: list[float] = field(default_factory=list)
    """Seconds of a step, by the probe of each round."""
    taken: list[float] = field(default_factory=list)
    """The same by the run that followed it."""

    @property
    def memory_error(self) -> float:
        """Planned over measured, less 1."""
        return self.plan.total / self.measured - 1

    @property
    def own_error(self) -> float:
        """The same without the stack itself."""
        return (self.plan.total - self.plan.process) / max(1, self.measured - self.plan.process) - 1

    @property
    def probed_seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.probed)

    @property
    def taken_seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.taken)

    @property
    def time_error(self) -> float | None:
        """Of a step; None where it was not timed."""
        return self.probed_seconds / self.taken_seconds - 1 if self.taken else None

    def line(self) -> str:
        """For people."""
        time = ""
        if self.time_error is not None:
            time = f"  step {self.probed_seconds:.3f} s planned, {self.taken_seconds:.3f} taken: {100 * self.time_error:+.1f} %"
        return (
            f"{'held out' if self.number in HELD_OUT else '        '}  {self.name:<78} planned {self.plan.total / 1e6:6.0f} MB, "
            f"taken {self.measured / 1e6:6.0f}: {100 * self.memory_error:+5.1f} % (own {100 * self.own_error:+5.1f} %){time}"
        )


def main() -> int:
    """Print a line a case, the medians and the worst; exit 1 where they are above the limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", type=int, help="train this one here: what the program starts itself with")
    parser.add_argument("--steps", type=int, default=STEPS, help="of that training")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--cases", type=int, nargs="+", help="their numbers, from 0; none are run with --cases -1")
    parser.add_argument("--page", action="store_true", help="write all that was kept into docs/plan.md")
    parser.add_argument("--rounds", type=int, default=3, help="of probe and run, where time is compared; 0 for none")
    parser.add_argument("--words", action="store_true", help="memory by part")
    wanted = parser.parse_args()
    if wanted.case is not None:
        print(json.dumps(train(wanted.case, steps=wanted.steps)))
        return 0
    outcomes = []
    for number in range(len(CASES)):
        if wanted.only in name_of(number) and (wanted.cases is None or number in wanted.cases):
            outcomes.append(keep(compare(number, rounds=wanted.rounds)))
            print(outcomes[-1].line(), flush=True)
            if wanted.words:
                print(f"      {outcomes[-1].plan.words()}", flush=True)
    if wanted.page:
        outcomes = kept()
        write_page(outcomes)
    return int(not judge(outcomes))


def keep(outcome: Outcome, folder: Path = KEPT) -> Outcome:
    """Write a case's figures for `--page`; one that was not timed now keeps the times it had."""
    before = next((other for other in kept(folder) if other.number == outcome.number), None)
    if before is not None and not outcome.taken:
        outcome = replace(outcome, probed=before.probed, taken=before.taken)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{outcome.number}.json").write_text(json.dumps(asdict(outcome)))
    return outcome


def kept(folder: Path = KEPT) -> list[Outcome]:
    """All that was measured, in the order of the cases."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    outcomes = [Outcome(**(values | {"plan": Footprint(**values["plan"])})) for values in found]
    return sorted(outcomes, key=lambda outcome: outcome.number)


def write_page(outcomes: list[Outcome], page: Path = PAGE) -> None:
    """Replace the page's table of cases."""
    lines = [
        MEASURED,
        "",
        f"`python -m benchmarks.plan --page`, {this_machine()}, {date.today()}: {words_of(outcomes)}",
    ]
    lines += ["", "| case | planned | taken | error | planned step | taken step | error |", f"|{'---|' * 7}"]
    for outcome in outcomes:
        cells = [outcome.name + (" (held out)" if outcome.number in HELD_OUT else "")]
        cells += [f"{num_bytes / 1e6:,.0f} MB" for num_bytes in (outcome.plan.total, outcome.measured)]
        cells += [f"{100 * outcome.memory_error:+.1f} %"]
        if outcome.time_error is None:
            cells += [""] * 3
        else:
            cells += [f"{1000 * seconds:,.0f} ms" for seconds in (outcome.probed_seconds, outcome.taken_seconds)]
            cells += [f"{100 * outcome.time_error:+.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    before, _, after = page.read_text(encoding="utf-8").partition(f"{MEASURED}\n")
    rest = after.partition("\n## ")
    page.write_text(before.rstrip() + "\n\n" + "\n".join(lines) + "\n" + "".join(rest[1:]), encoding="utf-8")


def judge(outcomes: list[Outcome]) -> bool:
    """Say the medians and the worst; whether they are within 5, 10 and 10 %."""
    print(words_of(outcomes))
    memory = [abs(outcome.memory_error) for outcome in outcomes]
    times = [abs(outcome.time_error) for outcome in outcomes if outcome.time_error is not None]
    return statistics.median(memory) <= 0.05 and max(memory) <= 0.10 and (not times or statistics.median(times) <= 0.10)


def words_of(outcomes: list[Outcome]) -> str:
    """Medians and worst of the errors."""
    memory = [abs(outcome.memory_error) for outcome in outcomes]
    held_out = [abs(outcome.memory_error) for outcome in outcomes if outcome.number in HELD_OUT] or memory
    times = [abs(outcome.time_error) for outcome in outcomes if outcome.time_error is not None]
    text = (
        f"memory of {len(memory)} recipes: median {100 * statistics.median(memory):.1f} %, worst {100 * max(memory):.1f} % "
        f"(held out: {100 * statistics.median(held_out):.1f} and {100 * max(held_out):.1f} %)"
    )
    if times:
        text += f"; time of {len(times)} recipes: median {100 * statistics.median(times):.1f} %, worst {100 * max(times):.1f} %"
    return text


def name_of(number: int) -> str:
    """A case in words."""
    shape, changes = CASES[number]
    return ", ".join([shape, *(f"{name} {value}" for name, value in changes.items())])


def sections(number: int, *, steps: int = STEPS) -> tuple[ModelConfig, FinetuneConfig]:
    """Shape and training section of a case."""
    name, changes = CASES[number]
    row_length = changes.get("row_length", 256)
    batch_rows = MICRO_BATCHES * changes["micro_batch_rows"] * changes.get("num_threads", 1)
    values = {
        **{"duration": f"{steps} steps", "row_length": row_length, "batch_size_tokens": batch_rows * row_length},
        **{"device": "cpu", "precision": "fp32", "attention": "sdpa", "compile": False, "optimizer": "adamw"},
        **{"num_threads": 1, "data": "", "peak_flops": None},
    }
    shape = ModelConfig(num_attention_heads=8, num_key_value_heads=4, head_dim=64, **SHAPES[name])
    return shape, FinetuneConfig.model_validate(values | changes)


def compare(number: int, *, rounds: int) -> Outcome:
    """Plan a case, let it happen; with rounds, time probe and run by turns."""
    shape, config = sections(number)
    probes: list[Probe] = []
    runs: list[dict[str, Any]] = []
    for _ in range(max(1, rounds)):
        probes.append(probe(shape, config, times=rounds > 0))
        steps = steps_of(probes[-1].step_seconds)
        command = [sys.executable, "-m", "benchmarks.plan", "--case", str(number), "--steps", str(steps)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(answer.stdout.splitlines()[-1]))
    process = round(statistics.median(probe.process for probe in probes))
    probed = [probe.step_seconds for probe in probes if probe.step_seconds is not None]
    return Outcome(
        number,
        name_of(number),
        planned(shape, config, process, **runs[0]["resolved"]),
        round(statistics.median(run["peak"] for run in runs)),
        probed,
        [run["seconds"] for run in runs] if probed else [],
    )


def steps_of(step_seconds: float | None) -> int:
    """Steps of a run that is compared with a probe: where steps are short, as many as the probe takes."""
    if step_seconds is None:
        return STEPS
    return max(STEPS, min(MOST_STEPS, 1 + math.ceil(TIMED_SECONDS / step_seconds)))


def planned(shape: ModelConfig, config: FinetuneConfig, process: int, **resolved: Any) -> Footprint:
    """The formula's answer."""
    from groundup.train.fit import training_of
    from groundup.train.footprint import footprint

    share_rows = config.batch_size_tokens // config.row_length
    return footprint(shape, training_of(config, share_rows=share_rows, **resolved), process=process)


def train(number: int, *, steps: int) -> dict[str, Any]:
    """Train a case in this process, as a stage does: its peak, its median step, and what `auto` became."""
    prepare_process()
    import cyclopts  # noqa: F401  # as the command has it
    import torch

    import groundup.stages.finetune
    import groundup.stages.pretrain  # noqa: F401
    from groundup.adapters.lora import inject_lora
    from groundup.adapters.quantised import quantise_linears
    from groundup.base.log import Log
    from groundup.model.causal_lm import CausalLM
    from groundup.train.job import TrainingJob
    from groundup.train.run import TrainingRun

    shape, config = sections(number, steps=steps)
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker)
    if config.adapter != "none":
        inject_lora(model, config, seed=0)
    assert shape.vocab_size != "auto"
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(
            name="plan",
            config=config,
            seed=0,
            model=model,
            source=RandomRows(config.row_length, shape.vocab_size),
            validation={},
            folder=Path(folder),
            log=Log(quiet=True),
            name_documents=lambda step: "",
            sample=lambda live, prompt: "",
        )
        run = TrainingRun(job)
        run.run()
        ends = [
            json.loads(line)["elapsed_seconds"] for line in (Path(folder) / "timing.jsonl").read_text().splitlines()
        ]
    taken = [after - before for before, after in itertools.pairwise(ends)]
    names = ("precision", "attention", "num_lanes")
    resolved = {name: getattr(run.resolved, name) for name in names} | {"rows": run.resolved.micro_batch_rows}
    return {"peak": peak_bytes(), "seconds": statistics.median(taken), "resolved": resolved}


if __name__ == "__main__":
    sys.exit(main())
