"""The attention makers of a CPU against each other, forward and backward: milliseconds of processor time, and ratios of
medians.

Makers take turns, so that what else runs on the machine meets all of them. Walls are those of packed documents.
"""

import argparse
import itertools
import statistics
import time

from groundup.base.machine import num_cores, prepare_process

prepare_process()

import torch  # noqa: E402

from groundup.model.makers import MAKERS, AttentionMaker, walls_of  # noqa: E402
from groundup.model.segments import Segments  # noqa: E402

NAMES: tuple[AttentionMaker, ...] = ("sdpa", "chunked", "dense")
MEAN_DOCUMENT = 200


def main() -> int:
    """Print a line for each length, number of rows and window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="0: none")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for length, rows, window in itertools.product(options.lengths, options.rows, options.windows):
        seconds = measure(options, length, rows, window or None)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(
            f"{options.dtype}, {options.threads} threads, {rows} x {length}, window {window or 'none'}:  "
            + "  ".join(
                f"{name} {1e3 * median:.1f} ms (x{medians['sdpa'] / median:.2f})" for name, median in medians.items()
            )
        )
    return 0


def measure(options: argparse.Namespace, length: int, rows: int, window: int | None) -> dict[str, list[float]]:
    """Processor seconds of each maker's forward and backward pass, turn by turn; the first turn warms up."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    inputs = [
        torch.randn(rows, length, count, options.head_dim, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for count in heads
    ]
    segments = Segments.from_borders(torch.rand(rows, length, generator=generator) < 1 / MEAN_DOCUMENT)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.repeats + 1):
        for name in NAMES:
            walls = walls_of(name, segments, window, dtype)
            began = time.process_time()
            out_BHTK = MAKERS[name](*inputs, walls, window)
            torch.autograd.grad(out_BHTK.sum(), inputs)
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
