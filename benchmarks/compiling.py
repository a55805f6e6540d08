"""What compiling wins and costs on this machine: steps by wall time, eager and compiled with a cold cache.

    python -m benchmarks.compiling [--shape 30M] [--minutes 10]

The eager run trains for so many minutes, the compiled one the same steps from an empty cache. Beside the time that each
needs for what eager does in 30 s, 3 and 10 minutes stands what `compile: auto` takes for a run of that length.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile

if "compiled" in sys.argv:  # torch reads the folder of its cache when it is first imported
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="groundup-cold-")

from groundup.base.machine import has_fast_bf16, prepare_process

prepare_process()

import numpy as np  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.results import add_row  # noqa: E402
from benchmarks.sides import train_ours  # noqa: E402
from benchmarks.turns import Figures, measure_in_turn, run_worker  # noqa: E402
from groundup.data.packing import PackedDocuments  # noqa: E402
from groundup.model.causal_lm import CausalLM  # noqa: E402
from groundup.train.config import TrainConfig  # noqa: E402
from groundup.train.resolve import resolve  # noqa: E402

PROBE_STEPS, WARM_STEPS = 6, 2
MARKS = (30.0, 180.0, 600.0)
"""Seconds of eager training."""


def config_of(wanted: argparse.Namespace, num_steps: int, compiles: bool | str) -> TrainConfig:
    """The section of a run."""
    rows, length = (material.ROWS, material.ROW_LENGTH) if wanted.shape != "1M" else (8, 256)  # as in the quickstart
    sizes = {"row_length": length, "batch_size_tokens": rows * length, "duration": f"{num_steps} steps"}
    return TrainConfig.model_validate(sizes | {"optimizer": "adamw", "compile": compiles})


def timeline(wanted: argparse.Namespace, *, compiles: bool) -> Figures:
    """Seconds since the start of the run at the end of each step."""
    work = material.prepared(wanted.source, wanted.vocab)
    shape = material.shape_of(wanted.shape, wanted.vocab)
    num_steps = wanted.steps

    def train(count: int) -> list[float]:
        config = config_of(wanted, count, compiles)
        source = PackedDocuments(material.store_of(work, "train"), row_length=config.row_length, seed=0)
        return [line["elapsed_seconds"] for line in train_ours(config, shape, source, seed=0)[1]]

    if num_steps == 0:
        num_steps = max(20, int(60 * wanted.minutes / statistics.median(np.diff(train(PROBE_STEPS))[WARM_STEPS:])))
    return {"seconds": [round(one, 3) for one in train(num_steps)]}


def compiled(wanted: argparse.Namespace) -> Figures:
    """From an empty cache."""
    figures = timeline(wanted, compiles=True)
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return figures


def main() -> int:
    """One row a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30M", choices=tuple(material.SHAPES))
    parser.add_argument("--source", default=material.default_source())
    parser.add_argument("--vocab", type=int, default=6400)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--worker", choices=("eager", "compiled"))
    wanted = parser.parse_args()
    if run_worker({"eager": lambda asked: timeline(asked, compiles=False), "compiled": compiled}, wanted):
        return 0
    material.prepared(wanted.source, wanted.vocab)
    command = ["benchmarks.compiling", "--shape", wanted.shape, "--source", wanted.source, "--vocab", str(wanted.vocab)]
    command += ["--minutes", str(wanted.minutes)]
    eager = measure_in_turn({"eager": [*command, "--worker", "eager"]}, 1)["eager"][0]["seconds"]
    again = [*command, "--steps", str(len(eager)), "--worker", "compiled"]
    compiled_seconds = measure_in_turn({"compiled": again}, 1)["compiled"][0]["seconds"]
    cells = cells_of(wanted, eager, compiled_seconds)
    add_row("Compiling", "python -m benchmarks.compiling", cells)
    print("\n".join(f"{name}: {value}" for name, value in cells.items()))
    return 0


def cells_of(wanted: argparse.Namespace, eager: list[float], compiled_seconds: list[float]) -> dict[str, str]:
    """What the first step cost, what a later one wins, and for each mark both times and what `auto` takes."""
    step = {
        name: statistics.median(np.diff(found)) for name, found in (("eager", eager), ("compiled", compiled_seconds))
    }
    cells = {
        "shape": f"{wanted.shape}, {'bf16' if has_fast_bf16() else 'fp32'}",
        "first step s, eager / compiled": f"{eager[0]:.1f} / {compiled_seconds[0]:.1f}",
        "later step s": f"{step['eager']:.3f} / {step['compiled']:.3f}",
    }
    for mark in MARKS:
        num_steps = int(np.searchsorted(eager, mark, side="right"))
        if num_steps < 1 or eager[-1] < 0.9 * mark:
            cells[f"{mark:g} s of eager steps: compiled needs"] = "–"
            continue
        needed = compiled_seconds[num_steps - 1] / eager[num_steps - 1]
        takes = auto_compiles(wanted, num_steps)
        lost = (needed if takes else 1.0) / min(needed, 1.0) - 1
        cells[f"{mark:g} s of eager steps: compiled needs"] = (
            f"{needed:.2f} of it; auto: {'compiled' if takes else 'eager'}, {100 * lost:.0f} % over the better"
        )
    return cells


def auto_compiles(wanted: argparse.Namespace, num_steps: int) -> bool:
    """What a recipe with `compile: auto` takes for a run of so many steps."""
    model = CausalLM(material.shape_of(wanted.shape, wanted.vocab))
    config = config_of(wanted, num_steps, "auto")
    return resolve(config, rows_per_epoch=10**6, matrix_parameters=model.num_active_parameters(min_dims=2)).compile


if __name__ == "__main__":
    sys.exit(main())
