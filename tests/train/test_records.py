"""The jsonl files of a run."""

import json

import pytest

from groundup.train.records import JsonLines


def test_lines_are_appended_and_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    file.write({"step": 1, "text": "ünï\n"})
    length = file.num_bytes()
    file.write({"step": 2})
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3')
    file = JsonLines(path, keep_bytes=length)
    assert file.num_bytes() == length
    file.write({"step": 2, "again": True})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    file.close()


def test_keeping_more_than_there_is_adds_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    JsonLines(path, keep_bytes=100).close()
    assert path.read_bytes() == b""


def test_what_is_not_a_number_is_never_written(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        file.write({"loss": float("nan")})
    assert file.num_bytes() == 0
