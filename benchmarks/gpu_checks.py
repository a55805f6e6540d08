"""Every path that only a CUDA device takes, run for real: a line for each check, exit 5 where one fails.

    python -m benchmarks.gpu_checks [--device cpu] [--only TEXT]

Without a CUDA device every check is passed over. `--device cpu` makes those that a CPU can make.
"""

import argparse
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from groundup.base.machine import num_cores, prepare_process

prepare_process()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

import torch  # noqa: E402
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl  # noqa: E402

from benchmarks import gpu_kernels, gpu_runs  # noqa: E402
from benchmarks.gpu_kernels import WINDOW, Finding  # noqa: E402
from groundup.base.errors import NumericsError  # noqa: E402
from groundup.model.makers import AttentionMaker  # noqa: E402
from groundup.proof.numerics.figures import Skip  # noqa: E402

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Check:
    """What is said to be so, and what measures it on a device."""

    name: str
    make: Callable[[str], Finding]


ATTENTION: tuple[tuple[AttentionMaker, torch.dtype, str | None], ...] = (
    *(("varlen", dtype, "FA2") for dtype in (BF16, FP16)),
    ("varlen", BF16, "FA3"),
    ("flex", BF16, None),
    ("flex", FP32, None),
    ("sdpa", BF16, None),
    ("sdpa", FP32, None),
)
ADAMW_8BIT: dict[str, Any] = {"optimizer": "adamw_8bit", "limit": 0.05}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused AdamW": {"optimizer": "adamw", "limit": 1e-5},
    # in bf16 on CUDA, where five products in a row are rounded
    "Muon": {"optimizer": "muon", "limit": 0.05},
    "8-bit AdamW of torchao": {**ADAMW_8BIT, "adamw_8bit_maker": "torchao"},
    "8-bit AdamW of bitsandbytes": {**ADAMW_8BIT, "adamw_8bit_maker": "bitsandbytes"},
}
PROOFS = (
    "attention sdpa = dense",
    "attention varlen = dense",
    "attention flex = dense",
    "recomputed by block = plain",
    "recomputed by selective = plain",
    "chunked loss = full",
    "bf16 near fp32",
    "1×8 rows = 2×4 = 8×1",
)
"""Those of `groundup doctor numerics` whose code differs on CUDA."""
CHECKS = (
    *(
        Check(
            f"attention {flash or maker} {str(dtype).removeprefix('torch.')}{f', window {window}' if window else ''}",
            partial(gpu_kernels.attention, maker=maker, dtype=dtype, window=window, flash=flash),
        )
        for maker, dtype, flash in ATTENTION
        for window in (None, WINDOW)
    ),
    *(Check(f"model: {claim}", partial(gpu_kernels.proof, claim=claim)) for claim in PROOFS),
    Check("experts grouped = looped", gpu_kernels.grouped_experts),
    *(Check(f"{name} = CPU", partial(gpu_kernels.optimizer, **values)) for name, values in OPTIMIZERS.items()),
    *(
        Check(f"NF4 of {maker} = unpacked", partial(gpu_kernels.packed_weights, maker=maker))
        for maker in ("torchao", "bitsandbytes")
    ),
    Check("compiled sdpa = eager", partial(gpu_kernels.compiled, maker="sdpa", dtype=FP32)),
    Check("compiled varlen = eager", partial(gpu_kernels.compiled, maker="varlen", dtype=BF16)),
    Check("compiled flex = eager", partial(gpu_kernels.compiled, maker="flex", dtype=BF16)),
    Check("memory, recomputed by block", partial(gpu_kernels.recompute_memory, kind="block", limit=0.6)),
    Check("memory, recomputed by selective", partial(gpu_kernels.recompute_memory, kind="selective", limit=0.95)),
    Check("batches pinned and equal", gpu_runs.loading),
    *(
        Check(f"waits in a step, {optimizer}", partial(gpu_runs.waits, optimizer=optimizer))
        for optimizer in ("adamw", "muon")
    ),
    Check("training fp32", partial(gpu_runs.training, precision="fp32", allow_tf32=False)),
    Check("training fp32, tf32 allowed", partial(gpu_runs.training, precision="fp32", allow_tf32=True)),
    Check("training bf16", partial(gpu_runs.training, precision="bf16")),
    Check("training bf16, flex", partial(gpu_runs.training, precision="bf16", attention="flex")),
    Check("training fp16, one overflow", gpu_runs.fp16_training),
    Check("training experts", gpu_runs.mixture_training),
    *(
        Check(f"training QLoRA of {maker}", partial(gpu_runs.adapter_training, maker=maker))
        for maker in ("torchao", "bitsandbytes")
    ),
    Check("throughput, 100M bf16 compiled", gpu_runs.throughput),
    Check("memory against the forecast", gpu_runs.memory),
)


def judge(check: Check, device: str) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and the line that says so; a check that breaks off has failed."""
    if device == "cuda" and not torch.cuda.is_available():
        return "SKIP", f"SKIP {check.name}: no CUDA device"
    try:
        with _fresh():
            figure, words = check.make(device)
    except Skip as skip:
        return "SKIP", f"SKIP {check.name}: {skip}"
    except Exception as error:  # the other checks are still to be made
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return "FAIL", f"FAIL {check.name}: {reason}"
    verdict = "PASS" if figure.holds else "FAIL"
    return verdict, f"{verdict} {check.name:<42} {figure.value:.2g} ≤ {figure.tolerance:.2g}  {words}"


@contextmanager
def _fresh() -> Iterator[None]:
    """Settings of a run in fp32, whatever the check before left behind; afterwards as they were."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(num_cores())
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Print the lines and their number by verdict."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="make the checks whose name has it")
    wanted = parser.parse_args(arguments)
    if wanted.device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, torch {torch.__version__}")
    verdicts: Counter[str] = Counter()
    for check in CHECKS:
        if wanted.only in check.name:
            verdict, line = judge(check, wanted.device)
            verdicts[verdict] += 1
            print(line, flush=True)
    print("  ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    return NumericsError.exit_code if verdicts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
