"""What two runs of a training stage left, compared bit by bit, and by how much they differ where they do."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundup.base.artifact import CHECKPOINTS, MANIFEST
from groundup.base.errors import CheckpointError

KINDS = ("weights", "optimizer", "metrics")
HEADER_BYTES = 8


@dataclass(frozen=True)
class Evidence:
    """SHA-256 of a finished stage's weights, of its last checkpoint's tensors, and of its metrics."""

    weights: str
    optimizer: str
    metrics: str

    def differing(self, other: "Evidence") -> list[str]:
        """Which of the three are not the same bits."""
        return [kind for kind in KINDS if getattr(self, kind) != getattr(other, kind)]


def evidence_of(stage: Path) -> Evidence:
    """What a finished stage's folder holds. Raises CheckpointError where a part is missing."""
    files = weight_files(stage)
    checkpoint = last_checkpoint(stage)
    metrics = stage / "metrics.jsonl"
    if not files or checkpoint is None or not metrics.is_file():
        raise CheckpointError("E-PROOF-NONE", what="no finished training stage", where=stage, next="run it first")
    return Evidence(
        _digest(part for path in files for part in _named_tensors(path)),
        _digest(part for path in sorted(checkpoint.rglob("*.safetensors")) for part in _named_tensors(path)),
        hashlib.sha256(metrics.read_bytes()).hexdigest(),
    )


def weight_files(stage: Path) -> list[Path]:
    """The weights a stage made: a model's, or an adapter's."""
    return sorted([*(stage / "model").glob("*.safetensors"), *(stage / "adapter").glob("*.safetensors")])


def last_checkpoint(stage: Path) -> Path | None:
    """Folder of the committed checkpoint with the highest step."""
    found = [path.parent for path in (stage / CHECKPOINTS).glob(f"step-*/*/{MANIFEST}")]
    return max(found, key=lambda folder: (folder.parent.name, folder.name), default=None)


def largest_difference(ours: Path, theirs: Path) -> float:
    """Largest absolute difference of the weights of two finished stages; infinite where names or shapes differ."""
    largest = 0.0
    pairs = list(zip(weight_files(ours), weight_files(theirs), strict=True))
    for mine, other in pairs:
        left, right = dict(_named_values(mine)), dict(_named_values(other))
        if {name: value.shape for name, value in left.items()} != {name: value.shape for name, value in right.items()}:
            return float("inf")
        for name, value in left.items():
            if value.size:
                largest = max(largest, float(np.abs(value - right[name]).max()))
    return largest


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, str, list[int], memoryview]]:
    """(name, dtype, shape, bytes) of each tensor of a safetensors file, by name; its metadata does not count."""
    data = memoryview(path.read_bytes())
    start = HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES], "little")
    header = json.loads(bytes(data[HEADER_BYTES:start]))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        yield name, entry["dtype"], entry["shape"], data[start + begin : start + end]


def _named_tensors(path: Path) -> Iterator[bytes]:
    for name, dtype, shape, data in _tensors(path):
        yield f"{path.name}\0{name}\0{dtype}\0{shape}\0{len(data)}\n".encode()
        yield bytes(data)


def _named_values(path: Path) -> Iterator[tuple[str, NDArray[np.float64]]]:
    for name, dtype, shape, data in _tensors(path):
        if dtype == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])
        yield name, values.astype(np.float64).reshape(shape)
