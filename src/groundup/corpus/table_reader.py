"""Tables: CSV with a header, and parquet."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.base.errors import DataError
from groundup.corpus.rows import BadRow, Row, RowFault
from groundup.corpus.sources import SourceFile
from groundup.corpus.storage import explain_full_disk
from groundup.corpus.streams import ByteStream, split_lines
from groundup.corpus.strict_json import check_id, check_text

PARQUET_BATCH_ROWS = 128


def read_csv(file: SourceFile, stream: ByteStream, text_field: str, max_bytes: int) -> Iterator[Row | BadRow]:
    """Rows of a comma-separated file with a header. Raises DataError where the header lacks the text field."""
    csv.field_size_limit(max_bytes)
    lines = _CsvLines(stream, max_bytes)
    reader = csv.reader(lines)
    header: list[str] | None = None
    while True:
        lines.begin_row()
        fault: RowFault | None = None
        values: list[str] = []
        try:
            values = next(reader)
        except StopIteration:
            if lines.oversize is None:
                return
        except csv.Error as error:
            fault = RowFault("W-ROW-SIZE" if "field limit" in str(error) else "W-CSV", str(error))
        if lines.oversize is not None:
            fault = RowFault("W-ROW-SIZE", f"{lines.oversize:,} bytes")
        elif fault is None and not values:
            continue
        if header is None and fault is None:
            header = values
            if text_field not in header:
                raise _no_column(file, text_field, header)
            continue
        try:
            if fault is not None:
                raise fault
            assert header is not None
            if any(values[len(header) :]):  # a comma without quotes would cut the text there
                raise RowFault(
                    "W-CSV", f"{len(values)} fields, the header names {len(header)}: quote a text with commas"
                )
            row = dict(zip(header, values, strict=False))
            yield _as_row(row.get(text_field), row.get("id"), lines, file, text_field)
        except RowFault as caught:
            raw = b"" if lines.oversize is not None else b"\n".join(lines.raw)
            yield BadRow(caught.code, caught.detail, file.name, lines.offset, raw, lines.number)
            if header is None:
                raise _no_column(file, text_field, []) from None


def _as_row(text: object, own_id: object, lines: "_CsvLines", file: SourceFile, text_field: str) -> Row:
    for line in lines.raw:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowFault("W-UTF8", f"byte {error.start} of the line is not UTF-8") from None
    if text is None:
        raise RowFault("W-FIELD-TYPE", f"{text_field}: missing")
    return Row(
        check_id(own_id) or f"{file.name}:{lines.number}",
        check_text(text, text_field),
        file.source,
        file.name,
        lines.offset,
    )


class _CsvLines:
    """Lines as the csv module wants them, with the raw bytes and the place of the row it is putting together."""

    def __init__(self, stream: ByteStream, max_bytes: int) -> None:
        self._stream = stream
        self._chunks = split_lines(stream.blocks(), max_bytes)
        self.begin_row()

    def begin_row(self) -> None:
        self.raw: list[bytes] = []
        self.offset = self.number = 0
        self.oversize: int | None = None

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            if not self.raw and self.oversize is None:
                self.offset, self.number = self._stream.start + chunk.offset, chunk.number
            if chunk.data is None:
                self.oversize = chunk.num_bytes
                yield '""\n'  # keeps the reader's state; the row it lands in is set aside
                continue
            self.raw.append(chunk.data)
            yield chunk.data.decode("utf-8", "surrogateescape") + "\n"


def read_parquet(
    file: SourceFile, stream: ByteStream, text_field: str, max_bytes: int, max_expansion_ratio: int
) -> Iterator[Row | BadRow]:
    """Rows of a parquet file. Raises DataError for a damaged file or a text field that is missing or not of strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.NamedTemporaryFile() as spill:
        path = file.path
        if file.compression is not None:  # parquet is read from its end
            for block in stream.blocks():
                with explain_full_disk(Path(tempfile.gettempdir()), len(block)):
                    spill.write(block)
            spill.flush()
            path = Path(spill.name)
            if stream.fault is not None:
                return
        try:
            yield from _parquet_rows(pa, pq, path, file, text_field, max_bytes, max_expansion_ratio)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                "E-DATA-DAMAGED",
                what=f"cannot read the parquet file: {str(error).splitlines()[0]}",
                where=file.name,
                next="mend or remove the file",
            ) from None


def _parquet_rows(
    pa: Any, pq: Any, path: Path, file: SourceFile, text_field: str, max_bytes: int, max_expansion_ratio: int
) -> Iterator[Row | BadRow]:
    table = pq.ParquetFile(path)
    names = table.schema_arrow.names
    if text_field not in names:
        raise _no_column(file, text_field, names)
    kind = table.schema_arrow.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(
            "E-FIELD-TYPE",
            what=f"the column {text_field!r} holds {kind}, want string",
            where=file.name,
            next="name a column of strings in corpus.text_field",
        )
    has_id = "id" in names and pa.types.is_string(table.schema_arrow.field("id").type)
    columns = [text_field, *(["id"] if has_id else [])]
    number = num_bytes = 0
    limit = max(1 << 20, path.stat().st_size * max_expansion_ratio)
    for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
        # as binary: a damaged string must not end the whole batch
        texts = batch.column(text_field).cast(pa.binary() if not pa.types.is_large_string(kind) else pa.large_binary())
        ids = batch.column("id").cast(pa.binary()) if has_id else [None] * len(texts)
        num_bytes += texts.nbytes
        if num_bytes > limit:
            raise DataError(
                "E-BOMB",
                what=f"{path.stat().st_size:,} bytes grew to {num_bytes:,}",
                where=file.name,
                next="remove the file, or raise corpus.max_expansion_ratio if you trust it",
            )
        for value, own_id in zip(texts, ids, strict=True):
            raw = value.as_py()
            try:
                text, name = _parquet_values(raw, own_id and own_id.as_py(), text_field, max_bytes)
                yield Row(name or f"{file.name}:{number}", text, file.source, file.name, number)
            except RowFault as fault:
                kept = b"" if raw is None or len(raw) > max_bytes else raw
                yield BadRow(fault.code, fault.detail, file.name, number, kept)
            number += 1


def _parquet_values(raw: bytes | None, own_id: bytes | None, text_field: str, max_bytes: int) -> tuple[str, str | None]:
    if raw is None:
        raise RowFault("W-FIELD-TYPE", f"{text_field}: null")
    if len(raw) > max_bytes:
        raise RowFault("W-ROW-SIZE", f"{len(raw):,} bytes")
    try:
        return raw.decode("utf-8"), own_id.decode("utf-8") if own_id else None
    except UnicodeDecodeError as error:
        raise RowFault("W-UTF8", f"byte {error.start} of the text is not UTF-8") from None


def _no_column(file: SourceFile, text_field: str, names: list[str]) -> DataError:
    return DataError(
        "E-FIELD-NONE",
        what=f"no column {text_field!r}; the columns are: {', '.join(names)[:200]}",
        where=file.name,
        next="name the text's column in corpus.text_field",
    )
