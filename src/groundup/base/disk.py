"""The file operations a save is made of, one by one, so that a test can record each of them or make it fail."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from groundup.base.files import sync_folder

CHUNK_BYTES = 1 << 20
"""Bytes hashed and written, or read and hashed, at a time: they stay in the processor's cache between the two."""


class Disk:
    """The disk of this machine. Every method raises OSError where the system refuses."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor of a new file; one that is there already is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

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

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

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
