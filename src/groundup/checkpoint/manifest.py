"""The manifest that commits a checkpoint: what the folder must hold, and a hash of itself."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record of a committed checkpoint."""

    step: int
    attempt: str
    """Name of its folder."""
    run_id: str
    metric: float | None
    files: Mapping[str, FileRecord]

    def encode(self) -> bytes:
        """The file: JSON, with the SHA-256 of everything before it as the last entry."""
        content = {"format": FORMAT, **asdict(self)}
        own = hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()
        return (json.dumps({**content, "sha256": own}, indent=2, allow_nan=False) + "\n").encode()


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in a file's bytes. Raises ValueError unless every byte is as `encode` writes it."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise ValueError("the manifest is damaged or of another version")
        value.pop("sha256")
        files = {str(name): FileRecord(**record) for name, record in value.pop("files").items()}
        manifest = Manifest(**value, files=files)
        is_typed = type(manifest.step) is int and all(
            type(record.bytes) is int and type(record.sha256) is str for record in files.values()
        )
        metric = manifest.metric
        if not is_typed or not (metric is None or type(metric) is float) or type(manifest.run_id) is not str:
            raise ValueError("the manifest is damaged")
        is_same = manifest.encode() == data
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("the manifest is damaged or of another version") from error
    if not is_same:
        raise ValueError("the manifest is damaged (its own SHA-256 differs)")
    return manifest
