"""The ledger's law, and the quarantine's lines."""

import base64
import json
from collections import Counter

import pytest

from groundup.base.errors import GroundupError
from groundup.corpus.ledger import Ledger, open_quarantine
from groundup.corpus.rows import BadRow


def ledger(**changes: object) -> Ledger:
    counts = {"read": 15, "kept": 5, "exact_duplicates": 3, "near_duplicates": 1}
    return Ledger(
        **counts | {"filtered": Counter(empty=2), "quarantined": Counter({"W-UTF8": 3, "W-JSON": 1})} | changes
    )


def test_the_law():
    ledger().check()
    for changes in (
        {"read": 16},
        {"kept": 4},
        {"filtered": Counter()},
        {"near_duplicates": 0},
        {"quarantined": Counter()},
    ):
        with pytest.raises(GroundupError) as caught:
            ledger(**changes).check()
        assert caught.value.code == "E-LEDGER" and caught.value.exit_code == 70


def test_reasons_are_ranked():
    assert ledger().reasons() == "3 W-UTF8, 3 exact duplicate, 2 empty, 1 W-JSON, 1 near duplicate"


def test_quarantine_holds_the_raw_bytes(tmp_path):
    raw = bytes(range(256))
    with open_quarantine(tmp_path) as quarantine:
        quarantine.add(BadRow("W-JSON", "the key '\ud800' stands twice", "f.jsonl", 7, raw, 2))
    (line,) = (tmp_path / "quarantine" / "quarantine.jsonl").read_bytes().splitlines()
    row = json.loads(line)
    assert base64.b64decode(row["raw"]) == raw
    assert (row["reason"], row["file"], row["offset"], row["line"]) == ("W-JSON", "f.jsonl", 7, 2)
    assert row["detail"] == "the key '\\ud800' stands twice"
