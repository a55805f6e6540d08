"""A run's checkpoints with tiny tensors, made from their step alone: what faults of the store are tried on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.log import Log
from groundup.checkpoint.attempt import Checkpoint
from groundup.checkpoint.store import CheckpointStore

RUN_ID = "run-a"


class TinyStore:
    """What trials do with a store, in one word each."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def store(self, root: Path | None = None, *, quiet: bool = True, **changes: Any) -> CheckpointStore:
        """A store on the folder, as a new process has it."""
        settings: dict[str, Any] = {"run_id": RUN_ID, "log": Log(quiet=quiet), "keep_last": 2} | changes
        kind: type[CheckpointStore] = settings.pop("kind", CheckpointStore)
        return kind(root or self.root, **settings)

    @staticmethod
    def tensors(step: int) -> dict[str, dict[str, Tensor]]:
        """What is saved at a step: several dtypes and layouts, an empty tensor, a scalar."""
        generator = torch.Generator().manual_seed(step)
        return {
            "model": {
                "a.weight": torch.randn(4, 6, generator=generator),
                "b": torch.randn(3, generator=generator).bfloat16(),
                "empty": torch.empty(0, 5),
            },
            "optimizer": {
                "a.weight:step": torch.tensor(float(step)),
                "b:exp_avg": torch.randn(6, 2, generator=generator).t(),
                "count": torch.tensor([step, -step]),
            },
        }

    @staticmethod
    def state(step: int) -> dict[str, Any]:
        """The JSON beside the tensors."""
        return {"step": step, "rows": step * 4, "name": "語"}

    def save(self, step: int, *, store: CheckpointStore | None = None, **how: Any) -> Path:
        """Save one step, and wait unless told otherwise; the folder of the step's newest attempt, or of the step."""
        store = store or self.store(keep_last=100)
        store.save(step, self.tensors(step), self.state(step), **({"wait": True} | how))
        folder = store.root / f"step-{step:06d}"
        return max(folder.iterdir()) if how.get("wait", True) else folder

    def differs(self, found: Checkpoint | None, step: int) -> bool:
        """Whether a loaded checkpoint is anything but what was saved at `step`, to the last bit."""
        if found is None or found.step != step or dict(found.state) != self.state(step):
            return True
        return any(_differ(found.tensors(name), group) for name, group in self.tensors(step).items())

    def tree(self, root: Path | None = None) -> dict[Path, bytes | None]:
        """Every path below the root and the bytes of each file."""
        root = root or self.root
        return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def _differ(loaded: Mapping[str, Tensor], group: Mapping[str, Tensor]) -> bool:
    if loaded.keys() != group.keys():
        return True
    return any(loaded[key].dtype != value.dtype or not torch.equal(loaded[key], value) for key, value in group.items())
