"""Disks for proofs: one that logs what it is asked to do and can refuse it, and one in a hurry."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundup.base.disk import Disk

Operation = tuple[Any, ...]
"""Its name, then the paths, bytes or lengths it was given."""


class RecordingDisk(Disk):
    """Logs every operation that changes something; from number `fail_at` on, refuses it once or for good.

    It syncs nothing: a power loss is played on the log.
    """

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self.names: dict[int, Path] = {}
        self.fail_at: int | None = None
        self.for_good, self.error, self.refuses_removal = False, errno.ENOSPC, False
        self.ignores: set[str] = set()
        """Operations that say they are done and are not."""

    @contextmanager
    def _record(self, name: str, *what: Any, descriptor: int | None = None) -> Iterator[None]:
        number = len(self.log)
        is_refused = self.fail_at is not None and (number >= self.fail_at if self.for_good else number == self.fail_at)
        self.log.append((name, *what))
        if is_refused and (self.refuses_removal or number == self.fail_at or not name.startswith("remove")):
            if descriptor is not None:
                os.write(descriptor, what[1][: len(what[1]) // 2])
            raise OSError(self.error, os.strerror(self.error))
        yield
        if name in self.ignores:
            self.log.pop()

    def make_folder(self, path: Path) -> None:
        with self._record("make_folder", path):
            super().make_folder(path)

    def create(self, path: Path) -> int:
        with self._record("create", path):
            descriptor = super().create(path)
            self.names[descriptor] = path
            return descriptor

    def append_to(self, path: Path) -> int:
        with self._record("touch" if path.exists() else "create", path):
            descriptor = super().append_to(path)
            self.names[descriptor] = path
            return descriptor

    def write(self, descriptor: int, data: memoryview) -> None:
        with self._record("write", self.names[descriptor], bytes(data), descriptor=descriptor):
            super().write(descriptor, data)

    def cut(self, descriptor: int, num_bytes: int) -> None:
        with self._record("cut", self.names[descriptor], num_bytes):
            super().cut(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        with self._record("sync", self.names[descriptor]):
            pass

    def sync_file(self, path: Path) -> None:
        with self._record("sync", path):
            pass

    def sync_folder(self, path: Path) -> None:
        with self._record("sync_folder", path):
            pass

    def rename(self, old: Path, new: Path) -> None:
        with self._record("rename", old, new):
            super().rename(old, new)

    def remove_file(self, path: Path) -> None:
        with self._record("remove_file", path):
            super().remove_file(path)

    def remove_folder(self, path: Path) -> None:
        with self._record("remove_folder", path):
            super().remove_folder(path)


class NoSync(Disk):
    """As fast as a disk that need not outlive its trial."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_file(self, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass
