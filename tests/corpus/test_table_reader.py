"""CSV and parquet: rows, bad rows, and settings that fit no column."""

import csv
import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.base.errors import DataError
from groundup.base.log import Log
from groundup.corpus.config import CorpusConfig
from groundup.corpus.readers import read_source
from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import find_sources


def read(path: Path, **settings: object) -> list[Row | BadRow]:
    config = CorpusConfig(source=str(path), **settings)
    (file,) = find_sources(str(path)).files
    return list(read_source(file, config, Log(quiet=True)))


def as_words(rows: list[Row | BadRow]) -> list[str]:
    return [row.text if isinstance(row, Row) else row.code for row in rows]


@given(st.lists(st.tuples(st.text(alphabet='ab", \né'), st.text(alphabet='ab", \né')), max_size=6))
def test_csv_rows_are_those_of_the_csv_module(tmp_path_factory, values):
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("id", "text"), *values])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(buffer.getvalue().encode())
    rows = read(path)
    assert as_words(rows) == [text for _, text in values]
    assert [row.id for row in rows if not row.id.startswith("a.csv:")] == [own_id for own_id, _ in values if own_id]


def test_csv_bad_rows_cost_no_other(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfn,text\r\n1,"two\nlines"\r\n2,b\xffd\r\n3\r\n\r\n4,'
        + b"x" * 5_000
        + b'\r\n5,"'
        + b"y\n" * 900
        + b'z"\r\n6,last\x00'
    )
    rows = read(path, max_document_bytes=1_000)
    assert as_words(rows)[:4] == ["two\nlines", "W-UTF8", "W-FIELD-TYPE", "W-ROW-SIZE"]
    assert as_words(rows)[4] == "W-ROW-SIZE" and as_words(rows)[-1] == "last\x00"
    data = path.read_bytes()
    assert [data[row.offset :][:2] for row in rows[:5]] == [b"1,", b"2,", b"3\r", b"4,", b"5,"]
    assert rows[1].raw == b"2,b\xffd" and rows[3].raw == b""


def test_a_comma_without_quotes_does_not_cut_a_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"n,text\n1,one, two\n2,three,\n3,four\n")
    rows = read(path)
    assert as_words(rows) == ["W-CSV", "three", "four"]
    assert rows[0].raw == b"1,one, two" and "quote a text" in rows[0].detail


def test_csv_line_over_the_limit_inside_a_row_spoils_that_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\n"begin\n' + b"x" * 5_000 + b'\nend"\nnext\n')
    words = as_words(read(path, max_document_bytes=1_000))
    assert words[0] == "W-ROW-SIZE" and words[-1] == "next" and not any("begin" in word for word in words)


def write_parquet(path: Path, columns: dict[str, pa.Array], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_rows(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(),
        4,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\5\0\0\0\6\0\0\0"), pa.py_buffer(b"a\xff\xc3\xa9bc")],
    )
    path = write_parquet(tmp_path / "a.parquet", {"text": bad, "id": pa.array(["i", "j", None, ""])})
    rows = read(path)
    assert as_words(rows) == ["a", "W-UTF8", "éb", "c"]
    assert [row.id for row in rows if isinstance(row, Row)] == ["i", "a.parquet:2", "a.parquet:3"]
    assert rows[1].raw == b"\xff" and rows[1].offset == 1


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_kinds_of_strings_nulls_and_sizes(tmp_path, kind):
    texts = pa.array(["one", None, "x" * 2_000, "four"], pa.string()).cast(kind)
    rows = read(write_parquet(tmp_path / "a.parquet", {"text": texts}), max_document_bytes=1_000)
    assert as_words(rows) == ["one", "W-FIELD-TYPE", "W-ROW-SIZE", "four"]


def test_parquet_in_gzip(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array([f"row {k}" for k in range(1000)])})
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert as_words(read(packed)) == [f"row {k}" for k in range(1000)]
    packed.write_bytes(gzip.compress(path.read_bytes())[:-100])
    with pytest.raises(DataError) as caught:
        read(packed)
    assert caught.value.code == "E-DATA-TRUNC"


def test_parquet_bomb(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array(["x" * 100_000] * 300)})
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError) as caught:
        read(path, max_expansion_ratio=100)
    assert caught.value.code == "E-BOMB"
    assert len(read(path, max_expansion_ratio=10_000)) == 300


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("a.csv", lambda path: path.write_text("body,n\nhi,1\n"), "E-FIELD-NONE"),
        ("a.parquet", lambda path: write_parquet(path, {"body": pa.array(["a"])}), "E-FIELD-NONE"),
        ("a.parquet", lambda path: write_parquet(path, {"text": pa.array([1])}), "E-FIELD-TYPE"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1 no such file PAR1"), "E-DATA-DAMAGED"),
        ("a.parquet", lambda path: path.write_bytes(b""), "E-DATA-DAMAGED"),
    ],
)
def test_a_setting_that_fits_no_column_is_an_error(tmp_path, name, make, code):
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == code and caught.value.next and name in caught.value.where
