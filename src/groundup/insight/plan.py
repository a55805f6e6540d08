"""What a training stage will need, by the formulas it is judged by itself, and by a probe of a few steps."""

import shutil
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, TypeVar

from groundup.adapters.config import AdapterConfig
from groundup.base.duration import in_steps
from groundup.base.errors import ConfigError, DoesNotFit
from groundup.base.log import Log
from groundup.base.machine import num_cores
from groundup.insight.amounts import Amounts, pretraining, standing_work, tuning
from groundup.insight.probe import Probe, probe
from groundup.model.config import ModelConfig
from groundup.optim.schedules import lr_multiplier
from groundup.parallel.cut import Spread
from groundup.parallel.world import World
from groundup.stages.config import FinetuneConfig, PretrainConfig
from groundup.stages.pretrain import check_positions
from groundup.stages.recipe import Recipe
from groundup.train.config import TrainConfig
from groundup.train.fit import fitting_rows, memory_of_a_rank, smallest, training_of
from groundup.train.flops import step_flops
from groundup.train.footprint import FP32, Footprint, Training, footprint
from groundup.train.resolve import Resolved, resolve
from groundup.train.saving import most_checkpoints
from groundup.train.weight_shapes import num_parameters, parameter_shapes, trained_shapes

TrainingStage = Literal["pretrain", "sft", "lora"]
AnyTraining = TypeVar("AnyTraining", PretrainConfig, FinetuneConfig)
STAGES: tuple[TrainingStage, ...] = ("pretrain", "sft", "lora")
PARTS = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "MLP"}
"""Parts of a model by what stands in the names of their parameters; its norms apart."""


