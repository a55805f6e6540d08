"""The cleaned corpus on disk: shards of zstd-compressed JSON lines, one document a line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import orjson
import zstandard

from groundup.base.errors import DataError
from groundup.base.failpoints import reach

SHARD_BYTES = 256 << 20
ZSTD_LEVEL = 3
WRITE_BYTES = 1 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus; `meta` holds `file` and `offset`, the place it was read from."""

    id: str
    text: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    def as_line(self) -> bytes:
        """The document as one line of a shard, newline included."""
        row = {"id": self.id, "text": self.text, "source": self.source, "meta": self.meta}
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def explain_full_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    """Turn "no space left" into a DataError that names the folder and the bytes that did not fit."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            "E-DISK",
            what=f"the disk is full: at least {num_bytes:,} bytes more are needed",
            where=folder,
            next="free some space and run the same command again",
        ) from None


class ShardWriter:
    """Writes lines into `corpus-00000.jsonl.zst`, `corpus-00001…`: equal lines give equal bytes."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.num_documents = 0
        self._shard_bytes = shard_bytes
        self._num_shards = 0
        self._room = 0
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._stream: zstandard.ZstdCompressionWriter | None = None

    def write(self, line: bytes) -> None:
        """Append a document's line (`Document.as_line`)."""
        if self._stream is None or len(line) > self._room:
            self._next_shard()
        self._room -= len(line)
        self._buffer += line
        self.num_documents += 1
        if len(self._buffer) >= WRITE_BYTES:
            self._flush()

    def _next_shard(self) -> None:
        self._finish_shard()
        with explain_full_disk(self.folder, WRITE_BYTES):
            self._file = (self.folder / f"corpus-{self._num_shards:05d}.jsonl.zst").open("wb")
        # one thread and a fixed level: more threads would give other bytes
        self._stream = zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(self._file, closefd=False)
        self._num_shards += 1
        self._room = self._shard_bytes

    def _flush(self) -> None:
        if self._stream is not None and self._buffer:
            with explain_full_disk(self.folder, len(self._buffer)):
                reach("corpus.write")
                self._stream.write(bytes(self._buffer))
            self._buffer.clear()

    def _finish_shard(self) -> None:
        self._flush()
        if self._stream is not None and self._file is not None:
            with explain_full_disk(self.folder, WRITE_BYTES):
                self._stream.flush(zstandard.FLUSH_FRAME)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
        elif self._file is not None:
            self._file.close()


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a corpus folder, in order."""
    return sorted(folder.glob("corpus-*.jsonl.zst"))


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a zstd-compressed file, without their newlines."""
    rest = b""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        while block := stream.read(READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    if rest:
        yield rest


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents of a corpus folder, in source order."""
    for path in shard_paths(folder):
        for line in read_lines(path):
            yield Document(**orjson.loads(line))


def count_documents(folder: Path) -> int:
    """How many documents a corpus folder holds."""
    return sum(1 for path in shard_paths(folder) for _ in read_lines(path))
