"""A run's store with tiny tensors."""

from collections import Counter

import pytest
import torch

from groundup.base import failpoints
from groundup.base.log import Log
from groundup.checkpoint.store import CheckpointStore


@pytest.fixture(autouse=True)
def fresh_failpoints(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())


class Kit:
    """What the tests of this room do with a store, in one word each."""

    def __init__(self, root):
        self.root = root

    def store(self, root=None, *, quiet=True, **changes):
        settings = {"run_id": "run-a", "log": Log(quiet=quiet), "keep_last": 2} | changes
        kind = settings.pop("kind", CheckpointStore)
        return kind(root or self.root, **settings)

    @staticmethod
    def tensors(step):
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
    def state(step):
        return {"step": step, "rows": step * 4, "name": "語"}

    def save(self, step, *, store=None, **how):
        """Save one step and wait; the folder it stands in."""
        store = store or self.store(keep_last=100)
        store.save(step, self.tensors(step), self.state(step), **({"wait": True} | how))
        return max((store.root / f"step-{step:06d}").iterdir()) if how.get("wait", True) else None

    def differs(self, found, step):
        """Whether a loaded checkpoint is anything but what was saved at `step`, to the last bit."""
        if found is None or found.step != step or dict(found.state) != self.state(step):
            return True
        for name, group in self.tensors(step).items():
            loaded = found.tensors(name)
            if loaded.keys() != group.keys():
                return True
            for key, tensor in group.items():
                if loaded[key].dtype != tensor.dtype or not torch.equal(loaded[key], tensor):
                    return True
        return False

    def tree(self, root=None):
        """Every path below the root and the bytes of each file."""
        root = root or self.root
        return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path / "run" / "checkpoints")
