"""`groundup doctor`: what this machine is, and what groundup makes of it."""

import shutil
from importlib import metadata
from pathlib import Path

import torch

from groundup.base import machine
from groundup.base.amounts import counted
from groundup.base.log import Log
from groundup.report.sinks import MODULES
from groundup.train.config import TrainConfig
from groundup.train.resolve import resolve

GIB = 1 << 30
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "Arm bf16",
}
EXTRAS = {
    "bitsandbytes": ("8-bit AdamW and NF4 by bitsandbytes", ("bitsandbytes",)),
    "deepspeed": ("`parallel.engine: deepspeed`", ("deepspeed",)),
    **{name: (f"`groundup follow RUN --to {name}`", (name,)) for name in MODULES},
    "bench": ("`make bench`, the comparisons with transformers Trainer and TRL", ("accelerate", "datasets", "trl")),
    "dev": (
        "what `make check` and `make test` need",
        ("hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "tensorboard"),
    ),
}
"""What each extra is for, and the packages that it brings."""


def check_machine(log: Log) -> None:
    """Print a line for each fact."""
    for name, text in machine_facts().items():
        log.say(f"  {name:<20}{text}")
    log.say("proofs on a recipe's model shape: groundup doctor numerics [RECIPE]")


def machine_facts() -> dict[str, str]:
    """Facts in words, by name."""
    found = machine.describe()
    flags = machine.cpu_flags()
    instructions = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    speed = "products in bf16 are fast" if found["fast_bf16"] else "no products in bf16: training is in fp32"
    disk = shutil.disk_usage(Path.cwd())
    return {
        "system": f"{found['system']}, Python {found['python']}",
        "processor": f"{found['cpu']}, {counted(found['cores'], 'core')} to use",
        "instructions": f"{', '.join(instructions) or 'unknown'}: {speed}",
        "memory": f"{found['memory_bytes'] / GIB:.1f} GiB, {machine.available_memory_bytes() / GIB:.1f} free",
        "disk": f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f}, at {Path.cwd()}",
        "compiler": machine.compiler() or "none: models are not compiled on the CPU; install g++",
        "CUDA": _cuda(),
        "auto": _what_auto_becomes(),
        "packages": ", ".join(f"{package} {version}" for package, version in found["packages"].items()),
        **{f"extra {name}": _extra(name) for name in EXTRAS},
    }


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no device" if built else "no device, and this torch is built without CUDA"
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices.append(f"{device.name} with {device.total_memory / GIB:.0f} GiB, sm_{device.major}{device.minor}")
    return f"{'; '.join(devices)}; CUDA {torch.version.cuda}"


def _what_auto_becomes() -> str:
    """For a run of minutes with the batch of the quickstart."""
    config = TrainConfig.model_validate({"duration": "100 steps", "row_length": 256, "batch_size_tokens": 2048})
    chosen = resolve(config, rows_per_epoch=1, matrix_parameters=1_000_000)
    return (
        f"device {chosen.device}, precision {chosen.precision}, attention {chosen.attention}, "
        f"{counted(chosen.num_threads, 'thread')}, "
        f"{counted(chosen.num_lanes, 'micro-batch', 'micro-batches')} side by side"
    )


def _extra(name: str) -> str:
    purpose, packages = EXTRAS[name]
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        return f"missing {', '.join(missing)}; for {purpose}: pip install 'groundup[{name}]'"
    return f"installed; for {purpose}"


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
