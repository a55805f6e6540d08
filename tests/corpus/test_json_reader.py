"""JSON lines and arrays: every good row arrives, every bad one is set aside with its bytes and place."""

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.json_reader import read_json, read_jsonl, split_array
from groundup.corpus.rows import BadRow, Row
from groundup.corpus.sources import SourceFile
from groundup.corpus.streams import BLOCK_BYTES, ByteStream

TEXTS = st.text(alphabet='"\\[]{}, aé', max_size=6)
JSON = st.recursive(
    st.none() | st.integers(-99, 99) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def read(tmp_path: Path, data: bytes, reader=read_jsonl, max_bytes: int = 1 << 20) -> list[Row | BadRow]:
    path = tmp_path / "f"
    path.write_bytes(data)
    return list(reader(SourceFile(path, "f", "f", "jsonl"), ByteStream(path, "f", None, 200), "text", max_bytes))


def line(number: int) -> bytes:
    return json.dumps({"text": f"row {number} \u2028\x85", "n": number}, ensure_ascii=False).encode()


@pytest.mark.parametrize("bad_at", [0, 5, 9])
@pytest.mark.parametrize(
    "bad", [b'{"text":"\xff"}', b"[1,2]", b"[" * 100_000, b'{"text":"' + b"x" * BLOCK_BYTES + b'\xff"}']
)
def test_one_bad_row_costs_no_other(tmp_path, bad, bad_at):
    lines = [bad if number == bad_at else line(number) for number in range(10)]
    rows = read(tmp_path, b"\n".join(lines) + b"\n")
    assert [row.text for row in rows if isinstance(row, Row)] == [
        f"row {number} \u2028\x85" for number in range(10) if number != bad_at
    ]
    (aside,) = [row for row in rows if isinstance(row, BadRow)]
    assert aside.raw == bad and aside.line == bad_at + 1
    assert aside.offset == sum(len(each) + 1 for each in lines[:bad_at])


def test_a_file_cut_anywhere_loses_at_most_its_last_row(tmp_path):
    data = b"".join(line(number) + b"\n" for number in range(20))
    for cut in random.Random(0).sample(range(1, len(data)), 60):
        rows = read(tmp_path, data[:cut])
        whole, rest = data[:cut].count(b"\n"), data[:cut].rpartition(b"\n")[2]
        parses = rest in [line(number) for number in range(20)]
        assert sum(isinstance(row, Row) for row in rows) == whole + parses
        assert [row.code for row in rows if isinstance(row, BadRow)] == ["W-JSON-TRUNC"] * (bool(rest) and not parses)


def test_line_ends_and_blank_lines_give_the_same_rows(tmp_path):
    lines = [line(number) for number in range(5)]
    texts = [
        [row.text for row in read(tmp_path, end.join(lines) + end)] for end in (b"\n", b"\r\n", b"\n\n", b"\n \r\n")
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(texts[0]) == 5


def test_a_row_over_the_limit_is_set_aside_by_its_place(tmp_path):
    rows = read(tmp_path, line(0) + b'\n{"text":"' + b"x" * 5_000_000 + b'"}\n' + line(2), max_bytes=1_000_000)
    assert isinstance(rows[0], Row) and isinstance(rows[2], Row) and len(rows) == 3
    assert rows[1] == BadRow("W-ROW-SIZE", "5,000,011 bytes", "f", len(line(0)) + 1, b"", 2)


def test_ids(tmp_path):
    rows = read(tmp_path, b'\xef\xbb\xbf{"text":"a"}\n{"text":"b","id":"mine"}\n')
    assert [(row.id, row.offset) for row in rows] == [("f:1", 3), ("mine", 16)]


@given(st.lists(JSON, max_size=5), st.integers(1, 30), st.sampled_from([None, 2]))
def test_array_elements_are_those_of_json(values, block_bytes, indent):
    data = b" " + json.dumps(values, indent=indent).encode() + b"\n"
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    chunks = list(split_array(blocks, 1 << 20))
    assert [json.loads(chunk.data) for chunk in chunks] == values
    assert all(data[chunk.offset :].startswith(chunk.data) for chunk in chunks)
    assert not any(chunk.is_cut for chunk in chunks)


def test_array_rows(tmp_path):
    rows = read(tmp_path, b'[{"text":"a"},\n {"text":5}, {"text":"c]}[{"}, {"text": "d', read_json)
    assert [getattr(row, "text", None) or row.code for row in rows] == ["a", "W-FIELD-TYPE", "c]}[{", "W-JSON-TRUNC"]
    assert rows[1].offset == 16


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"text":"a"}', ["a", "W-JSON-TRUNC"]),
        (b'[{"text":"a"},', ["a", "W-JSON-TRUNC"]),
        (b"[", ["W-JSON-TRUNC"]),
        (b'["text', ["W-JSON-TRUNC"]),
        (b'[{"text":"a"}, {"text":"b', ["a", "W-JSON-TRUNC"]),
        (b'[{"text":"a"}, {"text":"b"', ["a", "W-JSON-TRUNC"]),
        (b'[{"text":"a"}] x', ["a", "W-JSON"]),
        (b'[{"text":"a" "b"}, {"text":"c"}]', ["W-JSON", "c"]),
    ],
)
def test_a_broken_array_never_passes_in_silence(tmp_path, data, expected):
    assert [getattr(row, "text", None) or row.code for row in read(tmp_path, data, read_json)] == expected


def test_a_large_element_is_set_aside(tmp_path):
    data = b'[{"text":"a"}, {"text":"' + b"x" * 3_000_000 + b'"}, {"text":"c"}]'
    rows = read(tmp_path, data, read_json, max_bytes=1_000_000)
    assert [getattr(row, "text", None) or row.code for row in rows] == ["a", "W-ROW-SIZE", "c"]


def test_an_element_without_end_is_never_held():
    tracemalloc.start()
    blocks = itertools.chain([b'[{"text":"'], itertools.repeat(b"x" * 65_536, 500))
    (chunk,) = split_array(blocks, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunk.data is None and chunk.num_bytes == 500 * 65_536 + 9
    assert peak < 3 << 20


def test_json_lines_in_a_json_file(tmp_path):
    assert [row.text for row in read(tmp_path, b'\n{"text":"a"}\n{"text":"b"}\n', read_json)] == ["a", "b"]
