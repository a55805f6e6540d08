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
    LAYOUT,
    MANIFEST,
    STATE,
    STEP_FOLDER,
    SUFFIX,
    UNCOMMITTED,
    read_manifest,
    verify_files,
)
from groundup.checkpoint.manifest import FileRecord, Manifest
from groundup.checkpoint.shard import shard_pieces


@dataclass(frozen=True)
class Snapshot:
    """All that goes into one checkpoint."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file, without its suffix."""
    texts: Mapping[str, bytes]
    """JSON by file: the state, and where tensors are spread over files, what lies where."""
    metric: float | None

    @property
    def num_bytes(self) -> int:
        values = (tensor for group in self.tensors.values() for tensor in group.values())
        num_text = sum(map(len, self.texts.values()))
        return num_text + sum(tensor.numel() * tensor.element_size() for tensor in values)


class AttemptWriter:
    """One attempt at a checkpoint; remembers what it made, so that a failed one leaves nothing."""

    def __init__(self, root: Path, run_id: str, snapshot: Snapshot, disk: Disk) -> None:
        self.root, self.run_id, self.snapshot, self.disk = root, run_id, snapshot, disk
        self._made_folders: list[Path] = []
        self._made_files: list[Path] = []

    def write(self) -> Path:
        """The folder, committed and read back. Raises OSError, or ValueError if the disk gives back other bytes."""
        folder = self.make_folder()
        files = self.write_files(folder)
        self.commit(folder, files)
        self.check_files(folder, files)
        return folder

    def make_folder(self) -> Path:
        """A new attempt's folder."""
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

    def write_files(self, folder: Path) -> dict[str, FileRecord]:
        """Write and sync the snapshot's files into an attempt's folder, hashed on the way."""
        files = {}
        with ExitStack() as stack:
            descriptors = []
            for name, group in self.snapshot.tensors.items():
                reach("ckpt.before_shard")
                descriptor, files[name + SUFFIX] = self._append(stack, folder / (name + SUFFIX), shard_pieces(group))
                descriptors.append(descriptor)
                reach("ckpt.after_shard")
            for name, text in self.snapshot.texts.items():
                descriptor, files[name] = self._append(stack, folder / name, [memoryview(text)])
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

    def commit(self, folder: Path, files: Mapping[str, FileRecord]) -> None:
        """From the rename on, the checkpoint of these files counts; on return it survives a power loss.

        Raises OSError, or ValueError if the disk gives back another manifest.
        """
        manifest = Manifest(self.snapshot.step, folder.name, self.run_id, self.snapshot.metric, dict(files))
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
        self.disk.forget(folder / MANIFEST)
        if read_manifest(folder, self.disk) != manifest:
            raise ValueError("the manifest is not what was written")

    def check_files(self, folder: Path, files: Mapping[str, FileRecord]) -> None:
        """Raise ValueError or OSError unless the disk gives back what was written."""
        for name in files:
            self.disk.forget(folder / name)
        verify_files(folder, files, self.disk)

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
        if path.name in (STATE, LAYOUT, UNCOMMITTED) or path.suffix == SUFFIX:
            disk.remove_file(path)
    if not any(folder.iterdir()):
        disk.remove_folder(folder)


def remove_empty_steps(root: Path, disk: Disk) -> None:
    """Remove the folders of steps without attempts."""
    for path in sorted(root.iterdir()):
        if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
            disk.remove_folder(path)
