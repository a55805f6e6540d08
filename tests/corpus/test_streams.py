"""Bytes and lines: byte order marks, encodings, truncation, bombs, and lines over the limit."""

import gzip
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from groundup.base.errors import DataError
from groundup.corpus.streams import ByteStream, split_lines

COMPRESS = {
    "gz": gzip.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def stream_of(tmp_path: Path, data: bytes, compression: str | None = None, ratio: int = 200) -> ByteStream:
    path = tmp_path / "file"
    path.write_bytes(data)
    return ByteStream(path, "file", compression, ratio)


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_members_one_after_another_are_one_file(tmp_path, compression):
    compress = COMPRESS[compression]
    stream = stream_of(tmp_path, compress(b"one\n" * 50_000) + compress(b"two") + compress(b""), compression)
    assert b"".join(stream.blocks()) == b"one\n" * 50_000 + b"two"
    assert stream.fault is None


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_cut_file_gives_what_was_read_then_its_fault(tmp_path, compression):
    text = random.Random(0).randbytes(300_000).hex().encode()
    packed = COMPRESS[compression](text)
    stream = stream_of(tmp_path, packed[: len(packed) // 2], compression)
    got = b"".join(stream.blocks())
    assert len(got) > 100_000 and text.startswith(got)
    assert stream.fault is not None and stream.fault.code == "E-DATA-TRUNC"
    assert f"compressed byte {len(packed) // 2}" in stream.fault.line()


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_damage_is_named(tmp_path, compression):
    packed = bytearray(COMPRESS[compression](random.Random(0).randbytes(200_000)))
    packed[:4] = b"\0\0\0\0"
    stream = stream_of(tmp_path, bytes(packed), compression)
    assert b"".join(stream.blocks()) == b""
    assert stream.fault is not None and stream.fault.code == "E-DATA-DAMAGED"


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_bomb_is_stopped_early(tmp_path, compression):
    stream = stream_of(tmp_path, COMPRESS[compression](bytes(100_000_000)), compression)
    num_bytes = 0
    with pytest.raises(DataError) as caught:
        for block in stream.blocks():
            num_bytes += len(block)
    assert caught.value.code == "E-BOMB"
    assert num_bytes < 70_000_000
    assert sum(map(len, stream_of(tmp_path, COMPRESS[compression](bytes(1 << 20)), compression).blocks())) == 1 << 20


def test_byte_order_mark_is_dropped_at_the_start_only(tmp_path):
    stream = stream_of(tmp_path, b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert b"".join(stream.blocks()) == b"a\xef\xbb\xbf" and stream.start == 3
    assert list(stream_of(tmp_path, b"\xef\xbb\xbf").blocks()) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compression", [None, "gz"])
def test_utf16_is_refused(tmp_path, encoding, compression):
    data = "Hello world, this is text\n".encode(encoding)
    with pytest.raises(DataError) as caught:
        list(stream_of(tmp_path, gzip.compress(data) if compression else data, compression).blocks())
    assert caught.value.code == "E-ENCODING" and "UTF-16" in caught.value.line()


def test_nul_bytes_alone_are_no_encoding(tmp_path):
    data = b"a\x00b\x00\x00c" * 100
    assert b"".join(stream_of(tmp_path, data).blocks()) == data


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_lines_are_those_of_split_however_blocks_fall(blocks, max_bytes):
    whole = b"".join(blocks)
    lines = list(split_lines(blocks, max_bytes))
    expected = whole.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert whole[line.offset : line.offset + line.num_bytes] == wanted
        if len(wanted) > max_bytes:
            assert line.data is None
        else:
            assert line.data == (wanted if line.is_cut else wanted.removesuffix(b"\r"))
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert [line.is_cut for line in lines] == [False] * (len(lines) - 1) + [bool(whole) and whole[-1:] != b"\n"] * bool(
        lines
    )


def test_a_line_without_end_is_never_held():
    def endless() -> Iterator[bytes]:
        yield b"first\n"
        block = b"x" * (1 << 20)
        for _ in range(1000):
            yield block
        yield b"\nlast\n"

    tracemalloc.start()
    first, huge, last = split_lines(endless(), 4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first.data, huge.data, last.data) == (b"first", None, b"last")
    assert huge.num_bytes == 1000 << 20 and last.offset == (1000 << 20) + 7
    assert peak < 3 * (4 << 20)
