"""Every `auto` of a training section, resolved once from the recipe and the machine's facts, never from a clock."""

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from groundup.base import machine
from groundup.base.duration import in_steps
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.model.config import ModelConfig
from groundup.model.makers import AttentionMaker, choose_flash
from groundup.optim.eight_bit import eight_bit_maker
from groundup.optim.lr_law import settled
from groundup.optim.schedules import warmup_steps_of
from groundup.parallel.world import World
from groundup.train.combinations import combination_of, refuse_clash
from groundup.train.config import TrainConfig
from groundup.train.fit import fitting_rows, memory_of_a_rank, training_of

CPU_MICRO_BATCH_TOKENS = 2048
"""Tokens at work whose activations stay in a CPU's last-level cache; lanes share them."""
LANE_TOKENS = 512
"""Tokens of a micro-batch below which a CPU's products get slow: no lane is opened for fewer."""
CUDA_MICRO_BATCH_TOKENS = 16384
GFLOPS_PER_CORE = {torch.float32: 50.0, torch.bfloat16: 200.0}
CUDA_FLOPS = 1e14
"""Nominal rates of a core and of a GPU, only to tell long runs from short ones."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_PAYS_AFTER_SECONDS = 900.0
"""Nominal length of a CPU run from which compiling (40 to 60 s on two cores, measured) is won back."""
COMPILE_PAYS_AFTER_CUDA_FLOPS = 2e16
WINDOW_PAYS = 4
"""A row of so many windows is computed faster in chunks, which read the keys of a window alone, in fp32 too (1.04 to 4
times, measured); without a window they are faster and slower than SDPA by turns."""
RESOLVED = "resolved.json"
PINNED = (
    "precision",
    "allow_tf32",
    "attention",
    "micro_batch_rows",
    "compile",
    "num_threads",
    "num_lanes",
    "shrunk_from",
    "warmup_steps",
    "lr",
    "muon_lr",
    "adamw_8bit_maker",
)
"""What decides the bits: a resumed run keeps it. A longer duration leaves a warmup in % as it was."""
SETTINGS = {"warmup_steps": "warmup"}
"""Setting that a pinned value comes from, where its name is another."""
SHARED = ("micro_batch_rows", "num_threads", "num_lanes", "shrunk_from")
"""What is divided among the ranks: a run that goes on with more or fewer of them divides anew."""


@dataclass(frozen=True)
class Resolved:
    """What `auto` became."""

    device: str
    precision: str
    attention: AttentionMaker
    micro_batch_rows: int
    compile: bool
    num_threads: int
    num_lanes: int
    """Micro-batches computed at the same time."""
    batch_rows: int
    total_steps: int
    warmup_steps: int
    lr: float
    muon_lr: float
    adamw_8bit_maker: Literal["auto", "torchao", "bitsandbytes"] = "auto"
    """Whose 8-bit AdamW; auto where there is none in the run."""
    num_ranks: int = 1
    allow_tf32: bool = False
    shrunk_from: int | None = None
    """Rows of a micro-batch before memory ran out; None where it did not."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def settle(self, config: TrainConfig) -> TrainConfig:
        """The section with the optimizer's settings as they became."""
        return config.model_copy(update={name: getattr(self, name) for name in ("lr", "muon_lr", "adamw_8bit_maker")})


