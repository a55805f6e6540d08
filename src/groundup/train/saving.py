"""Checkpoints of a run over its ranks: which one all of them load, how many there will be, how many bytes one takes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from groundup.base.errors import CheckpointError
from groundup.checkpoint.attempt import SUFFIX, Checkpoint
from groundup.checkpoint.manifest import FileRecord
from groundup.checkpoint.pieces import Part, SavedGroup, parts_of
from groundup.checkpoint.store import CheckpointStore
from groundup.optim.state import state_bytes
from groundup.parallel.world import World
from groundup.train.engine import TorchEngine

GROUPS = ("model", "optimizer", "scaler", "ema")
"""Files of tensors in a checkpoint, each in pieces where several ranks wrote it."""


def find_checkpoint(store: CheckpointStore, world: World, metrics: Path) -> Checkpoint | None:
    """Rank 0 looks for the newest that is whole and that `metrics`, the file of lines, covers; all load that one."""

    def fault_of(state: Mapping[str, Any]) -> str | None:
        there = metrics.stat().st_size if metrics.exists() else 0
        if there >= state["metrics_bytes"]:
            return None
        return f"{metrics.name} has {there} bytes, the checkpoint counts on {state['metrics_bytes']}"

    found = store.newest(fault_of=fault_of) if world.is_first else None
    if world.size == 1:
        return found
    values = world.broadcast(
        found
        and {
            "step": found.step,
            "folder": str(found.folder),
            "state": dict(found.state),
            "files": {name: asdict(record) for name, record in found.files.items()},
        }
    )
    if values is None:
        return None
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    return Checkpoint(values["step"], Path(values["folder"]), values["state"], files, store.disk)


def most_checkpoints(
    *, total_steps: int, checkpoint_every: int, keep_last: int, keep_every: int, first_step: bool, measures: bool
) -> int:
    """Most checkpoints that stand at once in a run: those to keep, the best, and the one being written.

    Intervals are in steps, 0 for never; `first_step` tells whether step 0 is saved, `measures` whether validation finds
    a best one.
    """
    saves = 1 + int(first_step) + (total_steps // checkpoint_every if checkpoint_every else 0)
    for_good = total_steps // math.lcm(keep_every, checkpoint_every) if keep_every and checkpoint_every else 0
    return min(saves, keep_last + for_good + int(measures) + 1)


def checkpoint_bytes(engine: TorchEngine) -> int:
    """Bytes of one checkpoint: the weights, what the optimizers will keep of them, and their averages. Collective."""
    owned = {name: weight for name, weight in engine.weights.items() if engine.owns(name)}
    shapes = {name: tuple(weight.shape) for name, weight in owned.items() if name in engine.masters}
    averages = 8 + sum(owned[name].numel() * 4 for name in shapes) if engine.average is not None else 0
    own = sum(weight.nbytes for weight in owned.values()) + averages + state_bytes(shapes, engine.config)
    return engine.world.sum_counts([own])[0] if engine.meets_others else own


def saved_tensors(found: Checkpoint, engine: TorchEngine) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint has for this rank, by group: whole tensors, or the pieces of them that it holds.

    Raises CheckpointError for a piece that is not there, and for one that cannot be cut out of those that are.
    """
    if not engine.meets_others and found.layout() is None:
        return {name: found.tensors(name) for name in GROUPS if f"{name}{SUFFIX}" in found.files}
    groups = {name: SavedGroup(found, name) for name in GROUPS}
    pieces = engine.pieces()
    refuse_other_names(groups["model"].names(), engine.weight_names())
    return {name: group.read(pieces) for name, group in groups.items() if group.is_there}


def owned_parts(engine: TorchEngine) -> dict[str, dict[str, Part]]:
    """All that this rank owns of what changes, by group."""
    pieces = engine.pieces()

    def is_own(entry: str) -> bool:
        owner = entry if entry in pieces else entry.rpartition(":")[0]
        return engine.owns(owner) if owner in engine.weights else engine.world.is_first

    return {
        group: {name: part for name, part in parts_of(tensors, pieces).items() if is_own(name)}
        for group, tensors in engine.state_dict().items()
    }


def refuse_other_names(saved: Iterable[str], own: Iterable[str]) -> None:
    """Raise CheckpointError where a checkpoint's weights are not those of the run."""
    if differing := sorted(set(saved) ^ set(own)):
        raise CheckpointError(
            "E-KEYS",
            what=f"checkpoint and run differ in {len(differing)} tensors: {differing[:4]}",
            next="begin again with `--restart`",
        )
