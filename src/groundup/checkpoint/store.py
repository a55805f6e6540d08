"""Training checkpoints: safetensors and JSON in an attempt folder of their own, committed by renaming a manifest.

`checkpoints/step-000500/attempt-ID/` holds `*.safetensors`, `state.json` and `MANIFEST.json` with the size and
SHA-256 of each file. What has no valid manifest does not count; a committed folder is never written into again.
"""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.base.errors import CheckpointError, DataError
from groundup.base.failpoints import reach
from groundup.base.files import read_json, sha256_of, sync_file, sync_folder, write_json
from groundup.base.log import Log

MANIFEST = "MANIFEST.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    step: int
    folder: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of `NAME.safetensors`."""
        return load_file(self.folder / f"{name}.safetensors")


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write and commit one checkpoint; `tensors` by file name. Raises CheckpointError when the disk refuses."""
    folder = root / f"step-{step:06d}" / f"attempt-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            reach("ckpt.before_shard")
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in group.items()}, folder / f"{name}.safetensors"
            )
        write_json(folder / STATE, dict(state))
        reach("ckpt.before_fsync")
        files = {}
        for path in sorted(folder.iterdir()):
            sync_file(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        sync_folder(folder)
        reach("ckpt.before_manifest")
        write_json(folder / MANIFEST, {"step": step, "files": files})
        sync_folder(root / f"step-{step:06d}")
        sync_folder(root)
        reach("ckpt.after_manifest")
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        shutil.rmtree(folder, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            "E-DISK",
            what=f"cannot save step {step}: {reason}",
            where=folder,
            next="free disk space and run the same command again; earlier checkpoints are kept",
        ) from None
    return folder


def committed_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint with a manifest, newest step first."""
    found = []
    for path in root.glob(f"step-*/attempt-*/{MANIFEST}"):
        step = path.parent.parent.name.removeprefix("step-")
        if step.isdigit():
            found.append((int(step), path.parent))
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def _fault(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint; None if every byte is as it was written."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
        if f"step-{manifest['step']:06d}" != folder.parent.name:
            return "the manifest is of another step"
        return None if STATE in files else f"{STATE} is not in the manifest"
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"the manifest is damaged ({type(error).__name__})"


def newest_checkpoint(root: Path, log: Log) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written; None where none was ever committed.

    A damaged one is named and passed over. Raises CheckpointError if checkpoints exist and none can be used.
    """
    candidates = committed_folders(root)
    for step, folder in candidates:
        fault = _fault(folder)
        if fault is None:
            return Checkpoint(step, folder, read_json(folder / STATE))
        log.warn("W-CKPT-CORRUPT", f"step {step} is passed over: {fault} at {folder}")
    if candidates:
        raise CheckpointError(
            "E-CKPT-NONE-LOADABLE",
            what=f"{len(candidates)} checkpoints found, 0 loadable",
            where=root,
            next="restore one, or begin again with `--restart`",
        )
    return None


def retain(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, once the newest is verified; torn attempts do not count."""
    candidates = committed_folders(root)
    if not candidates or _fault(candidates[0][1]) is not None:
        return
    kept = {folder for _, folder in candidates[:keep]}
    for folder in _attempts(root):
        if folder not in kept:
            reach("ckpt.before_purge")
            shutil.rmtree(folder)
    for folder in root.glob("step-*"):
        if not any(folder.iterdir()):
            folder.rmdir()


def _attempts(root: Path) -> Iterator[Path]:
    yield from sorted(root.glob("step-*/attempt-*"))
