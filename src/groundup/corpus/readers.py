"""Reading: every row of every source file once, in order, as a Row or as a BadRow with its raw bytes."""

import ast
from collections.abc import Iterator

from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.json_reader import read_json, read_jsonl
from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import ByteStream
from groundup.corpus.table_reader import read_csv, read_parquet
from groundup.corpus.text_reader import read_text


def read_source(file: SourceFile, config: CorpusConfig, log: Log) -> Iterator[Row | BadRow]:
    """All rows of a file. Raises DataError after the last one if the file is compressed and ends too early."""
    stream = ByteStream(file.path, file.name, file.compression, config.max_expansion_ratio)
    yield from _rows(file, stream, config)
    if stream.fault is not None:
        if not (config.allow_truncated and stream.fault.code == "E-DATA-TRUNC"):
            raise stream.fault
        log.warn("W-DATA-TRUNC", f"{stream.fault.what} at {stream.fault.where}")


def _rows(file: SourceFile, stream: ByteStream, config: CorpusConfig) -> Iterator[Row | BadRow]:
    max_bytes, text_field = config.max_document_bytes, config.text_field
    if file.format == "text":
        return read_text(file, stream, config.max_piece_bytes)
    if file.format == "jsonl":
        return read_jsonl(file, stream, text_field, max_bytes)
    if file.format == "json":
        return read_json(file, stream, text_field, max_bytes)
    if file.format == "csv":
        return read_csv(file, stream, text_field, max_bytes)
    if file.format == "parquet":
        return read_parquet(file, stream, text_field, max_bytes, config.max_expansion_ratio)
    return _read_topics(file)


def _read_topics(file: SourceFile) -> Iterator[Row]:
    """One row a topic of `pydoc_data.topics`, whose one assignment is parsed and never run."""
    source = file.path.read_bytes()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            line_starts = [0]
            for line in source.split(b"\n"):
                line_starts.append(line_starts[-1] + len(line) + 1)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant):
                    offset = line_starts[key.lineno - 1] + key.col_offset
                    yield Row(f"{file.name}:{key.value!s}", ast.literal_eval(value), file.source, file.name, offset)
