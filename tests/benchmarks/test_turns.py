"""Measurements in turn: a peer runs as its users run it, and tables are read as they were written."""

import sys

import pytest

from benchmarks import turns
from benchmarks.results import add_row, read_rows


@pytest.mark.parametrize(
    ("arguments", "is_ours"), [(["--worker", "ours"], True), (["--worker", "trainer"], False), ([], True)]
)
def test_a_peer_is_not_given_our_settings(monkeypatch, arguments, is_ours):
    made = []
    monkeypatch.setattr(turns, "prepare_process", lambda: made.append(True))
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    turns.prepare()
    assert bool(made) == is_ours


def test_a_worker_begins_with_the_user_s_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "OURS")
    monkeypatch.setattr(turns, "ENVIRONMENT", turns.ENVIRONMENT | {"PYTHONPATH": str(tmp_path)})
    (tmp_path / "told.py").write_text(
        "import json, os; print(json.dumps({'policy': os.environ.get('OMP_WAIT_POLICY')}))"
    )
    found = turns.measure_in_turn({"one": ["told"]}, 1)
    assert found["one"] == [{"policy": turns.ENVIRONMENT.get("OMP_WAIT_POLICY")}] != [{"policy": "OURS"}]


def test_rows_are_read_as_they_were_written(tmp_path):
    page = tmp_path / "page.md"
    for value in ("1", "2"):
        add_row("Speed", "python -m speed", {"a figure": value, "other": "x / y"}, page)
    add_row("Growth", "python -m growth", {"a figure": "3"}, page)
    assert [row["a figure"] for row in read_rows("Speed", page)] == ["1", "2"]
    assert read_rows("Speed", page)[0]["other"] == "x / y" and read_rows("Nothing", page) == []
