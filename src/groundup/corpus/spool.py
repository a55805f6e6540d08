"""Lines between the two passes of cleaning: written in order, read again in order or one by one."""

import contextlib
import itertools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from groundup.base.failpoints import reach
from groundup.corpus.storage import explain_full_disk

BUFFER_BYTES = 1 << 20


class Spool:
    """A file of lines that is gone afterwards; 8 bytes of memory a line. It needs the corpus's size on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._buffer = bytearray()
        self._ends = array("Q", [0])

    def add(self, line: bytes) -> None:
        """Append a line."""
        self._buffer += line
        self._ends.append(self._ends[-1] + len(line))
        if len(self._buffer) >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was added to the file; needed before reading."""
        with explain_full_disk(self._path.parent, len(self._buffer)):
            reach("corpus.spool")
            self._file.write(self._buffer)
            self._file.flush()
        self._buffer.clear()

    def read(self, number: int) -> bytes:
        """The line with this number."""
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)

    def __iter__(self) -> Iterator[bytes]:
        """All lines, in order; each is found by its length, so a line may hold anything."""
        self._file.seek(0)
        return (self._file.read(end - start) for start, end in itertools.pairwise(self._ends))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # closing tries once more to write what found no room
            self._file.close()
        self._path.unlink(missing_ok=True)
