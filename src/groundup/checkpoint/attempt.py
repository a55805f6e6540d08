"""Attempt folders as they are found on disk: what each claims, and whether every byte of it is as written."""

import hashlib
import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError
from groundup.checkpoint.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest, decode_manifest
from groundup.checkpoint.shard import (
    MAX_HEADER_BYTES,
    check_header,
    described,
    header_bytes,
    parse_shard,
    read_head,
    stream_shard,
)

MANIFEST = "MANIFEST.json"
UNCOMMITTED = ".MANIFEST.json.tmp"
STATE = "state.json"
LAYOUT = "layout.json"
"""Where tensors are spread over the files of several ranks: what lies where."""
SUFFIX = ".safetensors"
STEP_FOLDER = re.compile(r"step-(0[0-9]{5}|[1-9][0-9]{5,17})")
ATTEMPT_FOLDER = re.compile(r"attempt-([0-9]{4,18})-[0-9a-f]{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    step: int
    folder: Path
    state: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    disk: Disk

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of `NAME.safetensors`, out of the very bytes that are checked. Raises CheckpointError."""
        try:
            path = self.folder / f"{name}{SUFFIX}"
            return parse_shard(_checked_bytes(self.disk, path, self.files.get(path.name)))
        except (OSError, ValueError) as error:
            raise self._changed(error) from None

    def shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `NAME.safetensors`, from its header alone. Raises CheckpointError."""
        try:
            path = self.folder / f"{name}{SUFFIX}"
            head, _ = read_head(self.disk.chunks(path), path.stat().st_size)
        except (OSError, ValueError) as error:
            raise self._changed(error) from None
        return described(head)

    def each_tensor(self, name: str, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors of `NAME.safetensors`, one in memory at a time. Not to be used before the last one has come: then
        every byte is checked. Raises CheckpointError."""
        path, digest, num_bytes = self.folder / f"{name}{SUFFIX}", hashlib.sha256(), 0

        def hashed() -> Iterator[bytes]:
            nonlocal num_bytes
            for chunk in self.disk.chunks(path):
                digest.update(chunk)
                num_bytes += len(chunk)
                yield chunk

        try:
            if path.name not in self.files:
                raise ValueError(f"{path.name} is not in the manifest")
            record = self.files[path.name]
            yield from stream_shard(hashed(), record.bytes, wanted)
            check_digest(path, num_bytes, digest.hexdigest(), record)
        except (OSError, ValueError) as error:
            raise self._changed(error) from None

    def layout(self) -> dict[str, Any] | None:
        """What lies where, of a checkpoint that several ranks wrote; None of any other. Raises CheckpointError."""
        if LAYOUT not in self.files:
            return None
        try:
            return _read_object(self.folder, LAYOUT, self.files, self.disk)
        except (OSError, ValueError) as error:
            raise self._changed(error) from None

    def _changed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            "E-CKPT-CORRUPT",
            what=f"step {self.step} changed since it was verified: {reason_of(error)}",
            where=self.folder,
            next="run the same command again: it goes on from the checkpoint before",
        )


@dataclass(frozen=True)
class Attempt:
    """An attempt folder, and what its manifest says."""

    step: int
    number: int
    folder: Path
    is_committed: bool
    manifest: Manifest | None
    """None where there is none or it cannot be read."""
    fault: str | None
    """Why a committed one cannot be used, as far as names and sizes tell; None if it looks whole."""

    @property
    def is_ours(self) -> bool:
        """Whether its folder has a name that a save gives."""
        return ATTEMPT_FOLDER.fullmatch(self.folder.name) is not None


def find_attempts(root: Path, run_id: str, disk: Disk) -> list[Attempt]:
    """Every attempt folder, by step and attempt; links are never followed. Raises CheckpointError if unreadable."""
    try:
        if not root.exists():
            return []
        return sorted(
            _scan(root, run_id, disk), key=lambda attempt: (attempt.step, attempt.number, attempt.folder.name)
        )
    except OSError as error:
        raise CheckpointError(
            "E-CKPT-ROOT",
            what=f"cannot look for checkpoints: {reason_of(error)}",
            where=root,
            next="choose another folder, or let this user read it",
        ) from None


def _scan(root: Path, run_id: str, disk: Disk) -> Iterator[Attempt]:
    for parent in root.iterdir():
        step = STEP_FOLDER.fullmatch(parent.name)
        if step is None or parent.is_symlink() or not parent.is_dir():
            continue
        for folder in parent.iterdir():
            if not folder.name.startswith("attempt-") or folder.is_symlink() or not folder.is_dir():
                continue
            match = ATTEMPT_FOLDER.fullmatch(folder.name)
            manifest, fault, is_committed = None, None, (folder / MANIFEST).exists()
            if is_committed:
                try:
                    manifest = read_manifest(folder, disk)
                    fault = _fault(folder, int(step[1]), run_id, manifest)
                except (OSError, ValueError) as error:
                    fault = reason_of(error)
            yield Attempt(int(step[1]), int(match[1]) if match else 0, folder, is_committed, manifest, fault)


def read_manifest(folder: Path, disk: Disk) -> Manifest:
    """The manifest of a committed attempt. Raises ValueError or OSError."""
    path = folder / MANIFEST
    if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError("the manifest is damaged")
    return decode_manifest(disk.read(path))


def _fault(folder: Path, step: int, run_id: str, manifest: Manifest) -> str | None:
    """What names and sizes show to be wrong with a committed attempt; None if nothing."""
    if manifest.run_id != run_id:
        return f"it is of another run ({manifest.run_id!r}, not {run_id!r})"
    if manifest.step != step or manifest.attempt != folder.name:
        return f"the manifest is of step {manifest.step}, {manifest.attempt}"
    if STATE not in manifest.files:
        return f"{STATE} is not in the manifest"
    present = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
    for name in sorted(present.keys() | manifest.files.keys()):
        if name not in present:
            return f"{name} is missing"
        if name not in manifest.files:
            return f"{name} is not in the manifest"
        if present[name].is_symlink() or not present[name].is_file():
            return f"{name} is not a file"
        num_bytes = present[name].stat().st_size
        if num_bytes != manifest.files[name].bytes:
            return f"{name} has {num_bytes} bytes, not {manifest.files[name].bytes}"
    return None


def verified_state(folder: Path, run_id: str, manifest: Manifest, disk: Disk) -> dict[str, Any]:
    """Read every byte of a committed attempt; returns its state. Raises ValueError or OSError for any fault."""
    if fault := _fault(folder, manifest.step, run_id, manifest):
        raise ValueError(fault)
    verify_files(folder, manifest.files, disk)
    return _read_object(folder, STATE, manifest.files, disk)


def verify_files(folder: Path, files: Mapping[str, FileRecord], disk: Disk) -> None:
    """Read every byte of files of a checkpoint. Raises ValueError or OSError for any fault."""
    for name, record in files.items():
        if name.endswith(SUFFIX):
            _check_shard(disk, folder / name, record)
        elif name in (STATE, LAYOUT):
            _read_object(folder, name, files, disk)
        else:
            raise ValueError(f"{name} is no file of a checkpoint")


def _read_object(folder: Path, name: str, files: Mapping[str, FileRecord], disk: Disk) -> dict[str, Any]:
    try:
        value = json.loads(_checked_bytes(disk, folder / name, files.get(name)))
    except RecursionError:
        raise ValueError(f"{name} is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def _check_shard(disk: Disk, path: Path, record: FileRecord) -> None:
    """Compare a shard with its hash and look at its header, without holding it in memory."""
    digest, head, num_bytes, end = hashlib.sha256(), b"", 0, 8
    for chunk in disk.chunks(path):
        digest.update(chunk)
        num_bytes += len(chunk)
        if len(head) < end:
            head += chunk
            end = 8 + min(int.from_bytes(head[:8], "little"), MAX_HEADER_BYTES)
    check_digest(path, num_bytes, digest.hexdigest(), record)
    try:
        check_header(head[: header_bytes(head, num_bytes)], num_bytes)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def check_digest(path: Path, num_bytes: int, sha256: str, record: FileRecord) -> None:
    """Raise ValueError unless size and SHA-256 of what was read are the recorded ones."""
    if num_bytes != record.bytes:
        raise ValueError(f"{path.name} has {num_bytes} bytes, not {record.bytes}")
    if sha256 != record.sha256:
        raise ValueError(f"{path.name} is not what was written (SHA-256 differs)")


def _checked_bytes(disk: Disk, path: Path, record: FileRecord | None) -> bytes:
    """A file's bytes, read once and compared with its size and hash. Raises ValueError or OSError."""
    if record is None:
        raise ValueError(f"{path.name} is not in the manifest")
    num_bytes = path.stat().st_size
    # the size first: what grew must not be read into memory
    if num_bytes != record.bytes:
        raise ValueError(f"{path.name} has {num_bytes} bytes, not {record.bytes}")
    data = disk.read(path)
    check_digest(path, len(data), hashlib.sha256(data).hexdigest(), record)
    return data


def reason_of(error: BaseException) -> str:
    """What the system says, without path and number; else the error's own words."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
