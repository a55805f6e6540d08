"""Every `auto` of a training section, resolved once from the recipe and the machine's facts, never from a clock."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from groundup.adapters.config import AdapterConfig
from groundup.base import machine
from groundup.base.duration import in_steps
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.model.config import ModelConfig
from groundup.model.makers import AttentionMaker, choose_flash
from groundup.optim.eight_bit import eight_bit_maker
from groundup.optim.lr_law import settled
from groundup.optim.schedules import warmup_steps_of
from groundup.parallel.cut import Spread
from groundup.parallel.mesh import Mesh
from groundup.parallel.world import World
from groundup.train.combinations import combination_of, refuse_clash
from groundup.train.config import TrainConfig
from groundup.train.fit import fitting_rows, memory_of_a_rank, training_of

CPU_MICRO_BATCH_TOKENS = 2048
"""Tokens at work whose activations stay in a CPU's last-level cache; lanes share them."""
LANE_TOKENS = 512
"""Tokens of a micro-batch below which a CPU's products get slow: a batch of fewer for each lane has fewer lanes."""
CUDA_MICRO_BATCH_TOKENS = 16384
GFLOPS_PER_CORE = {torch.float32: 50.0, torch.bfloat16: 200.0}
CUDA_FLOPS = 1e14
"""Nominal rates of a core and of a GPU, only to tell long runs from short ones."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_PAYS_AFTER_SECONDS = {torch.float32: 900.0, torch.bfloat16: 120.0}
"""Nominal length of a CPU run from which compiling with a cold cache (20 to 44 s, measured) is won back. In bf16 a step takes
0.61 to 0.80 of the eager one's time from 1 to 30 M parameters (`python -m benchmarks.compiling`), in fp32 little less."""
COMPILE_PAYS_AFTER_CUDA_FLOPS = 2e16
WINDOW_PAYS = 4
"""A row of so many windows is computed faster in chunks, which read the keys of a window alone, in fp32 too (1.04 to 4
times, measured); without a window they are faster and slower than SDPA by turns."""
RESOLVED = "resolved.json"
ASKED = "asked"
"""Part of resolved.json: the settings that the pinned values came from, as the recipe gave them."""
LAYOUT = ("micro_batch_rows", "num_threads", "batch_size_tokens", "row_length", "dropout", "lora_dropout")
PINNED = {
    "precision": ("precision",),
    "allow_tf32": ("allow_tf32", "precision", "device"),
    "attention": ("attention", "precision", "compile", "row_length", "device"),
    "compile": ("compile", "precision", "device"),
    "micro_batch_rows": (*LAYOUT, "device"),
    "num_threads": ("num_threads",),
    "num_lanes": (*LAYOUT, "device"),
    "shrunk_from": (*LAYOUT, "device"),
    "warmup_steps": ("warmup", "batch_size_tokens"),
    "lr": ("lr", "muon_lr", "optimizer", "batch_size_tokens"),
    "muon_lr": ("muon_lr", "batch_size_tokens"),
    "muon_weight_decay": ("muon_weight_decay", "muon_lr", "batch_size_tokens", "duration"),
    "adamw_8bit_maker": ("adamw_8bit_maker", "optimizer"),
}
"""What decides the bits, with the settings it comes from: a resumed run keeps it until one of these is changed. A longer
duration leaves a warmup in % as it was, and lowers a decay at `auto`, which is by the whole run."""
SETTLED = ("lr", "muon_lr", "muon_weight_decay", "adamw_8bit_maker")
"""Settings of the optimizer among them."""
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
    muon_weight_decay: float
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
        return config.model_copy(update={name: getattr(self, name) for name in SETTLED})


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
    before: Mapping[str, Any] | None = None,
) -> Resolved:
    """Resolve a section; threads and lanes are those of one rank. With a model's shape the memory is counted too.

    `before` is what resolved.json of a run that goes on says: what it pins stays, and is checked as the rest is.

    Raises ConfigError for a batch that its rows do not divide, for a warmup longer than the run, and for fewer CUDA
    devices than ranks; DoesNotFit for a run that the memory does not hold.
    """
    world = world or World()
    num_ranks, num_local, mesh = world.size, world.num_local, world.mesh
    batch_rows = _batch_rows(config)
    device = device_of(config)
    if device == "cuda" and num_local > torch.cuda.device_count():
        raise ConfigError(
            "E-CONFIG-DEVICE",
            what=f"{num_local} ranks on this machine, but torch sees {torch.cuda.device_count()} CUDA devices",
            next="start as many ranks as devices, or use device cpu",
        )
    kept = _kept(config, device, num_ranks, before or {})
    precision = kept.get("precision", _precision(config, device))
    sizes = {"batch_rows": batch_rows, "row_length": config.row_length, "rows_per_epoch": rows_per_epoch}
    total_steps = in_steps(config.duration, **sizes)
    flops = 6.0 * matrix_parameters * total_steps * config.batch_size_tokens
    may_compile = config.compile is True or not mesh.zero_stage
    compiles = kept.get("compile", may_compile and _compiles(config, device, precision, flops))
    if compiles and device == "cpu" and not machine.has_compiler():
        raise ConfigError(
            "E-CONFIG-COMPILE",
            what="the blocks are to be compiled, but there is no C++ compiler",
            next="install g++, or set compile: false",
        )
    if mesh.zero_stage:
        _refuse_under_zero(config, shape, mesh.zero_stage, precision, compiles=compiles)
    attention = kept.get("attention", _attention(config, device, precision, shape, mesh, compiles=compiles))
    asked = combination_of(config, shape, device=device, mesh=mesh)
    refuse_clash({**asked, "precision": precision, "attention": attention})
    if attention == "varlen":
        _refuse_varlen(shape)
    optim = settled(
        config,
        num_parameters=matrix_parameters,
        batch_size_tokens=config.batch_size_tokens,
        num_steps=total_steps,
    )
    num_threads = machine.num_cores() if config.num_threads == "auto" else config.num_threads
    num_threads = kept.get("num_threads", max(1, num_threads // num_local))
    share_rows = -(-batch_rows // mesh.num_row_shares)
    # the generator of dropout, and talk between ranks, belong to one thread
    can_open_lanes = device == "cpu" and not has_dropout and not mesh.is_sharded
    lanes = max(1, min(num_threads, share_rows * config.row_length // LANE_TOKENS)) if can_open_lanes else 1
    rows = kept.get("micro_batch_rows", _micro_batch_rows(config, device, share_rows, lanes))
    lanes = kept.get("num_lanes", min(lanes, -(-share_rows // rows)))
    shrunk_from = kept.get("shrunk_from")
    warmup_steps = warmup_steps_of(config.warmup, total_steps, **sizes)
    if kept.get("warmup_steps", total_steps) < total_steps:  # a run made shorter than its warmup warms up anew
        warmup_steps = kept["warmup_steps"]
    if shape is not None:
        training = training_of(
            config,
            share_rows=share_rows,
            rows=rows,
            precision=precision,
            attention=attention,
            num_lanes=lanes,
            device=device,
            spread=Spread.of(mesh.degrees, world.parallel),
        )
        limit = memory_of_a_rank(device, num_local)
        fitting = fitting_rows(shape, training, limit, is_auto=config.micro_batch_rows == "auto")
        if "micro_batch_rows" in kept and fitting != (rows, lanes):
            shrunk_from = shrunk_from or rows
        rows, lanes = fitting
    return Resolved(
        device=device,
        precision=precision,
        attention=attention,
        micro_batch_rows=rows,
        compile=compiles,
        num_threads=num_threads,
        num_lanes=lanes,
        batch_rows=batch_rows,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        lr=kept.get("lr", optim.lr),
        muon_lr=kept.get("muon_lr", optim.muon_lr),
        muon_weight_decay=kept.get("muon_weight_decay", optim.muon_weight_decay),
        adamw_8bit_maker=kept.get(
            "adamw_8bit_maker", eight_bit_maker(config) if config.optimizer == "adamw_8bit" else "auto"
        ),
        num_ranks=num_ranks,
        allow_tf32=kept.get("allow_tf32", device == "cuda" and precision == "fp32" and _allows_tf32(config)),
        shrunk_from=shrunk_from,
    )


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The settings that pinned values come from; the device is a fact of its own."""
    names = {name for settings in PINNED.values() for name in settings} - {"device"}
    return {name: getattr(config, name, None) for name in sorted(names)}


def _kept(config: TrainConfig, device: str, num_ranks: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """Pinned values of a run that goes on: those of which no setting, nor the device or the ranks, became another."""
    if not before:
        return {}
    asked, was = _asked(config), before.get(ASKED)
    if was is None:  # of an older run: what the recipe says outright is what it was
        was = {name: before[name] for name in PINNED if asked.get(name) not in (None, "auto") and name in before}
    changed = {name for name, value in was.items() if asked.get(name) != value}
    if before["device"] != device:
        changed.add("device")
    is_same_world = before.get("num_ranks", 1) == num_ranks
    return {
        name: before[name]
        for name, settings in PINNED.items()
        if name in before and changed.isdisjoint(settings) and (is_same_world or name not in SHARED)
    }


def _batch_rows(config: TrainConfig) -> int:
    """Rows of a step. Raises ConfigError for a batch that they do not divide."""
    if config.batch_size_tokens % config.row_length:
        nearest = max(1, round(config.batch_size_tokens / config.row_length)) * config.row_length
        raise ConfigError(
            "E-CONFIG-BATCH",
            what=f"batch_size_tokens={config.batch_size_tokens} is not a multiple of row_length={config.row_length}",
            next=f"use {nearest}",
        )
    return config.batch_size_tokens // config.row_length


def _precision(config: TrainConfig, device: str) -> str:
    if config.precision != "auto":
        return config.precision
    return "bf16" if (_is_ampere() if device == "cuda" else machine.has_fast_bf16()) else "fp32"


def _attention(
    config: TrainConfig, device: str, precision: str, shape: ModelConfig | None, mesh: Mesh, *, compiles: bool
) -> AttentionMaker:
    if config.attention != "auto":
        return config.attention
    if device == "cuda":
        is_whole = not mesh.has("context")  # a part of a row has fewer queries than keys
        return "varlen" if is_whole and precision != "fp32" and _fits_flash(shape) and _is_ampere() else "sdpa"
    window = config.row_length if shape is None or shape.sliding_window is None else shape.sliding_window
    is_fused = compiles and precision == "bf16"  # compiled, chunks beat SDPA 1.6 to 2.2 times; if not, by turns
    return "chunked" if is_fused or window * WINDOW_PAYS <= config.row_length else "sdpa"


def _fits_flash(shape: ModelConfig | None) -> bool:
    return shape is None or (shape.head_size % 8 == 0 and shape.head_size <= 256)


def _refuse_varlen(shape: ModelConfig | None) -> None:
    if not _fits_flash(shape):
        raise ConfigError(
            "E-CONFIG-ATTENTION",
            what=f"attention varlen with heads of {shape and shape.head_size}: FlashAttention has multiples of 8 up to 256",
            next="use attention auto, or another head_dim",
        )
    if not _is_ampere():
        raise ConfigError(
            "E-CONFIG-ATTENTION",
            what=f"attention varlen on a GPU of compute capability {torch.cuda.get_device_capability()}: "
            "FlashAttention needs 8.0",
            next="use attention auto",
        )


def _refuse_under_zero(
    config: TrainConfig, shape: ModelConfig | None, stage: int, precision: str, *, compiles: bool
) -> None:
    """Raise ConfigError for what DeepSpeed's engine does not train, beside what the table of combinations knows."""
    what = then = ""
    if compiles:
        what, then = "its hooks cut what is compiled into pieces", "set compile: false"
    elif stage == 3 and isinstance(config, AdapterConfig) and config.adapter != "none":
        what, then = "a base that lies in parts cannot be read with its adapter", "set parallel.shard: gradients"
    elif shape is not None and shape.has_router_bias:
        what, then = f"it does not know the biases of {shape.model_type}'s routers", "take another model_type"
    elif shape is not None and shape.num_experts is not None and precision == "bf16":
        what, then = "routers compute in fp32, and it casts the whole model", "set precision: fp32"
    if what:
        raise ConfigError(
            "E-CONFIG-DEEPSPEED",
            what=f"parallel.engine: deepspeed (ZeRO-{stage}): {what}",
            next=f"{then}, or take engine: torch",
        )


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
    divisor = max(rows for rows in range(1, wanted + 1) if batch_rows % rows == 0)
    # rather than in many small ones, a batch is cut unevenly: its last micro-batch is smaller
    return divisor if 2 * divisor >= wanted else -(-batch_rows // -(-batch_rows // wanted))


def _compiles(config: TrainConfig, device: str, precision: str, flops: float) -> bool:
    if config.compile != "auto":
        return config.compile
    if device == "cuda":
        return flops > COMPILE_PAYS_AFTER_CUDA_FLOPS
    pays_after = COMPILE_PAYS_AFTER_SECONDS[_nominal_dtype(precision)]
    return machine.has_compiler() and nominal_seconds(flops, device, precision) > pays_after


def nominal_seconds(flops: float, device: str, precision: str) -> float:
    """Length of a run by nominal rates, only to tell long ones from short ones."""
    if device == "cuda":
        return flops / CUDA_FLOPS
    return flops / (GFLOPS_PER_CORE[_nominal_dtype(precision)] * 1e9 * machine.num_cores())


def _nominal_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def resolve_once(
    folder: Path,
    config: TrainConfig,
    *,
    rows_per_epoch: int,
    matrix_parameters: int,
    has_dropout: bool = False,
    world: World | None = None,
    shape: ModelConfig | None = None,
) -> Resolved:
    """As `resolve`; a resumed run takes the dtype, micro-batch and makers that `write_resolved` left in its folder.

    A setting that was changed since is known by what was asked for then, at this resume and at every later one.
    """
    num_ranks = 1 if world is None else world.size
    path = next((path for path in (_record(folder, num_ranks), folder / RESOLVED) if path.exists()), None)
    return resolve(
        config,
        rows_per_epoch=rows_per_epoch,
        matrix_parameters=matrix_parameters,
        has_dropout=has_dropout,
        world=world,
        shape=shape,
        before=read_json(path) if path is not None else {},
    )


def _record(folder: Path, num_ranks: int) -> Path:
    """What is pinned for so many ranks: resolved.json has those that the run began with, it may go back to them."""
    first = folder / RESOLVED
    is_of_these = not first.exists() or read_json(first).get("num_ranks", 1) == num_ranks
    return first if is_of_these else folder / f"resolved-{num_ranks}.json"


def write_resolved(folder: Path, resolved: Resolved, config: TrainConfig) -> None:
    """Pin what a run goes by, once nothing refuses it any more."""
    write_json(_record(folder, resolved.num_ranks), asdict(resolved) | {ASKED: _asked(config)})


def shrink_for_good(
    folder: Path, resolved: Resolved, config: TrainConfig, *, micro_batch_rows: int, num_lanes: int
) -> Resolved:
    """Smaller or fewer micro-batches at a time from here on, in every resume too."""
    shrunk = replace(
        resolved,
        micro_batch_rows=micro_batch_rows,
        num_lanes=num_lanes,
        shrunk_from=resolved.shrunk_from or resolved.micro_batch_rows,
    )
    write_resolved(folder, shrunk, config)
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
