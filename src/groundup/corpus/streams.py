"""Bytes of source files: plain, gzip or zstd, in blocks of bounded size, and the lines in them."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

from groundup.base.errors import DataError
from groundup.corpus.sources import Compression

BLOCK_BYTES = 256 << 10
GZIP_INPUT_BYTES = 16 << 10
ZSTD_INPUT_BYTES = 2 << 10
"""zstd packs up to 32,768:1, so small inputs keep a block of a bomb under 64 MiB before its ratio is looked at."""
HARMLESS_BYTES = 1 << 20
"""A file that grows to no more than this is no bomb, whatever its ratio."""
HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class ByteStream:
    """A source file's decompressed bytes without a UTF-8 byte order mark at their start.

    A compressed file that ends too early or is damaged gives what was read and then sets `fault`.
    """

    def __init__(self, path: Path, name: str, compression: Compression, max_expansion_ratio: int) -> None:
        self.path, self.name, self.compression = path, name, compression
        self.fault: DataError | None = None
        self.start = 0
        """Bytes of the byte order mark that was dropped: the offset of the first byte given."""
        self._max_expansion_ratio = max_expansion_ratio

    def blocks(self) -> Iterator[bytes]:
        """The bytes in blocks. Raises DataError for UTF-16 and for a file that grows without measure."""
        blocks = self._plain() if self.compression is None else self._decompressed()
        head = b""
        for block in blocks:
            head += block
            if len(head) >= HEAD_BYTES:
                break
        self._refuse_utf16(head[:HEAD_BYTES])
        if head.startswith(BOM):
            self.start = len(BOM)
            head = head[len(BOM) :]
        if head:
            yield head
        yield from blocks

    def _plain(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def _decompressed(self) -> Iterator[bytes]:
        input_bytes = GZIP_INPUT_BYTES if self.compression == "gz" else ZSTD_INPUT_BYTES
        num_in = num_out = 0
        decompressor: _Decompressor | None = None
        with self.path.open("rb") as file:
            while data := file.read(input_bytes):
                num_in += len(data)
                while data:
                    decompressor = decompressor or self._new_decompressor()
                    try:
                        block = decompressor.decompress(data)
                    except (zlib.error, zstandard.ZstdError) as error:
                        self.fault = DataError(
                            "E-DATA-DAMAGED",
                            what=f"cannot decompress: {error}",
                            where=f"{self.name} near compressed byte {num_in}",
                            next="mend or remove the file",
                        )
                        return
                    num_out += len(block)
                    if num_out > max(HARMLESS_BYTES, self._max_expansion_ratio * num_in):
                        raise DataError(
                            "E-BOMB",
                            what=f"{num_in:,} bytes grew to {num_out:,}, more than {self._max_expansion_ratio} times",
                            where=self.name,
                            next="remove the file, or raise corpus.max_expansion_ratio if you trust it",
                        )
                    if block:
                        yield block
                    data = b""
                    if decompressor.eof:  # gzip and zstd files may hold several members
                        data, decompressor = decompressor.unused_data, None
        if decompressor is not None:
            self.fault = DataError(
                "E-DATA-TRUNC",
                what="the compressed file ends too early",
                where=f"{self.name} at compressed byte {num_in}",
                next="fetch it again, or set corpus.allow_truncated to go on with what was read",
            )

    def _new_decompressor(self) -> _Decompressor:
        if self.compression == "gz":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor().decompressobj()

    def _refuse_utf16(self, head: bytes) -> None:
        even, odd = head[::2].count(0), head[1::2].count(0)
        guess = None
        if head.startswith(b"\xff\xfe") or (odd > len(head) * 0.3 and even < odd * 0.05):
            guess = "UTF-16LE"
        elif head.startswith(b"\xfe\xff") or (even > len(head) * 0.3 and odd < even * 0.05):
            guess = "UTF-16BE"
        if guess:
            raise DataError(
                "E-ENCODING", what=f"looks like {guess}, want UTF-8", where=self.name, next="convert it with `iconv`"
            )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A line or a JSON array's element: its place and bytes."""

    offset: int
    number: int
    """Number of the line or element, from 1."""
    num_bytes: int
    data: bytes | None
    """None where it is larger than the limit and was not held."""
    is_cut: bool = False
    """Whether the file ends before the chunk's own end."""


def split_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[Chunk]:
    r"""Lines, split at b"\n" only; a b"\r" before it is dropped. Lines over the limit are counted, never held."""
    offset, number, skipped = 0, 1, 0
    held: list[bytes] = []
    num_held = 0
    for block in blocks:
        if skipped:
            end = block.find(b"\n")
            if end < 0:
                skipped += len(block)
                continue
            yield Chunk(offset, number, skipped + end, None)
            offset, number, skipped, block = offset + skipped + end + 1, number + 1, 0, block[end + 1 :]
        held.append(block)
        num_held += len(block)
        if b"\n" in block:
            *lines, rest = b"".join(held).split(b"\n")
            for line in lines:
                yield Chunk(offset, number, len(line), line.removesuffix(b"\r") if len(line) <= max_bytes else None)
                offset, number = offset + len(line) + 1, number + 1
            held, num_held = [rest], len(rest)
        if num_held > max_bytes:
            skipped, held, num_held = num_held, [], 0
    if skipped:
        yield Chunk(offset, number, skipped, None, is_cut=True)
    elif num_held:
        yield Chunk(offset, number, num_held, b"".join(held), is_cut=True)