@dataclass(frozen=True)
class StagePlan:
    """Everything that is told of a stage before it begins."""

    stage: TrainingStage
    shape: ModelConfig
    config: PretrainConfig | FinetuneConfig
    resolved: Resolved
    amounts: Amounts
    training: Training
    memory: Footprint
    limit: int
    """Bytes that a rank may take."""
    flops: float
    """Of all steps, on all ranks."""
    checkpoint_bytes: int
    num_checkpoints: int
    """That stand at once."""
    model_bytes: int
    """Of what the stage gives back."""
    free_bytes: int
    probe: Probe

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(map(prod, trained_shapes(self.shape, self.training.adapter).values()))

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.model_bytes

    @property
    def epochs(self) -> float:
        return self.resolved.total_steps * self.resolved.batch_rows / self.amounts.rows_per_epoch

    @property
    def look_seconds(self) -> float | None:
        """All looks at held-out rows."""
        if self.probe.look_seconds is None:
            return None
        every = _steps_of(self.config.validate_every, self.config, self.resolved, self.amounts)
        looks = -(-self.resolved.total_steps // every) if every else 1
        return looks * self.amounts.held_out_rows * self.probe.look_seconds

    @property
    def seconds(self) -> float | None:
        """Of training: the steps and the looks between them."""
        if self.probe.step_seconds is None or self.look_seconds is None:
            return None
        return self.resolved.total_steps * self.probe.step_seconds + self.look_seconds

    def lr_at(self, step: int) -> float:
        """Multiplier of the peak rates."""
        resolved = self.resolved
        return lr_multiplier(step, self.config, total_steps=resolved.total_steps, warmup_steps=resolved.warmup_steps)

    def refuse_what_does_not_fit(self) -> None:
        """Raise DoesNotFit, as the stage would, for too little memory or disk."""
        if self.memory.total > self.limit:
            fitting_rows(self.shape, self.training, self.limit, is_auto=False, process=self.memory.process)
        if self.disk_bytes > self.free_bytes:
            raise DoesNotFit(
                "E-DISK-PREFLIGHT",
                what=f"{self.num_checkpoints} checkpoints and the model need {self.disk_bytes:,} bytes and the disk has "
                f"{self.free_bytes:,} free",
                next="free disk space, keep fewer checkpoints, or write to another disk",
            )


def stages_of(recipe: Recipe) -> list[TrainingStage]:
    """The training stages of a recipe, in their order."""
    return [stage for stage in STAGES if getattr(recipe, stage) is not None]


def plan_stage(
    recipe: Recipe, stage: TrainingStage, runs_dir: Path, log: Log, *, probes: bool, memory_bytes: int | None = None
) -> StagePlan:
    """Plan one stage; `probes` takes a few real steps too, `memory_bytes` stands in the place of the machine's.

    Raises ConfigError and DataError as the stage itself would.
    """
    config = getattr(recipe, stage)
    if config is None:
        raise ConfigError(
            "E-CONFIG-SECTION", what=f"the recipe has no `{stage}:` section", where=recipe.name, next=f"add `{stage}:`"
        )
    work = standing_work(recipe, runs_dir, log)
    if stage == "pretrain":
        if recipe.model is None:
            raise ConfigError(
                "E-CONFIG-SECTION", what="the recipe has no `model:` section", where=recipe.name, next="add `model:`"
            )
        shape, amounts = pretraining(recipe, work, recipe.model)
    else:
        shape, amounts = tuning(recipe, work, stage, log)
    check_positions(shape, config.row_length)
    world = World(size=recipe.parallel.num_ranks, num_local=recipe.parallel.num_ranks)
    world.spread(recipe.parallel)
    resolved = resolve(
        config,
        rows_per_epoch=amounts.rows_per_epoch,
        matrix_parameters=_matrix_parameters(shape, config),
        has_dropout=config.dropout > 0 or getattr(config, "lora_dropout", 0.0) > 0,
        world=world,
    )
    limit = memory_bytes or memory_of_a_rank(resolved.device, world.num_local)
    training = _training(config, resolved, Spread.of(world.mesh.degrees, recipe.parallel))
    alone = replace(smallest(training, is_auto=_is_auto(config)), spread=Spread())  # a probe is one process
    has_room = footprint(shape, alone).total <= limit
    measured = probe(shape, _of_a_rank(config, world.size), times=probes and has_room)
    # a GPU's context is not in the resident size
    process = measured.process + amounts.data_bytes if resolved.device == "cpu" else None
    try:
        rows, lanes = fitting_rows(shape, training, limit, is_auto=_is_auto(config), process=process)
    except DoesNotFit:  # told by the plan itself, with all that would fit
        training = smallest(training, is_auto=_is_auto(config))
        rows, lanes = training.rows, training.num_lanes
    training = replace(training, rows=rows, num_lanes=lanes)
    resolved = replace(resolved, micro_batch_rows=rows, num_lanes=lanes)
    memory = footprint(shape, training, process=process)
    flops = step_flops(shape, training.adapter).of(
        tokens=config.row_length,
        loss_tokens=round(amounts.loss_fraction * config.row_length),
        pairs=round(amounts.pairs_a_row),
    )
    own = sum(map(prod, trained_shapes(shape, training.adapter).values()))
    whole = footprint(shape, replace(training, spread=Spread()))
    return StagePlan(
        stage=stage,
        shape=shape,
        config=config,
        resolved=resolved,
        amounts=amounts,
        training=training,
        memory=memory,
        limit=limit,
        flops=float(flops) * resolved.total_steps * resolved.batch_rows,
        checkpoint_bytes=FP32 * own + whole.optimizer + whole.average,
        num_checkpoints=most_checkpoints(
            total_steps=resolved.total_steps,
            checkpoint_every=_steps_of(config.checkpoint_every, config, resolved, amounts),
            keep_last=config.keep_checkpoints,
            keep_every=_steps_of(config.keep_every, config, resolved, amounts),
            first_step="rewind" in (config.on_nonfinite, config.on_spike),
            measures=True,
        ),
        model_bytes=FP32 * (num_parameters(shape) if training.adapter is None else own),
        free_bytes=_free_bytes(runs_dir),
        probe=measured,
    )


def parameters_by_part(shape: ModelConfig) -> dict[str, int]:
    """Parameters of a model by what they are for."""
    found = dict.fromkeys((*PARTS.values(), "norms"), 0)
    for name, size in parameter_shapes(shape).items():
        part = "norms" if "norm" in name else next(word for key, word in PARTS.items() if key in name)
        found[part] += prod(size)
    return {part: count for part, count in found.items() if count}


def active_parameters(shape: ModelConfig) -> int:
    """Parameters that one token meets: of the experts, those that it is given to."""
    return sum(_active(size, shape) for size in parameter_shapes(shape).values())


def _active(size: tuple[int, ...], shape: ModelConfig) -> int:
    if len(size) < 3:
        return prod(size)
    assert shape.num_experts is not None and shape.num_experts_per_tok is not None
    return prod(size) * shape.num_experts_per_tok // shape.num_experts


def _is_auto(config: TrainConfig) -> bool:
    return config.micro_batch_rows == "auto"


def _training(config: PretrainConfig | FinetuneConfig, resolved: Resolved, spread: Spread) -> Training:
    return training_of(
        config,
        share_rows=-(-resolved.batch_rows // spread.num_row_shares),
        rows=resolved.micro_batch_rows,
        precision=resolved.precision,
        attention=resolved.attention,
        num_lanes=resolved.num_lanes,
        device=resolved.device,
        spread=spread,
    )


def _matrix_parameters(shape: ModelConfig, config: PretrainConfig | FinetuneConfig) -> int:
    sizes = list(parameter_shapes(shape).values())
    if isinstance(config, AdapterConfig) and config.adapter != "none":
        sizes += trained_shapes(shape, config).values()
    return sum(_active(size, shape) for size in sizes if len(size) > 1)


def _of_a_rank(config: AnyTraining, num_ranks: int) -> AnyTraining:
    """The share of one rank as a section of its own; talking to the others is not in it."""
    rows = -(-config.batch_size_tokens // config.row_length // num_ranks)
    threads = config.num_threads if config.num_threads != "auto" else num_cores()
    changes = {"batch_size_tokens": rows * config.row_length, "num_threads": max(1, threads // num_ranks)}
    return config.model_copy(update=changes) if num_ranks > 1 else config


def _steps_of(duration: str | None, config: TrainConfig, resolved: Resolved, amounts: Amounts) -> int:
    """Interval in steps; 0 for never."""
    if duration is None:
        return 0
    return in_steps(
        duration,
        batch_rows=resolved.batch_rows,
        row_length=config.row_length,
        rows_per_epoch=amounts.rows_per_epoch,
    )


def _free_bytes(folder: Path) -> int:
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free
