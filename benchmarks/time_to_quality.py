"""Validation bits per byte against wall time: groundup's default optimizer beside transformers Trainer with AdamW and cosine.

The same shape, vocabulary, text and held-out rows on both sides. A run is given minutes of training; it times a few steps
first and trains as many as fit, its schedule ending with them. The Trainer's rate is swept; ours also runs at shares of
the minutes, and the smallest share whose result is no worse than the Trainer's best is what it needs. Each finished run
is a line of a journal: the same command goes on where it was stopped.
"""

import argparse
import json
import math
import statistics
import sys
import time

from benchmarks.turns import Figures, measure_in_turn, prepare, run_worker

prepare()

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.results import add_row, this_machine  # noqa: E402
from benchmarks.sides import train_ours, train_theirs  # noqa: E402
from groundup.data.packing import PackedDocuments  # noqa: E402
from groundup.model.causal_lm import CausalLM  # noqa: E402
from groundup.stages.starter import aimed  # noqa: E402
from groundup.stages.work import Work  # noqa: E402
from groundup.train.config import TrainConfig  # noqa: E402
from groundup.train.validation import validation_figures  # noqa: E402

PROBE_STEPS, WARM_STEPS = 12, 4
ROW_LENGTH, BATCH_TOKENS = 256, 2048
VALIDATION_ROWS = 256
JOURNAL = material.FOLDER / "time_to_quality.jsonl"
SHARES = (0.4, 0.5, 0.6, 0.8, 1.0)
RATES = (1e-3, 3e-3, 1e-2)


def ours(wanted: argparse.Namespace) -> Figures:
    """What `groundup init` writes: Muon and AdamW at `lr: auto` with linear decay, packed rows with walls; up to 256 wide its
    heads that begin with their eyes on a place, in place of the norms over q and k (0.04 % more parameters)."""
    work = material.prepared(wanted.source, wanted.vocab)
    shape = aimed(material.shape_of(wanted.shape, wanted.vocab))
    source = PackedDocuments(material.store_of(work, "train"), row_length=ROW_LENGTH, seed=wanted.seed)

    def train(num_steps: int) -> tuple[CausalLM, list[float]]:
        config = TrainConfig(
            duration=f"{num_steps} steps",
            row_length=ROW_LENGTH,
            batch_size_tokens=BATCH_TOKENS,
            lr="auto",
            muon_lr="auto",
            muon_weight_decay="auto",
            schedule="linear",
        )
        model, timing = train_ours(config, shape, source, seed=wanted.seed)
        return model, [line["elapsed_seconds"] for line in timing]

    _, elapsed = train(PROBE_STEPS)
    a_step = statistics.median(np.diff(elapsed)[WARM_STEPS:])
    model, elapsed = train(max(20, int(60 * wanted.minutes / a_step)))
    return measured(model, work, wanted, elapsed[-1], len(elapsed))


def trainer(wanted: argparse.Namespace) -> Figures:
    """AdamW with warmup and cosine in transformers Trainer, fused."""
    work = material.prepared(wanted.source, wanted.vocab)
    rows = material.rows_of(material.store_of(work, "train"), ROW_LENGTH, seed=wanted.seed)
    shape = material.shape_of(wanted.shape, wanted.vocab)

    def train(num_steps: int) -> tuple[nn.Module, list[float]]:
        num_rows = BATCH_TOKENS // ROW_LENGTH
        return train_theirs(
            shape,
            rows,
            seed=wanted.seed,
            micro_rows=num_rows,
            batch_rows=num_rows,
            max_steps=num_steps,
            learning_rate=wanted.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, num_steps // 50),
            weight_decay=0.1,
            adam_beta2=0.95,
            torch_compile=wanted.compile_theirs,
        )

    _, seconds = train(PROBE_STEPS)
    num_steps = max(20, int(60 * wanted.minutes / statistics.median(seconds[WARM_STEPS:])))
    began = time.perf_counter()
    model, _ = train(num_steps)
    elapsed_seconds = time.perf_counter() - began
    same = CausalLM(shape)
    same.load_state_dict(model.state_dict())
    return measured(same, work, wanted, elapsed_seconds, num_steps)


