"""JSON lines and JSON arrays: each row cut out of the bytes first, then parsed on its own."""

import itertools
import re
from collections.abc import Iterable, Iterator

from groundup.corpus.rows import BadRow, Row, RowFault
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream, Chunk, split_lines
from groundup.corpus.strict_json import parse_row

_OUTSIDE_STRING = re.compile(rb'["\[\]{},]')
_INSIDE_STRING = re.compile(rb'["\\]')


def read_jsonl(file: SourceFile, stream: ByteStream, text_field: str, max_bytes: int) -> Iterator[Row | BadRow]:
    """A row for each line that is not blank."""
    yield from _parse(file, stream, split_lines(stream.blocks(), max_bytes), text_field)


def read_json(file: SourceFile, stream: ByteStream, text_field: str, max_bytes: int) -> Iterator[Row | BadRow]:
    """A row for each element of the file's one array; a file that does not begin with `[` is read as JSON lines."""
    blocks = stream.blocks()
    head = b""
    for block in blocks:
        head += block
        if head.strip():
            break
    whole = itertools.chain([head], blocks)
    is_array = head.lstrip().startswith(b"[")
    chunks = split_array(whole, max_bytes) if is_array else split_lines(whole, max_bytes)
    yield from _parse(file, stream, chunks, text_field)


def _parse(file: SourceFile, stream: ByteStream, chunks: Iterable[Chunk], text_field: str) -> Iterator[Row | BadRow]:
    for chunk in chunks:
        offset = stream.start + chunk.offset
        if chunk.data is None:
            detail = f"{chunk.num_bytes:,} bytes"
            yield BadRow("W-ROW-SIZE", detail, file.name, offset, b"", chunk.number)
            continue
        if not chunk.data.strip() and not chunk.is_cut:
            continue
        try:
            text, own_id = parse_row(chunk.data, text_field, is_cut=chunk.is_cut)
        except RowFault as fault:
            yield BadRow(fault.code, fault.detail, file.name, offset, chunk.data, chunk.number)
        else:
            yield Row(own_id or f"{file.name}:{chunk.number}", text, file.source, file.name, offset)


def split_array(blocks: Iterable[bytes], max_bytes: int) -> Iterator[Chunk]:
    """Elements of a top-level array, found by strings and brackets alone; what follows the array is one more chunk."""
    depth = offset = 0
    number = 1
    position = 0
    """Bytes of the file before the block at hand."""
    held, num_held = bytearray(), 0
    is_open = in_string = is_escaped = False

    def keep(data: bytes) -> None:
        nonlocal num_held
        num_held += len(data)
        if num_held <= max_bytes:
            held.extend(data)
        else:
            held.clear()

    def finish(next_offset: int, *, is_cut: bool = False) -> Chunk:
        nonlocal number, offset, num_held
        data = bytes(held) if num_held <= max_bytes else None
        indent = len(data) - len(data.lstrip()) if data is not None else 0
        data = data.strip() if data is not None else None
        chunk = Chunk(offset + indent, number, num_held if data is None else len(data), data, is_cut)
        held.clear()
        number, offset, num_held = number + 1, next_offset, 0
        return chunk

    for block in blocks:
        at = begin = 0
        while at < len(block):
            if is_escaped:
                is_escaped = False
                at += 1
                continue
            match = (_INSIDE_STRING if in_string else _OUTSIDE_STRING).search(block, at)
            if match is None:
                break
            at = match.end()
            char = match.group()
            if char == b"\\":
                is_escaped = True
            elif char == b'"':
                in_string = not in_string
            elif char in b"[{":
                depth += 1
                if not is_open:
                    is_open, begin, offset, num_held = True, at, position + at, 0
                    held.clear()
            elif char == b"," and depth == 1:
                keep(block[begin : at - 1])
                yield finish(position + at)
                begin = at
            elif char in b"]}" and depth > 0:
                depth -= 1
                if depth == 0:
                    keep(block[begin : at - 1])
                    if num_held > max_bytes or held.strip():
                        yield finish(position + at)
                    offset, num_held, begin = position + at, 0, at
                    held.clear()
        keep(block[begin:])
        position += len(block)
    if num_held > max_bytes or held.strip():
        yield finish(position, is_cut=depth > 1 or in_string)
    if depth == 1 and not in_string:
        yield Chunk(position, number, 0, b"", is_cut=True)  # the array has no end