def device_of(config: TrainConfig) -> str:
    """Where a section trains: cpu or cuda. Raises ConfigError for CUDA that torch does not see."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "E-CONFIG-DEVICE", what="device cuda, but torch sees no CUDA device", next="use device cpu or auto"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def resolve(
    config: TrainConfig,
    *,
    rows_per_epoch: int,
    matrix_parameters: int,
    has_dropout: bool = False,
    world: World | None = None,
    shape: ModelConfig | None = None,
) -> Resolved:
    """Resolve a section; threads and lanes are those of one rank. With a model's shape the memory is counted too.

    Raises ConfigError for a batch that its rows do not divide, for a warmup longer than the run, and for fewer CUDA
    devices than ranks; DoesNotFit for a run that the memory does not hold.
    """
    num_ranks, num_local = (world.size, world.num_local) if world is not None else (1, 1)
    if config.batch_size_tokens % config.row_length:
        nearest = max(1, round(config.batch_size_tokens / config.row_length)) * config.row_length
        raise ConfigError(
            "E-CONFIG-BATCH",
            what=f"batch_size_tokens={config.batch_size_tokens} is not a multiple of row_length={config.row_length}",
            next=f"use {nearest}",
        )
    batch_rows = config.batch_size_tokens // config.row_length
    device = device_of(config)
    if device == "cuda" and num_local > torch.cuda.device_count():
        raise ConfigError(
            "E-CONFIG-DEVICE",
            what=f"{num_local} ranks on this machine, but torch sees {torch.cuda.device_count()} CUDA devices",
            next="start as many ranks as devices, or use device cpu",
        )
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if (_is_ampere() if device == "cuda" else machine.has_fast_bf16()) else "fp32"
    sizes = {"batch_rows": batch_rows, "row_length": config.row_length, "rows_per_epoch": rows_per_epoch}
    total_steps = in_steps(config.duration, **sizes)
    compiles = _compiles(config, device, precision, 6.0 * matrix_parameters * total_steps * config.batch_size_tokens)
    attention = config.attention
    if attention == "auto":
        attention = _attention(device, precision, config.row_length, shape, compiles=compiles)
    if attention == "varlen" and not _fits_flash(shape):
        raise ConfigError(
            "E-CONFIG-ATTENTION",
            what=f"attention varlen with heads of {shape and shape.head_size}: FlashAttention has multiples of 8 up to 256",
            next="use attention auto, or another head_dim",
        )
    asked = combination_of(config, shape, device=device, num_ranks=num_ranks)
    refuse_clash({**asked, "precision": precision, "attention": attention})
    optim = settled(config, num_parameters=matrix_parameters, batch_size_tokens=config.batch_size_tokens)
    assert optim.lr != "auto" and optim.muon_lr != "auto"
    num_threads = machine.num_cores() if config.num_threads == "auto" else config.num_threads
    num_threads = max(1, num_threads // num_local)
    share_rows = -(-batch_rows // num_ranks)
    # the generator of dropout belongs to one thread
    can_open_lanes = device == "cpu" and not has_dropout
    lanes = max(1, min(num_threads, share_rows * config.row_length // LANE_TOKENS)) if can_open_lanes else 1
    micro_batch_rows = _micro_batch_rows(config, device, share_rows, lanes)
    lanes = min(lanes, -(-share_rows // micro_batch_rows))
    if shape is not None:
        training = training_of(
            config,
            share_rows=share_rows,
            rows=micro_batch_rows,
            precision=precision,
            attention=attention,
            num_lanes=lanes,
            device=device,
        )
        limit = memory_of_a_rank(device, num_local)
        micro_batch_rows, lanes = fitting_rows(shape, training, limit, is_auto=config.micro_batch_rows == "auto")
    return Resolved(
        device=device,
        precision=precision,
        attention=attention,
        micro_batch_rows=micro_batch_rows,
        compile=compiles,
        num_threads=num_threads,
        num_lanes=lanes,
        batch_rows=batch_rows,
        total_steps=total_steps,
        warmup_steps=warmup_steps_of(config.warmup, total_steps, **sizes),
        lr=optim.lr,
        muon_lr=optim.muon_lr,
        adamw_8bit_maker=eight_bit_maker(config) if config.optimizer == "adamw_8bit" else "auto",
        num_ranks=num_ranks,
        allow_tf32=device == "cuda" and precision == "fp32" and _allows_tf32(config),
    )


def _attention(
    device: str, precision: str, row_length: int, shape: ModelConfig | None, *, compiles: bool
) -> AttentionMaker:
    if device == "cuda":
        return "varlen" if precision != "fp32" and _fits_flash(shape) and _is_ampere() else "sdpa"
    window = row_length if shape is None or shape.sliding_window is None else shape.sliding_window
    is_fused = compiles and precision == "bf16"  # compiled, chunks beat SDPA 1.6 to 2.2 times; if not, by turns
    return "chunked" if is_fused or window * WINDOW_PAYS <= row_length else "sdpa"


def _fits_flash(shape: ModelConfig | None) -> bool:
    return shape is None or (shape.head_size % 8 == 0 and shape.head_size <= 256)


def _is_ampere() -> bool:
    """Whether the CUDA device has bf16 and tf32 products, and FlashAttention's kernels (compute capability 8.0)."""
    return torch.cuda.get_device_capability() >= (8, 0)


