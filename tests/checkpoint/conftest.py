"""A run's store with tiny tensors, and a disk that records what is asked of it and refuses when told to."""

import errno
import os
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from groundup.base import failpoints
from groundup.base.disk import Disk
from groundup.base.log import Log
from groundup.checkpoint.store import CheckpointStore


@pytest.fixture(autouse=True)
def fresh_failpoints(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())


class RecordingDisk(Disk):
    """Logs every operation that changes something; from number `fail_at` on, refuses it once or for good."""

    def __init__(self):
        self.log, self.names = [], {}
        self.fail_at, self.for_good, self.error, self.refuses_removal = None, False, errno.ENOSPC, False
        self.ignores = set()
        """Operations that say they are done and are not."""

    @contextmanager
    def _record(self, name, *what):
        number = len(self.log)
        is_refused = self.fail_at is not None and (number >= self.fail_at if self.for_good else number == self.fail_at)
        self.log.append((name, *what))
        if is_refused and (self.refuses_removal or number == self.fail_at or not name.startswith("remove")):
            if name == "write":
                os.write(what[0], what[2][: len(what[2]) // 2])
            raise OSError(self.error, os.strerror(self.error))
        yield
        if name in self.ignores:
            self.log.pop()

    def make_folder(self, path):
        with self._record("make_folder", path):
            super().make_folder(path)

    def create(self, path):
        with self._record("create", path):
            descriptor = super().create(path)
            self.names[descriptor] = path
            return descriptor

    def write(self, descriptor, data):
        with self._record("write", descriptor, self.names[descriptor], bytes(data)):
            super().write(descriptor, data)

    def sync(self, descriptor):
        with self._record("sync", self.names[descriptor]):
            pass

    def sync_folder(self, path):
        with self._record("sync_folder", path):
            pass

    def rename(self, old, new):
        with self._record("rename", old, new):
            super().rename(old, new)

    def remove_file(self, path):
        with self._record("remove_file", path):
            super().remove_file(path)

    def remove_folder(self, path):
        with self._record("remove_folder", path):
            super().remove_folder(path)


class Kit:
    """What the tests of this room do with a store, in one word each."""

    RecordingDisk = RecordingDisk

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
