"""Checkpoints of a run over its ranks: which one all of them load, how many there will be, how many bytes one takes."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groundup.checkpoint.attempt import Checkpoint
from groundup.checkpoint.manifest import FileRecord
from groundup.checkpoint.store import CheckpointStore
from groundup.optim.state import state_bytes
from groundup.parallel.world import World
from groundup.train.engine import TorchEngine


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
    """Bytes of one checkpoint: the weights, what the optimizers will keep of them, and their averages."""
    shapes = {name: tuple(master.shape) for name, master in engine.masters.items()}
    weights = [*engine.weights.values(), *(() if engine.average is None else engine.average.state_dict().values())]
    return sum(weight.nbytes for weight in weights) + state_bytes(shapes, engine.config)
