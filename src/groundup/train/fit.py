"""Whether a run fits into the machine's memory, known before its first step, and what would make it fit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from groundup.adapters.config import AdapterConfig
from groundup.base import machine
from groundup.base.errors import DoesNotFit
from groundup.model.config import ModelConfig
from groundup.train.config import TrainConfig
from groundup.train.footprint import Footprint, Training, footprint

LEAST_ROW = 64
"""Tokens below which no shorter row is proposed."""
MOST_SHARDS = 64
"""Ranks beyond which no more are proposed."""


def memory_of_a_rank(device: str, num_local: int) -> int:
    """Bytes that one rank may take: a fact of the machine, not what happens to be free."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return machine.memory_limit_bytes() // num_local


def training_of(config: TrainConfig, *, share_rows: int, **resolved: object) -> Training:
    """What of a section decides the memory; `resolved` are the fields of Training that were `auto`."""
    has_adapter = isinstance(config, AdapterConfig) and config.adapter != "none"
    values = {
        "row_length": config.row_length,
        "batch_rows": share_rows,
        "optim": config,
        "adapter": config if has_adapter else None,
        "activation_checkpointing": config.activation_checkpointing,
        "has_dropout": config.dropout > 0,
        "may_adapt": isinstance(config, AdapterConfig),
        "saves_while_training": config.checkpoint_every is not None,
    }
    return Training(**(values | resolved))  # type: ignore[arg-type]


def fitting_rows(
    shape: ModelConfig, training: Training, limit: int, *, is_auto: bool, process: int | None = None
) -> tuple[int, int]:
    """(rows of a micro-batch, lanes) that fit: those of `training`, fewer rows where they are `auto`, fewer lanes.
    `process` is what the stack was measured to take.

    Raises DoesNotFit with the memory by part and the nearest settings that fit.
    """
    candidates = [training, *_smaller(training, fewer_rows=is_auto)]
    for candidate in candidates:
        if footprint(shape, candidate, process=process).total <= limit:
            return candidate.rows, candidate.num_lanes
    raise _does_not_fit(footprint(shape, candidates[-1], process=process), shape, candidates[-1], limit)


def smallest(training: Training, *, is_auto: bool) -> Training:
    """What `fitting_rows` would try last."""
    return [training, *_smaller(training, fewer_rows=is_auto)][-1]


def _smaller(training: Training, *, fewer_rows: bool) -> Iterator[Training]:
    """With fewer rows that divide the batch, then with fewer lanes."""
    rows = training.rows
    if fewer_rows:
        for rows in (rows for rows in range(training.rows - 1, 0, -1) if training.batch_rows % rows == 0):
            yield replace(training, rows=rows)
    for lanes in range(training.num_lanes - 1, 0, -1):
        yield replace(training, rows=rows, num_lanes=lanes)


def _does_not_fit(plan: Footprint, shape: ModelConfig, training: Training, limit: int) -> DoesNotFit:
    found = ((words, footprint(shape, easy, process=plan.process)) for words, easy in easier(shape, training))
    words = next((words for words, easy in found if easy.total <= limit), None)
    return DoesNotFit(
        "E-MEMORY",
        what=f"training needs {plan.total / 1e6:,.0f} MB and there are {limit / 1e6:,.0f} MB ({plan.words()})",
        next=f"what fits: {words}" if words else "take a smaller model, or a machine with more memory",
    )


def easier(shape: ModelConfig, training: Training) -> Iterator[tuple[str, Training]]:
    """Settings that need less and less memory, in the order of what they cost, each on top of those before: lines of the
    recipe, and what decides the memory then. Shorter rows and more ranks are each other's alternative."""
    words: list[str] = []
    for change, changes in _cheapest_first(training):
        found = replace(training, **changes)
        if footprint(shape, found).total < footprint(shape, training).total:  # bf16 has a copy of the weights
            training = found
            words.append(change)
            yield ", ".join(words), training
    shorter = training
    while shorter.row_length > LEAST_ROW:
        length = shorter.row_length // 2
        shorter = replace(shorter, row_length=length, batch_rows=2 * shorter.batch_rows)
        yield ", ".join([*words, f"row_length: {length}"]), shorter
    yield from on_more_ranks(training, words)


def on_more_ranks(training: Training, words: Sequence[str] = ()) -> Iterator[tuple[str, Training]]:
    """The same shared by 2, 4, 8… times as many ranks, behind the lines that were changed before."""
    for shards in (2**power for power in range(1, MOST_SHARDS.bit_length())):
        rows = max(1, training.batch_rows // shards)
        spread = replace(training.spread, data_shard=shards * training.spread.data_shard)
        devices = "so many" if training.spread.num_ranks == 1 else f"{spread.num_ranks}"
        line = f"parallel.data_shard: {spread.data_shard} on {devices} such devices"
        yield ", ".join([*words, line]), replace(training, spread=spread, batch_rows=rows, num_lanes=1)


def _cheapest_first(training: Training) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line of the recipe, what it changes) for settings that are not so already."""
    if training.rows > 1:
        yield "micro_batch_rows: 1", {"rows": 1}
    if training.activation_checkpointing != "block":
        yield "activation_checkpointing: block", {"activation_checkpointing": "block"}
    if training.adapter is None and training.optim.optimizer != "adamw_8bit":
        yield "optimizer: adamw_8bit", {"optim": training.optim.model_copy(update={"optimizer": "adamw_8bit"})}
    if training.saves_while_training:
        yield "checkpoint_every left out", {"saves_while_training": False}
    if training.precision == "fp32" and machine.has_fast_bf16():
        yield "precision: bf16", {"precision": "bf16"}
    if not training.may_adapt:
        return
    if training.adapter is None:
        yield "adapter: lora", {"adapter": AdapterConfig(adapter="lora")}
    if training.adapter is None or (training.adapter.adapter == "lora" and not training.adapter.is_pissa):
        adapter = training.adapter or AdapterConfig()
        yield "adapter: qlora", {"adapter": adapter.model_copy(update={"adapter": "qlora"})}
