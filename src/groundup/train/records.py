"""The jsonl files of a run: metrics (reproducible values only), timing and events."""

import json
import os
from pathlib import Path
from typing import Any

from groundup.base.disk import Disk


class JsonLines:
    """A file of JSON lines, appended to line by line."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None, disk: Disk | None = None) -> None:
        self.path, self._disk = path, disk or Disk()
        self._file = os.fdopen(self._disk.append_to(path), "ab", buffering=0)
        self._disk.sync_folder(path.parent)  # a checkpoint counts on the file: its name must be sure before
        if keep_bytes is not None:
            self.cut(min(keep_bytes, path.stat().st_size))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line and hand it to the system."""
        line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._disk.write(self._file.fileno(), memoryview(line))

    def cut(self, keep_bytes: int) -> None:
        """Drop everything after the first `keep_bytes` bytes."""
        self._disk.cut(self._file.fileno(), keep_bytes)

    def num_bytes(self) -> int:
        """Length of the file, on the disk."""
        self._disk.sync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

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
