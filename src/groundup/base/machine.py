"""Facts of the machine, read once and written into the run; nothing here is timed."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("groundup", "torch", "numpy", "tokenizers", "transformers", "peft", "safetensors", "rensa", "pyarrow")


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first CPU; empty where /proc/cpuinfo does not exist."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX or Arm's bf16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may take at most, in bytes: the machine's, or less where a container's limit is lower."""
    limits = [memory_bytes()]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of the second and of the first kind of cgroups
        path = cgroups / name
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, in bytes; all of it where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return memory_bytes()


def compiler() -> str | None:
    """Path of the C++ compiler, which torch.compile needs on a CPU; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def has_compiler() -> bool:
    """Whether a C++ compiler is at hand."""
    return compiler() is not None


def resident_bytes() -> int:
    """Memory that this process holds now, in bytes; its largest so far where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """Model name of the first CPU, or the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def describe() -> dict[str, Any]:
    """The record of the machine and its software that goes into a run."""
    from importlib import metadata  # 30 ms that a command's help does without

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "fast_bf16": has_fast_bf16(),
        "compiler": has_compiler(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": versions,
    }


def prepare_process() -> None:
    """Settings that libraries read once, when they are first imported: to be called before torch is.

    Waiting threads sleep instead of spinning, which costs a step up to ten times its time where another process wants
    the cores; torchao leaves its CUDA files alone, which on a CPU only gives warnings. What is compiled is kept with the
    user's other caches, not in /tmp, so that it is compiled once and not once a boot; in /tmp where no folder can be made there.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    home = os.environ.get("HOME")
    caches = os.environ.get("XDG_CACHE_HOME") or (home and f"{home}/.cache")
    if caches and _can_be_made(Path(caches)):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{caches}/groundup/compiled")
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


def _can_be_made(folder: Path) -> bool:
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Around the late import of a library that brings torchao or bitsandbytes along: their notes on files for other
    devices and kernels of a hub, and those of torch on how torchao registers its types, are for their own makers."""
    import logging  # as above

    prepare_process()
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