def _allows_tf32(config: TrainConfig) -> bool:
    return _is_ampere() if config.allow_tf32 == "auto" else config.allow_tf32


def _micro_batch_rows(config: TrainConfig, device: str, batch_rows: int, lanes: int) -> int:
    if config.micro_batch_rows != "auto":
        return min(config.micro_batch_rows, batch_rows)
    tokens = CUDA_MICRO_BATCH_TOKENS if device == "cuda" else max(LANE_TOKENS, CPU_MICRO_BATCH_TOKENS // lanes)
    wanted = max(1, min(batch_rows // lanes, tokens // config.row_length))
    return max(rows for rows in range(1, wanted + 1) if batch_rows % rows == 0)


def _compiles(config: TrainConfig, device: str, precision: str, flops: float) -> bool:
    if config.compile != "auto":
        if config.compile and device == "cpu" and not machine.has_compiler():
            raise ConfigError(
                "E-CONFIG-COMPILE",
                what="compile: true, but there is no C++ compiler",
                next="install g++, or set compile: auto",
            )
        return config.compile
    if device == "cuda":
        return flops > COMPILE_PAYS_AFTER_CUDA_FLOPS
    return machine.has_compiler() and nominal_seconds(flops, device, precision) > COMPILE_PAYS_AFTER_SECONDS


def nominal_seconds(flops: float, device: str, precision: str) -> float:
    """Length of a run by nominal rates, only to tell long ones from short ones."""
    if device == "cuda":
        return flops / CUDA_FLOPS
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return flops / (GFLOPS_PER_CORE[dtype] * 1e9 * machine.num_cores())


def resolve_once(
    folder: Path,
    config: TrainConfig,
    *,
    rows_per_epoch: int,
    matrix_parameters: int,
    has_dropout: bool = False,
    world: World | None = None,
    shape: ModelConfig | None = None,
    changed: Collection[str] = (),
) -> Resolved:
    """As `resolve`, written to the stage's folder; a resumed run takes the dtype, micro-batch and makers it began with."""
    fresh = resolve(
        config,
        rows_per_epoch=rows_per_epoch,
        matrix_parameters=matrix_parameters,
        has_dropout=has_dropout,
        world=world,
        shape=shape,
    )
    path = folder / RESOLVED
    if path.exists():
        before: dict[str, Any] = read_json(path)
        is_same_world = before.get("num_ranks", 1) == fresh.num_ranks
        return Resolved(
            **(
                asdict(fresh)
                | {
                    name: before[name]
                    for name in PINNED
                    if name in before
                    and SETTINGS.get(name, name) not in changed
                    and (is_same_world or name not in SHARED)
                }
            )
        )
    write_json(path, asdict(fresh))
    return fresh


def shrink_for_good(folder: Path, resolved: Resolved, micro_batch_rows: int) -> Resolved:
    """Smaller micro-batches from here on, in every resume too."""
    shrunk = replace(
        resolved,
        micro_batch_rows=micro_batch_rows,
        shrunk_from=resolved.shrunk_from or resolved.micro_batch_rows,
    )
    write_json(folder / RESOLVED, asdict(shrunk))
    return shrunk


def apply_threads(resolved: Resolved) -> None:
    """Set the thread count, torch's deterministic algorithms and the kernels of attention for this process."""
    torch.set_num_threads(resolved.num_threads)
    if resolved.device == "cuda":
        torch.set_float32_matmul_precision("high" if resolved.allow_tf32 else "highest")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if resolved.attention == "varlen":
            choose_flash(torch.cuda.get_device_capability())
    torch.use_deterministic_algorithms(True)
