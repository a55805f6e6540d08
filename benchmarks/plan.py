"""What `groundup plan` says of memory beside what then happens: the peaks of small recipes, each in a fresh process.

    python -m benchmarks.plan [--only WORDS | --cases 0 4 10] [--page]

A peak is VmHWM of the process that trains, by the operating system. The cases that are `held out` were not looked at while
the formulas were written. What was measured is kept in `runs/plan`, so that the matrix can be gone through in pieces;
`--page` writes all of it into docs/plan.md. Time has a program of its own, `benchmarks/plan_time.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.footprint import SHAPES, RandomRows, peak_bytes
from benchmarks.results import replace_table, this_machine
from groundup.base.machine import prepare_process
from groundup.insight.probe import probe
from groundup.model.config import ModelConfig
from groundup.stages.config import FinetuneConfig
from groundup.train.footprint import Footprint

if TYPE_CHECKING:
    from groundup.train.run import TrainingRun

MICRO_BATCHES = 2
STEPS = 5
"""Of a run: by the fourth the heap has settled."""
KEPT = Path("runs/plan")
PAGE = Path("docs/plan.md")
MEASURED = "Measured"
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
HELD_OUT = (2, 3, 11, 14, 16, 20, 22, 23, 25)
FAST = (0, 4, 10)
"""Numbers of cases for a quick look."""


@dataclass(frozen=True)
class Outcome:
    """A case as it was planned and as it happened."""

    number: int
    name: str
    plan: Footprint
    measured: int

    @property
    def memory_error(self) -> float:
        """Planned over measured, less 1."""
        return self.plan.total / self.measured - 1

    @property
    def own_error(self) -> float:
        """The same without the stack itself."""
        return (self.plan.total - self.plan.process) / max(1, self.measured - self.plan.process) - 1

    def line(self) -> str:
        """For people."""
        return (
            f"{'held out' if self.number in HELD_OUT else '        '}  {self.name:<78} planned {self.plan.total / 1e6:6.0f} MB, "
            f"taken {self.measured / 1e6:6.0f}: {100 * self.memory_error:+5.1f} % (own {100 * self.own_error:+5.1f} %)"
        )


def main() -> int:
    """Print a line a case, the medians and the worst; exit 1 where they are above the limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", type=int, help="train this one here: what the program starts itself with")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--cases", type=int, nargs="+", help="their numbers, from 0; none are run with --cases -1")
    parser.add_argument("--page", action="store_true", help="write all that was kept into docs/plan.md")
    parser.add_argument("--words", action="store_true", help="memory by part")
    wanted = parser.parse_args()
    if wanted.case is not None:
        print(json.dumps(train(wanted.case)))
        return 0
    outcomes = []
    for number in range(len(CASES)):
        if wanted.only in name_of(number) and (wanted.cases is None or number in wanted.cases):
            outcomes.append(keep(compare(number)))
            print(outcomes[-1].line(), flush=True)
            if wanted.words:
                print(f"      {outcomes[-1].plan.words()}", flush=True)
    if wanted.page:
        outcomes = kept()
        write_page(outcomes)
    return int(not judge(outcomes))


def keep(outcome: Outcome, folder: Path = KEPT) -> Outcome:
    """Write a case's figures for `--page`."""
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
    said = f"`python -m benchmarks.plan --page`, {this_machine()}, {date.today()}: {words_of(outcomes)}"
    rows = []
    for outcome in outcomes:
        name = outcome.name + (" (held out)" if outcome.number in HELD_OUT else "")
        planned, taken = (f"{num_bytes / 1e6:,.0f} MB" for num_bytes in (outcome.plan.total, outcome.measured))
        rows.append((name, planned, taken, f"{100 * outcome.memory_error:+.1f} %"))
    replace_table(MEASURED, said, ("case", "planned", "taken", "error"), rows, page)


def judge(outcomes: list[Outcome]) -> bool:
    """Say the median and the worst; whether they are within 5 and 10 %."""
    print(words_of(outcomes))
    memory = [abs(outcome.memory_error) for outcome in outcomes]
    return statistics.median(memory) <= 0.05 and max(memory) <= 0.10


def words_of(outcomes: list[Outcome]) -> str:
    """Medians and worst of the errors."""
    memory = [abs(outcome.memory_error) for outcome in outcomes]
    held_out = [abs(outcome.memory_error) for outcome in outcomes if outcome.number in HELD_OUT] or memory
    return (
        f"memory of {len(memory)} recipes: median {100 * statistics.median(memory):.1f} %, worst {100 * max(memory):.1f} % "
        f"(held out: {100 * statistics.median(held_out):.1f} and {100 * max(held_out):.1f} %)"
    )


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


def compare(number: int) -> Outcome:
    """Plan a case, let it happen."""
    shape, config = sections(number)
    process = probe(shape, config, times=False).process
    command = [sys.executable, "-m", "benchmarks.plan", "--case", str(number)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(answer.stdout.splitlines()[-1])
    return Outcome(number, name_of(number), planned(shape, config, process, **run["resolved"]), run["peak"])


def planned(shape: ModelConfig, config: FinetuneConfig, process: int, **resolved: Any) -> Footprint:
    """The formula's answer."""
    from groundup.train.fit import training_of
    from groundup.train.footprint import footprint

    share_rows = config.batch_size_tokens // config.row_length
    return footprint(shape, training_of(config, share_rows=share_rows, **resolved), process=process)


def train(number: int) -> dict[str, Any]:
    """Train a case in this process, as a stage does: its peak, and what `auto` became."""
    prepare_process()
    import cyclopts  # noqa: F401  # as the command has it

    with tempfile.TemporaryDirectory() as folder:
        run = run_in(Path(folder), *sections(number))
        run.run()
    names = ("precision", "attention", "num_lanes")
    resolved = {name: getattr(run.resolved, name) for name in names} | {"rows": run.resolved.micro_batch_rows}
    return {"peak": peak_bytes(), "resolved": resolved}


def run_in(folder: Path, shape: ModelConfig, config: FinetuneConfig) -> "TrainingRun":
    """A run of random weights on random tokens that has not begun."""
    import torch

    import groundup.stages.finetune
    import groundup.stages.pretrain  # noqa: F401
    from groundup.adapters.lora import inject_lora
    from groundup.adapters.quantised import quantise_linears
    from groundup.base.log import Log
    from groundup.model.causal_lm import CausalLM
    from groundup.train.job import TrainingJob
    from groundup.train.run import TrainingRun

    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    if config.adapter == "qlora":
        quantise_linears(model, config.nf4_maker)
    if config.adapter != "none":
        inject_lora(model, config, seed=0)
    assert shape.vocab_size != "auto"
    job = TrainingJob(
        name="plan",
        config=config,
        seed=0,
        model=model,
        source=RandomRows(config.row_length, shape.vocab_size),
        validation={},
        folder=folder,
        log=Log(quiet=True),
        name_documents=lambda step: "",
        sample=lambda live, prompt: "",
    )
    return TrainingRun(job)


if __name__ == "__main__":
    sys.exit(main())
