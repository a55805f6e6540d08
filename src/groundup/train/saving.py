"""Checkpoints of a run over its ranks: which one all of them load, and how many bytes one takes."""

from dataclasses import asdict
from pathlib import Path

from groundup.checkpoint.attempt import Checkpoint
from groundup.checkpoint.manifest import FileRecord
from groundup.checkpoint.store import CheckpointStore
from groundup.optim.muon import Muon
from groundup.parallel.world import World
from groundup.train.engine import TorchEngine


def find_checkpoint(store: CheckpointStore, world: World) -> Checkpoint | None:
    """Rank 0 looks for the newest that is whole; all load that one."""
    found = store.newest() if world.is_first else None
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


def checkpoint_bytes(engine: TorchEngine) -> int:
    """Bytes of one checkpoint: weights and the optimizer's moments, which Muon keeps one of, AdamW two."""
    moments = {
        id(parameter): 1 if isinstance(optimizer, Muon) else 2
        for optimizer in engine.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return sum((1 + moments[id(master)]) * master.nbytes for master in engine.masters.values())
