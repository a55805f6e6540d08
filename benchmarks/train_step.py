"""The train step beside transformers Trainer: tokens/s, share of the machine's matrix peak, peak memory, first step.

AdamW on both sides, the same shape, rows and precision (bf16 where the processor multiplies it fast, else fp32). The
Trainer runs at each of its settings (micro-batch, torch.compile) and the fastest counts.
"""

import argparse
import resource
import statistics
import sys
import time

from benchmarks.turns import Figures, measure_in_turn, median_of, prepare, ratios, run_worker
from groundup.base.machine import has_compiler, has_fast_bf16

prepare()

import torch  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.results import add_row  # noqa: E402
from benchmarks.sides import train_ours, train_theirs  # noqa: E402
from groundup.data.packing import PackedDocuments  # noqa: E402
from groundup.model.config import ModelConfig  # noqa: E402
from groundup.train.config import TrainConfig  # noqa: E402

WARM_STEPS = 2


def ours(wanted: argparse.Namespace) -> Figures:
    """Our loop: packed rows with walls, its own choices for everything that is `auto`."""
    work = material.prepared(wanted.source, wanted.vocab)
    shape = material.shape_of(wanted.shape[0], wanted.vocab)
    config = TrainConfig(
        duration=f"{wanted.steps + WARM_STEPS} steps",
        row_length=material.ROW_LENGTH,
        batch_size_tokens=material.ROW_LENGTH * material.ROWS,
        optimizer="adamw",
        compile=wanted.compile,
    )
    source = PackedDocuments(material.store_of(work, "train"), row_length=material.ROW_LENGTH, seed=0)
    before = matrix_peak(shape)
    _, timing = train_ours(config, shape, source, seed=0)
    parts = ("data_seconds", "forward_backward_seconds", "optimizer_seconds")
    return figures_of([sum(line[part] for part in parts) for line in timing], shape, (before + matrix_peak(shape)) / 2)


def trainer(wanted: argparse.Namespace) -> Figures:
    """transformers Trainer on rows of the same tokens."""
    work = material.prepared(wanted.source, wanted.vocab)
    rows = material.rows_of(material.store_of(work, "train"), material.ROW_LENGTH, seed=0)
    shape = material.shape_of(wanted.shape[0], wanted.vocab)
    before = matrix_peak(shape)
    _, seconds = train_theirs(
        shape,
        rows,
        seed=0,
        micro_rows=wanted.micro,
        batch_rows=material.ROWS,
        max_steps=wanted.steps + WARM_STEPS,
        learning_rate=1e-3,
        torch_compile=wanted.compile,
    )
    return figures_of(seconds, shape, (before + matrix_peak(shape)) / 2)


def figures_of(seconds: list[float], shape: ModelConfig, peak: float) -> Figures:
    """A worker's figures from the seconds of its steps."""
    usual = statistics.median(seconds[WARM_STEPS:])
    rate = material.ROW_LENGTH * material.ROWS / usual
    return {
        "tokens_per_second": rate,
        "peak_fraction": rate * material.matrix_flops_per_token(shape, material.ROW_LENGTH) / peak,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "first_step_seconds": seconds[0],
    }


def matrix_peak(shape: ModelConfig) -> float:
    """FLOP/s of the fastest of the step's own products on all cores: 2 rows × columns × depth over the least time."""
    dtype = torch.bfloat16 if has_fast_bf16() else torch.float32
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    material.use_all_cores()
    best = 0.0
    for num_rows in (1024, 2048, 4096):
        x, weight = torch.randn(num_rows, hidden, dtype=dtype), torch.randn(hidden, intermediate, dtype=dtype)
        for _ in range(6):
            began = time.perf_counter()
            x @ weight
            best = max(best, 2 * num_rows * hidden * intermediate / (time.perf_counter() - began))
    return best


def main() -> int:
    """Measure, print the ratios, add a row to docs/benchmarks.md for each shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["5M", "30M", "100M"], choices=tuple(material.SHAPES))
    parser.add_argument("--source", default=material.default_source())
    parser.add_argument("--vocab", type=int, default=6400)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micros", default="4,16", help="micro-batches of the Trainer to try")
    parser.add_argument("--compile", action="store_true", help="in a worker: compile")
    parser.add_argument(
        "--eager", action="store_true", help="compile neither side; else the Trainer is tried both ways"
    )
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--worker", choices=("ours", "trainer"))
    wanted = parser.parse_args()
    if run_worker({"ours": ours, "trainer": trainer}, wanted):
        return 0
    material.prepared(wanted.source, wanted.vocab)
    for shape in wanted.shape:
        cells = compared(shape, wanted)
        add_row("Train step", "python -m benchmarks.train_step", cells)
        print("\n".join(f"{name}: {value}" for name, value in cells.items()))
    return 0


def compared(shape: str, wanted: argparse.Namespace) -> dict[str, str]:
    """One shape: ours and the Trainer at each of its settings, in turn."""
    common = ["benchmarks.train_step", "--shape", shape, "--source", wanted.source]
    common += ["--vocab", str(wanted.vocab), "--steps", str(wanted.steps)]
    compiled = ["--compile"] if not wanted.eager and has_compiler() else []
    workers = {"ours": [*common, "--worker", "ours", *compiled]}
    for micro in wanted.micros.split(","):
        for extra in [[], compiled] if compiled else [[]]:
            name = f"Trainer, {micro} rows{', compiled' if extra else ''}"
            workers[name] = [*common, "--worker", "trainer", "--micro", micro, *extra]
    found = measure_in_turn(workers, wanted.rounds)
    best = max((name for name in found if name != "ours"), key=lambda name: median_of(found[name], "tokens_per_second"))
    share = ratios(found["ours"], found[best], "tokens_per_second")

    def both(figure: str, form: str) -> str:
        return " / ".join(format(median_of(found[name], figure), form) for name in ("ours", best))

    return {
        "shape": f"{shape}, {'bf16' if has_fast_bf16() else 'fp32'}{', compiled' if compiled else ''}",
        "tokens/s, ours": f"{median_of(found['ours'], 'tokens_per_second'):,.0f}",
        f"Trainer (best of {len(found) - 1} settings)": f"{median_of(found[best], 'tokens_per_second'):,.0f} ({best})",
        "ratio of the rounds": f"**{statistics.median(share):.2f}** ({', '.join(f'{one:.2f}' for one in share)})",
        "share of the matrix peak": both("peak_fraction", ".0%"),
        "peak memory GB": both("peak_memory_gb", ".2f"),
        "first step s": both("first_step_seconds", ".1f"),
    }


if __name__ == "__main__":
    sys.exit(main())
