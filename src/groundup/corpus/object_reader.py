"""Rows as whole objects, for data whose rows are more than one text: chats."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from groundup.base.errors import DataError
from groundup.corpus.json_reader import split_array
from groundup.corpus.rows import BadRow, RowFault
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream, Chunk, split_lines
from groundup.corpus.strict_json import parse_object

MAX_ROW_BYTES = 16 << 20
MAX_EXPANSION_RATIO = 200
PARQUET_BATCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """One row as its fields and its bytes, with its place."""

    fields: dict[str, Any]
    raw: bytes
    file: str
    offset: int
    """Byte in the (decompressed) file where the row begins; in parquet, which has none, the row's number."""
    line: int | None


def read_objects(file: SourceFile) -> Iterator[ObjectRow | BadRow]:
    """Rows of a jsonl, json (one array) or parquet file, in order.

    Raises DataError for another format, a damaged parquet file, and after the last row if the file ends too early.
    """
    if file.format == "parquet":
        yield from _read_parquet(file)
        return
    if file.format not in ("jsonl", "json"):
        raise DataError(
            "E-FORMAT",
            what=f"chats are not read from {file.format} files",
            where=file.name,
            next="give jsonl, a JSON array or parquet, each also as .gz or .zst",
        )
    stream = ByteStream(file.path, file.name, file.compression, MAX_EXPANSION_RATIO)
    for chunk in _chunks(stream, can_be_array=file.format == "json"):
        offset = stream.start + chunk.offset
        if chunk.data is None:
            yield BadRow("W-ROW-SIZE", f"{chunk.num_bytes:,} bytes", file.name, offset, b"", chunk.number)
        elif chunk.data.strip() or chunk.is_cut:
            try:
                fields = parse_object(chunk.data, is_cut=chunk.is_cut)
                yield ObjectRow(fields, chunk.data, file.name, offset, chunk.number)
            except RowFault as fault:
                yield BadRow(fault.code, fault.detail, file.name, offset, chunk.data, chunk.number)
    if stream.fault is not None:
        raise stream.fault


def _chunks(stream: ByteStream, *, can_be_array: bool) -> Iterable[Chunk]:
    blocks = stream.blocks()
    head = b""
    for block in blocks:
        head += block
        if head.strip():
            break
    whole = itertools.chain([head], blocks)
    is_array = can_be_array and head.lstrip().startswith(b"[")
    return split_array(whole, MAX_ROW_BYTES) if is_array else split_lines(whole, MAX_ROW_BYTES)


def _read_parquet(file: SourceFile) -> Iterator[ObjectRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.compression is not None:
        raise DataError(
            "E-FORMAT", what="a compressed parquet file", where=file.name, next="unpack it: parquet compresses itself"
        )
    try:
        number = 0
        for batch in pq.ParquetFile(file.path).iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for fields in batch.to_pylist():
                yield ObjectRow(fields, b"", file.name, number, None)
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            "E-DATA-DAMAGED",
            what=f"cannot read the parquet file: {str(error).splitlines()[0]}",
            where=file.name,
            next="mend or remove the file",
        ) from None
