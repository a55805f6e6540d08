"""Following the jsonl files of a run while they grow: each line once, a step that was done again as often as it was."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from groundup.base.config import flatten
from groundup.report.read import TRAINING_STAGES, is_number

FILES = ("metrics.jsonl", "timing.jsonl")


@dataclass
class LinesOfFile:
    """What is new in one growing file. A resume or a rewind cuts it: lines that stand as they were are not told again."""

    _told: dict[int, int] = field(default_factory=dict)
    """Hash of the line told last, by step."""
    _offset: int = 0
    _last: bytes = b""
    """The line before the offset: where another stands there, the file was cut."""
    _identity: tuple[int, int] | None = None

    def new(self, path: Path) -> Iterator[dict[str, Any]]:
        """Whole lines that were not told yet."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._offset or not self._is_as_it_was(file):
                    self._offset, self._last = 0, b""
                self._identity = identity
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._last = whole.splitlines(keepends=True)[-1] if whole else self._last
        for line in whole.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            step = value.get("step") if isinstance(value, dict) else None
            if isinstance(step, int) and self._told.get(step) != hash(line):
                self._told[step] = hash(line)
                yield value

    def _is_as_it_was(self, file: IO[bytes]) -> bool:
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last


@dataclass
class RunFollower:
    """What is new in a run, as numbers by name."""

    run: Path
    _files: dict[tuple[str, str], LinesOfFile] = field(default_factory=dict)

    def new(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, numbers) of each new line; names are `pretrain/loss`, `pretrain/val/text/loss`."""
        for stage in TRAINING_STAGES:
            for name in FILES:
                lines = self._files.setdefault((stage, name), LinesOfFile())
                committed = self.run / stage / name
                path = committed if committed.exists() else self.run / ".attempts" / stage / name
                for line in lines.new(path):
                    yield line["step"], _numbers(stage, line)


def _numbers(stage: str, line: dict[str, Any]) -> dict[str, float]:
    values = {name: value for name, value in line.items() if name not in ("step", "expert_load")}
    return {
        f"{stage}/{name.replace('.', '/')}": float(value) for name, value in flatten(values).items() if is_number(value)
    }
