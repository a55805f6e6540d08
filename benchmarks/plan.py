"""What `groundup plan` says beside what then happens: peak memory and time of small recipes, each in a fresh process.

    python -m benchmarks.plan [--only WORDS] [--rounds 3]

Memory is VmHWM of the process that trains, by the operating system. Time is the median step of probe and run, taken back
to back, `--rounds` times each; medians are compared. The cases that are `held out` were not looked at while the formulas were
written.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.footprint import SHAPES, RandomRows, peak_bytes
from groundup.base.machine import prepare_process
from groundup.insight.probe import Probe, probe
from groundup.model.config import ModelConfig
from groundup.stages.config import FinetuneConfig
from groundup.train.footprint import Footprint

MICRO_BATCHES = 2
STEPS = 5
"""Of a run: the first one warms up."""
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
TIMED_EVERY = 4
"""Of so many cases one is timed."""


@dataclass(frozen=True)
class Outcome:
    """A case as it was planned and as it happened."""

    number: int
    name: str
    plan: Footprint
    measured: int
    probed_seconds: float | None = None
    run_seconds: float | None = None

    @property
    def memory_error(self) -> float:
        """Planned over measured, less 1."""
        return self.plan.total / self.measured - 1

    @property
    def own_error(self) -> float:
        """The same without the stack itself."""
        return (self.plan.total - self.plan.process) / max(1, self.measured - self.plan.process) - 1

    @property
    def time_error(self) -> float | None:
        """Of a step."""
        if self.probed_seconds is None or self.run_seconds is None:
            return None
        return self.probed_seconds / self.run_seconds - 1

    def line(self) -> str:
        """For people."""
        time = ""
        if self.run_seconds is not None and self.probed_seconds is not None and self.time_error is not None:
            time = f"  step {self.probed_seconds:.3f} s planned, {self.run_seconds:.3f} taken: {100 * self.time_error:+.1f} %"
        return (
            f"{'held out' if self.number in HELD_OUT else '        '}  {self.name:<78} planned {self.plan.total / 1e6:6.0f} MB, "
            f"taken {self.measured / 1e6:6.0f}: {100 * self.memory_error:+5.1f} % (own {100 * self.own_error:+5.1f} %){time}"
        )


def main() -> int:
    """Print a line a case, the medians and the worst; exit 1 where they are above the limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", type=int, help="train this one here: what the program starts itself with")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=3, help="of probe and run, where time is compared; 0 for none")
    parser.add_argument("--words", action="store_true", help="memory by part")
    wanted = parser.parse_args()
    if wanted.case is not None:
        print(json.dumps(train(wanted.case)))
        return 0
    outcomes = []
    for number in range(len(CASES)):
        if wanted.only in name_of(number):
            rounds = wanted.rounds if number % TIMED_EVERY == 0 else 0
            outcomes.append(compare(number, rounds=rounds))
            print(outcomes[-1].line(), flush=True)
            if wanted.words:
                print(f"      {outcomes[-1].plan.words()}", flush=True)
    return int(not judge(outcomes))


def judge(outcomes: list[Outcome]) -> bool:
    """Say the medians and the worst; whether they are within 5, 10 and 10 %."""
    memory = [abs(outcome.memory_error) for outcome in outcomes]
    held_out = [abs(outcome.memory_error) for outcome in outcomes if outcome.number in HELD_OUT] or memory
    times = [abs(outcome.time_error) for outcome in outcomes if outcome.time_error is not None]
    print(
        f"memory of {len(memory)} recipes: median {100 * statistics.median(memory):.1f} %, worst {100 * max(memory):.1f} % "
        f"(held out: {100 * statistics.median(held_out):.1f} and {100 * max(held_out):.1f} %)"
    )
    if times:
        print(
            f"time of {len(times)} recipes: median {100 * statistics.median(times):.1f} %, worst {100 * max(times):.1f} %"
        )
    return statistics.median(memory) <= 0.05 and max(memory) <= 0.10 and (not times or statistics.median(times) <= 0.10)


def name_of(number: int) -> str:
    """A case in words."""
    shape, changes = CASES[number]
    return ", ".join([shape, *(f"{name} {value}" for name, value in changes.items())])


def sections(number: int) -> tuple[ModelConfig, FinetuneConfig]:
    """Shape and training section of a case."""
    name, changes = CASES[number]
    row_length = changes.get("row_length", 256)
    batch_rows = MICRO_BATCHES * changes["micro_batch_rows"] * changes.get("num_threads", 1)
    values = {
        **{"duration": f"{STEPS} steps", "row_length": row_length, "batch_size_tokens": batch_rows * row_length},
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
        command = [sys.executable, "-m", "benchmarks.plan", "--case", str(number)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(answer.stdout.splitlines()[-1]))
    process = round(statistics.median(probe.process for probe in probes))
    seconds = [probe.step_seconds for probe in probes if probe.step_seconds is not None]
    return Outcome(
        number,
        name_of(number),
        planned(shape, config, process, **runs[0]["resolved"]),
        round(statistics.median(run["peak"] for run in runs)),
        statistics.median(seconds) if seconds else None,
        statistics.median(run["seconds"] for run in runs) if seconds else None,
    )


def planned(shape: ModelConfig, config: FinetuneConfig, process: int, **resolved: Any) -> Footprint:
    """The formula's answer."""
    from groundup.train.fit import training_of
    from groundup.train.footprint import footprint

    share_rows = config.batch_size_tokens // config.row_length
    return footprint(shape, training_of(config, share_rows=share_rows, **resolved), process=process)


def train(number: int) -> dict[str, Any]:
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

    shape, config = sections(number)
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
    steps = [after - before for before, after in itertools.pairwise(ends)]
    names = ("precision", "attention", "num_lanes")
    resolved = {name: getattr(run.resolved, name) for name in names} | {"rows": run.resolved.micro_batch_rows}
    return {"peak": peak_bytes(), "seconds": statistics.median(steps), "resolved": resolved}


if __name__ == "__main__":
    sys.exit(main())
