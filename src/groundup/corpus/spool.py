"""Lines between the two passes of cleaning: written in order, read again in order or one by one."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from groundup.base.failpoints import reach
from groundup.corpus.storage import explain_full_disk


class Spool:
    """A file of lines that is gone afterwards; 8 bytes of memory a line. It needs the corpus's size on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._ends = array("Q", [0])

    def add(self, line: bytes) -> None:
        """Append a line."""
        with explain_full_disk(self._path.parent, len(line)):
            reach("corpus.spool")
            self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def read(self, number: int) -> bytes:
        """The line with this number."""
        start, end = self._ends[number], self._ends[number + 1]
        with explain_full_disk(self._path.parent, end - start):  # seeking writes what is buffered
            self._file.seek(start)
        return self._file.read(end - start)

    def __iter__(self) -> Iterator[bytes]:
        """All lines, in order; each is found by its length, so a line may hold anything."""
        return (self.read(number) for number in range(len(self._ends) - 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        if kind is None:
            self._file.close()
            return
        with explain_full_disk(self._path.parent, 1):
            self._file.close()
