"""The file operations a save is made of, one by one, so that a test can record each of them or make it fail."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from groundup.base.files import sync_file, sync_folder

CHUNK_BYTES = 1 << 20
"""Bytes hashed and written, or read and hashed, at a time: they stay in the processor's cache between the two."""


class Disk:
    """The disk of this machine. Every method raises OSError where the system refuses."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor of a new file; one that is there already is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def append_to(self, path: Path) -> int:
        """A descriptor at the end of a file, which is made where it is missing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> None:
        """Append all bytes of `data`."""
        while data:
            data = data[os.write(descriptor, data) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make names that were made, renamed or removed in a folder survive a power loss."""
        sync_folder(path)

    def sync_file(self, path: Path) -> None:
        """As `sync`, of a file that somebody else wrote."""
        sync_file(path)

    def cut(self, descriptor: int, num_bytes: int) -> None:
        """Drop everything after the first `num_bytes` bytes."""
        os.ftruncate(descriptor, num_bytes)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def make_folders(self, path: Path) -> None:
        """Make a folder and those above it that are missing; on return their names survive a power loss."""
        if not path.is_dir():
            self.make_folders(path.parent)
            with suppress(FileExistsError):  # another rank was faster
                self.make_folder(path)
            self.sync_folder(path.parent)

    def put(self, path: Path, data: bytes) -> None:
        """A file, old or new, that is either as it was or holds all of `data`; on return it survives a power loss."""
        temporary = path.with_name(f".{path.name}.tmp")
        if temporary.exists():  # what a killed process left
            self.remove_file(temporary)
        try:
            self.write_new(temporary, data)
            self.move(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def write_new(self, path: Path, data: bytes) -> None:
        """A new file, synced; its name is not."""
        descriptor = self.create(path)
        try:
            self.write(descriptor, memoryview(data))
            self.sync(descriptor)
        finally:
            self.close(descriptor)

    def move(self, old: Path, new: Path) -> None:
        """Rename; on return that survives a power loss."""
        self.rename(old, new)
        self.sync_folder(new.parent)
        if old.parent != new.parent:
            self.sync_folder(old.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all that is in it; links are removed, never followed."""
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                self.remove_tree(entry)
            else:
                self.remove_file(entry)
        self.remove_folder(path)

    def forget(self, path: Path) -> None:
        """Drop the system's cached copy of a synced file, so that the next read asks the disk itself."""
        if hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def chunks(self, path: Path) -> Iterator[bytes]:
        """The bytes of a file, piece by piece."""
        with path.open("rb", buffering=0) as file:
            while data := file.read(CHUNK_BYTES):
                yield data

    def read(self, path: Path) -> bytes:
        """A whole file."""
        with path.open("rb", buffering=0) as file:
            return file.read()

    def free_bytes(self, path: Path) -> int:
        """Bytes that can still be written beside `path`, which need not exist yet."""
        return shutil.disk_usage(_existing(path)).free

    def name(self, path: Path) -> Path:
        """Where the disk that holds `path` is mounted."""
        place = _existing(path)
        while not place.is_mount():
            place = place.parent
        return place


def _existing(path: Path) -> Path:
    path = path.absolute().resolve()
    while not path.exists():
        path = path.parent
    return path
