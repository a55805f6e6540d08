"""What single techniques of training cost and gain, each beside the way without it.

    python -m benchmarks.techniques [--kind loss] [--kind experts] ...

Every side runs in a process of its own, in turn with the others of its kind, on the same random rows. The last column is
the ratio of its median to that of the first side.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from groundup.base.machine import prepare_process

prepare_process()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.footprint import RandomRows, peak_bytes, resident_bytes  # noqa: E402
from benchmarks.sides import train_ours  # noqa: E402
from benchmarks.turns import Figures, measure_in_turn, median_of, tell  # noqa: E402
from groundup.model.config import ModelConfig  # noqa: E402
from groundup.model.expert_product import grouped_product, looped_product  # noqa: E402
from groundup.model.loss import linear_cross_entropy  # noqa: E402
from groundup.train.config import TrainConfig  # noqa: E402

SHAPE: dict[str, Any] = {
    **{"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 6400},
}
"""That of the comparisons with other projects."""
LARGE = SHAPE | {
    **{"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"num_key_value_heads": 6, "vocab_size": 32_000},
}
SMALL = SHAPE | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
ROUTED = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 352}
"""Experts beside which SMALL has as many parameters at work for a token, and a dense MLP of 2,816 as many in all."""
WARM_STEPS = 1

Side = tuple[dict[str, Any], dict[str, Any]]
TRAININGS: dict[str, dict[str, Side]] = {
    "checkpointing": {
        kind: (LARGE, {"activation_checkpointing": kind, "micro_batch_rows": 4, "num_threads": 1})
        for kind in ("none", "selective", "block")
    },
    "compile": {
        "eager": (SMALL, {"micro_batch_rows": 4, "num_threads": 2}),
        "compiled": (SMALL, {"micro_batch_rows": 4, "num_threads": 2, "compile": True}),
    },
    "precision": {
        "fp32": (SHAPE, {}),
        "bf16": (SHAPE, {"precision": "bf16"}),
        "bf16, attention in chunks": (SHAPE, {"precision": "bf16", "attention": "chunked"}),
        "bf16, chunks, compiled": (SHAPE, {"precision": "bf16", "attention": "chunked", "compile": True}),
    },
    "optimizers": {
        name: (SHAPE, {"micro_batch_rows": 4, "batch_size_tokens": 8192, "optimizer": optimizer} | maker)
        for name, optimizer, maker in (
            ("adamw", "adamw", {}),
            ("muon", "muon", {}),
            ("adamw_8bit, bitsandbytes", "adamw_8bit", {"adamw_8bit_maker": "bitsandbytes"}),
            ("adamw_8bit, torchao", "adamw_8bit", {"adamw_8bit_maker": "torchao"}),
            ("adafactor", "adafactor", {}),
            ("sgd", "sgd", {}),
        )
    },
    "experts": {
        "dense, as many at work": (SMALL, {}),
        "8 experts, 2 a token": (SMALL | ROUTED, {}),
        "dense, as many in all": (SMALL | {"intermediate_size": 2816}, {}),
    },
}
"""Kinds whose sides are trainings: shape, and changes of the section."""


def trained(side: Side, steps: int) -> Figures:
    """Figures of some steps of a side."""
    shape, changes = side
    row_length = 512
    values = {"row_length": row_length, "batch_size_tokens": 8 * row_length, "device": "cpu", "precision": "fp32"}
    fixed = {"attention": "sdpa", "compile": False, "optimizer": "adamw", "num_threads": 2, "peak_flops": None}
    section = values | fixed | {"duration": f"{steps + WARM_STEPS} steps", "micro_batch_rows": 4} | changes
    model_shape = ModelConfig.model_validate({"head_dim": 64} | shape)
    before = resident_bytes()
    began = time.perf_counter()
    config = TrainConfig.model_validate(section)
    model, timing = train_ours(config, model_shape, RandomRows(row_length, shape["vocab_size"]), seed=0)
    figures = {
        name: statistics.median(line[name] for line in timing[WARM_STEPS:])
        for name in ("forward_backward_seconds", "optimizer_seconds")
    }
    return figures | {
        "step_seconds": sum(figures.values()),
        "first_step_seconds": timing[0]["forward_backward_seconds"],
        "peak_mb": (peak_bytes() - before) / 1e6,
        "parameters_m": model.num_parameters() / 1e6,
        "seconds": time.perf_counter() - began,
    }


def loss_of_chunks(is_chunked: bool) -> Figures:
    """One forward and backward of 4 rows of 512 tokens over a vocabulary of 32,000."""
    generator = torch.Generator().manual_seed(0)
    h_BTD = torch.randn(4, 512, 512, generator=generator).requires_grad_()
    weight_VD = torch.randn(32_000, 512, generator=generator).mul_(0.02).requires_grad_()
    labels_BT = torch.randint(0, 32_000, (4, 512), generator=generator)
    seconds = []
    before = resident_bytes()
    for _ in range(4):
        h_BTD.grad = weight_VD.grad = None
        began = time.perf_counter()
        if is_chunked:
            loss = linear_cross_entropy(h_BTD, weight_VD, labels_BT, labels_BT.numel()).loss_sum
        else:
            loss = F.cross_entropy((h_BTD @ weight_VD.t()).flatten(0, 1), labels_BT.flatten(), reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    return {"step_seconds": statistics.median(seconds[1:]), "peak_mb": (peak_bytes() - before) / 1e6}


def product_of_experts(is_grouped: bool) -> Figures:
    """Forward and backward of 4,096 rows through 32 experts of 256 × 352."""
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(4096, 256, generator=generator).requires_grad_()
    weight_EFD = torch.randn(32, 352, 256, generator=generator).requires_grad_()
    ends_E = torch.linspace(0, 4096, 33)[1:].to(torch.int32)
    product = grouped_product if is_grouped else looped_product
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        torch.autograd.grad(product(x_MD, weight_EFD, ends_E).sum(), (x_MD, weight_EFD))
        seconds.append(time.perf_counter() - began)
    return {"step_seconds": statistics.median(seconds[3:])}


ALONE: dict[str, dict[str, Callable[[], Figures]]] = {
    "loss": {"full logits": lambda: loss_of_chunks(False), "chunked": lambda: loss_of_chunks(True)},
    "products": {"looped": lambda: product_of_experts(False), "grouped": lambda: product_of_experts(True)},
}
"""Kinds whose sides are one call."""
KINDS = (*ALONE, *TRAININGS)


def main() -> int:
    """Print a line a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="all of them where none is named")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "SIDE"))
    wanted = parser.parse_args()
    if wanted.worker:
        kind, side = wanted.worker
        tell(ALONE[kind][side]() if kind in ALONE else trained(TRAININGS[kind][side], wanted.steps))
        return 0
    for kind in wanted.kind or KINDS:
        names = list(ALONE.get(kind) or TRAININGS[kind])
        common = ["benchmarks.techniques", "--steps", str(wanted.steps), "--worker", kind]
        found = measure_in_turn({name: [*common, name] for name in names}, wanted.rounds)
        print(f"\n{kind}: medians of {wanted.rounds} rounds, beside {names[0]}")
        for name, figure in itertools.product(names, found[names[0]][0]):
            value, first = median_of(found[name], figure), median_of(found[names[0]], figure)
            print(f"  {name:28} {figure:26} {value:10.3f}  × {value / first if first else float('nan'):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
