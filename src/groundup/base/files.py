"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from groundup.base.errors import DataError


def sync_file(path: Path) -> None:
    """fsync a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that names made or renamed in it survive a power loss."""
    sync_file(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that stands under its name only when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order, text as it is."""
    with atomic_write(path) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The file that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that groundup wrote. Raises DataError if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            "E-JSON",
            what=f"cannot read: {type(error).__name__}",
            where=path,
            next="remove the folder it stands in and run the stage again",
        ) from None
    if not isinstance(value, dict):
        raise DataError("E-JSON", what="not a JSON object", where=path, next="run the stage again")
    return value
