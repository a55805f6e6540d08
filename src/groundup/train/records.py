"""The jsonl files of a run: metrics (reproducible values only), timing and events."""

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON lines, appended to line by line."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        self.path = path
        path.touch()
        if keep_bytes is not None:
            os.truncate(path, min(keep_bytes, path.stat().st_size))
        self._file = path.open("ab")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and hand it to the system."""
        self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def cut(self, keep_bytes: int) -> None:
        """Drop everything after the first `keep_bytes` bytes."""
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)

    def num_bytes(self) -> int:
        """Length of the file, on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoLines(JsonLines):
    """What a rank that writes nothing writes to."""

    def __init__(self) -> None:
        pass

    def write(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def cut(self, keep_bytes: int) -> None:
        """Nothing."""

    def num_bytes(self) -> int:
        """Nothing."""
        return 0

    def close(self) -> None:
        """Nothing."""
