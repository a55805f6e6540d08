"""Cleaning rows: the same outcomes in the same order from any number of workers, even when one dies."""

import os
import signal
from pathlib import Path

import pytest

from groundup.base.log import Log
from groundup.corpus import cleaning
from groundup.corpus.cleaning import Cleaned, clean_batch, clean_in_order
from groundup.corpus.config import CorpusConfig
from groundup.corpus.rows import Row

CONFIG = CorpusConfig(source="x")


def rows(count: int) -> list[Row]:
    texts = [f"Row {number} says:\r\n  many words of its own {number * 7} e\u0301" for number in range(count)]
    return [Row(f"r{k}", "" if k % 10 == 3 else text, "x", "x.jsonl", k) for k, text in enumerate(texts)]


def test_outcomes():
    outcomes = clean_batch(rows(4), CONFIG)
    assert outcomes[3] == "empty"
    assert isinstance(outcomes[0], Cleaned)
    assert outcomes[0].line == (
        '{"id":"r0","text":"Row 0 says:\\n  many words of its own 0 é",'
        '"source":"x","meta":{"file":"x.jsonl","offset":0}}\n'.encode()
    )
    assert clean_batch(rows(4)[3:], CONFIG) == ["empty"]


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
def test_batches_do_not_change_outcomes(monkeypatch, batch_rows):
    expected = list(zip(rows(50), clean_batch(rows(50), CONFIG), strict=True))
    monkeypatch.setattr(cleaning, "BATCH_ROWS", batch_rows)
    assert list(clean_in_order(rows(50), CONFIG, 1, Log(quiet=True))) == expected


def test_a_worker_that_is_killed_costs_nothing(monkeypatch, capfd):
    monkeypatch.setattr(cleaning, "BATCH_ROWS", 10)
    expected = list(zip(rows(200), clean_batch(rows(200), CONFIG), strict=True))
    got = []
    for outcome in clean_in_order(iter(rows(200)), CONFIG, 2, Log()):
        got.append(outcome)
        if len(got) == 15:
            for pid in children():
                os.kill(pid, signal.SIGKILL)
    assert got == expected
    assert "W-WORKER-LOST" in capfd.readouterr().err


def children() -> list[int]:
    """Worker processes of this one, without the resource tracker."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
