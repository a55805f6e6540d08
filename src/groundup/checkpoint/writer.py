"""Writing one checkpoint: folder, files, commit by a rename, and reading it back."""

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from groundup.base.disk import Disk
from groundup.base.failpoints import reach
from groundup.checkpoint.attempt import (
    ATTEMPT_FOLDER,
    MANIFEST,
    STATE,
    STEP_FOLDER,
    SUFFIX,
    UNCOMMITTED,
    read_manifest,
    verified_state,
)
from groundup.checkpoint.manifest import FileRecord, Manifest
from groundup.checkpoint.shard import shard_pieces


@dataclass(frozen=True)
class Snapshot:
    """All that goes into one checkpoint."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: bytes
    metric: float | None

    @property
    def num_bytes(self) -> int:
        values = (tensor for group in self.tensors.values() for tensor in group.values())
        return len(self.state) + sum(tensor.numel() * tensor.element_size() for tensor in values)


class AttemptWriter:
    """One attempt at a checkpoint; remembers what it made, so that a failed one leaves nothing."""

    def __init__(self, root: Path, run_id: str, snapshot: Snapshot, disk: Disk) -> None:
        self.root, self.run_id, self.snapshot, self.disk = root, run_id, snapshot, disk
        self._made_folders: list[Path] = []
        self._made_files: list[Path] = []

    def write(self) -> Path:
        """The folder, committed and read back. Raises OSError, or ValueError if the disk gives back other bytes."""
        folder = self._make_folder()
        manifest = Manifest(
            self.snapshot.step, folder.name, self.run_id, self.snapshot.metric, self._write_files(folder)
        )
        self._commit(folder, manifest)
        self._read_back(folder, manifest)
        return folder

    def _make_folder(self) -> Path:
        parent = self.root / f"step-{self.snapshot.step:06d}"
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        for path in reversed(missing):
            self.disk.make_folder(path)
            self._made_folders.append(path)
            self.disk.sync_folder(path.parent)
        numbers = [int(match[1]) for path in parent.iterdir() if (match := ATTEMPT_FOLDER.fullmatch(path.name))]
        folder = parent / f"attempt-{max(numbers, default=0) + 1:04d}-{uuid.uuid4().hex[:8]}"
        self.disk.make_folder(folder)
        self._made_folders.append(folder)
        return folder

    def _write_files(self, folder: Path) -> dict[str, FileRecord]:
        """Write and sync the shards and the state, hashed on the way."""
        files = {}
        with ExitStack() as stack:
            descriptors = []
            for name, group in self.snapshot.tensors.items():
                reach("ckpt.before_shard")
                descriptor, files[name + SUFFIX] = self._append(stack, folder / (name + SUFFIX), shard_pieces(group))
                descriptors.append(descriptor)
                reach("ckpt.after_shard")
            descriptor, files[STATE] = self._append(stack, folder / STATE, [memoryview(self.snapshot.state)])
            descriptors.append(descriptor)
            reach("ckpt.before_fsync")
            for descriptor in descriptors:
                self.disk.sync(descriptor)
        self.disk.sync_folder(folder)
        reach("ckpt.after_fsync")
        return files

    def _append(self, stack: ExitStack, path: Path, pieces: Iterable[memoryview]) -> tuple[int, FileRecord]:
        """Write a new file; its descriptor is closed with `stack`."""
        descriptor = self.disk.create(path)
        stack.callback(self.disk.close, descriptor)
        self._made_files.append(path)
        digest, num_bytes = hashlib.sha256(), 0
        for piece in pieces:
            digest.update(piece)
            self.disk.write(descriptor, piece)
            num_bytes += len(piece)
        return descriptor, FileRecord(num_bytes, digest.hexdigest())

    def _commit(self, folder: Path, manifest: Manifest) -> None:
        """From the rename on, the checkpoint counts; on return it survives a power loss."""
        reach("ckpt.before_manifest")
        with ExitStack() as stack:
            descriptor, _ = self._append(stack, folder / UNCOMMITTED, [memoryview(manifest.encode())])
            self.disk.sync(descriptor)
        reach("ckpt.after_manifest")
        reach("ckpt.before_rename")
        self.disk.rename(folder / UNCOMMITTED, folder / MANIFEST)
        reach("ckpt.after_rename")
        for path in (folder, folder.parent, self.root):
            self.disk.sync_folder(path)

    def _read_back(self, folder: Path, manifest: Manifest) -> None:
        """Raise ValueError or OSError unless the disk gives back what was written."""
        for name in (MANIFEST, *manifest.files):
            self.disk.forget(folder / name)
        if read_manifest(folder, self.disk) != manifest:
            raise ValueError("the manifest is not what was written")
        verified_state(folder, self.run_id, manifest, self.disk)

    def undo(self) -> set[Path]:
        """Remove what was made, the manifest first, as far as the disk lets us; returns the folders that are left."""
        if self._made_folders and (self._made_folders[-1] / MANIFEST).exists():
            with suppress(OSError):
                self.disk.remove_file(self._made_folders[-1] / MANIFEST)
                self.disk.sync_folder(self._made_folders[-1])
        for path in self._made_files:
            with suppress(OSError):
                self.disk.remove_file(path)
        for path in reversed(self._made_folders):
            with suppress(OSError):
                self.disk.remove_folder(path)
        return {path for path in self._made_folders if path.exists()}


def remove_attempt(folder: Path, disk: Disk) -> None:
    """Remove the files a save makes, the manifest first: what is cut in two does not count. Others' files stay."""
    if (folder / MANIFEST).exists():
        disk.remove_file(folder / MANIFEST)
        disk.sync_folder(folder)
    for path in sorted(folder.iterdir()):
        if path.name in (STATE, UNCOMMITTED) or path.suffix == SUFFIX:
            disk.remove_file(path)
    if not any(folder.iterdir()):
        disk.remove_folder(folder)


def remove_empty_steps(root: Path, disk: Disk) -> None:
    """Remove the folders of steps without attempts."""
    for path in sorted(root.iterdir()):
        if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
            disk.remove_folder(path)