def measured(model: CausalLM, work: Work, wanted: argparse.Namespace, seconds: float, num_steps: int) -> Figures:
    """Bits per byte of the held-out rows."""
    held_out = PackedDocuments(material.store_of(work, "validation"), row_length=ROW_LENGTH, seed=0)
    figures = validation_figures(
        model.float(),
        held_out,
        max_rows=VALIDATION_ROWS,
        micro_batch_rows=16,
        device="cpu",
        token_bytes=np.load(work.path("tokenizer") / "token_bytes.npy"),
    )
    return {
        "who": wanted.worker,
        "shape": wanted.shape,
        "minutes": wanted.minutes,
        "lr": wanted.lr,
        "seed": wanted.seed,
        "steps": num_steps,
        "seconds": seconds,
        "bits_per_byte": figures["bits_per_byte"],
    }


def planned(minutes: float, rates: list[float], shares: list[float], seeds: int) -> list[dict[str, float | str]]:
    """The runs of a budget: the Trainer's sweep, and ours at shares of the minutes."""
    runs: list[dict[str, float | str]] = []
    for seed in range(seeds):
        runs += [{"worker": "trainer", "minutes": minutes, "lr": rate, "seed": seed} for rate in rates]
        runs += [{"worker": "ours", "minutes": round(minutes * share, 3), "lr": 0.0, "seed": seed} for share in shares]
    return runs


def main() -> int:
    """Make the runs that the journal lacks; then a row of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_quality", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--shape", default="5M", choices=tuple(material.SHAPES))
    parser.add_argument("--source", default=material.default_source())
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="the Trainer's learning rates")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the minutes that ours is given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--compile-theirs", action="store_true", help="the Trainer compiled; ours as compile: auto says"
    )
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=("ours", "trainer"))
    wanted = parser.parse_args()
    if run_worker({"ours": ours, "trainer": trainer}, wanted):
        return 0
    material.prepared(wanted.source, wanted.vocab)
    rates, shares = ([float(one) for one in text.split(",")] for text in (wanted.rates, wanted.shares))
    done = [json.loads(line) for line in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []
    found: list[Figures] = []
    extra = ["--compile-theirs"] if wanted.compile_theirs else []
    for run in planned(wanted.minutes, rates, shares, wanted.seeds):
        name = {**run, "shape": wanted.shape, "source": wanted.source, "vocab": wanted.vocab, "machine": this_machine()}
        if extra and run["worker"] == "trainer":
            name["compiled"] = True
        earlier = [entry["figures"] for entry in done if entry["run"] == name]
        if not earlier:
            common = ["--shape", wanted.shape, "--source", wanted.source, "--vocab", str(wanted.vocab)]
            options = [part for key, value in run.items() for part in (f"--{key}", str(value))]
            earlier = measure_in_turn({"run": ["benchmarks.time_to_quality", *common, *options, *extra]}, 1)["run"]
            with JOURNAL.open("a") as file:
                file.write(json.dumps({"run": name, "figures": earlier[0]}) + "\n")
        found += earlier
    add_row("Time to quality", "python -m benchmarks.time_to_quality", cells_of(found, wanted, shares))
    return 0


def cells_of(found: list[Figures], wanted: argparse.Namespace, shares: list[float]) -> dict[str, str]:
    """The row: the Trainer's best rate, ours at each share, and the smallest share that is no worse."""

    def mean(who: str, key: str, value: float, figure: str = "bits_per_byte") -> float:
        return statistics.mean(run[figure] for run in found if run["who"] == who and run[key] == value)

    rates = sorted({run["lr"] for run in found if run["who"] == "trainer"})
    best = min(rates, key=lambda rate: mean("trainer", "lr", rate))
    theirs = mean("trainer", "lr", best)
    # of the time that the Trainer took: a run that compiles is sooner done than its eager steps foretold
    whole = mean("trainer", "lr", best, "seconds")
    reached = {}
    for minutes in (round(wanted.minutes * share, 3) for share in shares):
        reached[mean("ours", "minutes", minutes, "seconds") / whole] = mean("ours", "minutes", minutes)
    enough = min((share for share, figure in reached.items() if figure <= theirs), default=math.inf)
    return {
        "shape, minutes": f"{wanted.shape}, {wanted.minutes:g} min, {wanted.seeds} seed{'s' * (wanted.seeds > 1)}"
        + (", Trainer compiled" if wanted.compile_theirs else ""),
        "Trainer by rate": ", ".join(f"{rate:g}: {mean('trainer', 'lr', rate):.3f}" for rate in rates),
        "ours by share of the time": ", ".join(f"{share:.0%}: {figure:.3f}" for share, figure in reached.items()),
        "share ours needs": f"**{enough:.0%}**" if enough <= 1 else "more than 100 %",
    }


if __name__ == "__main__":
    sys.exit(main())
