"""The long tier: hours of trials, resumable, whose rows go to docs/reliability.md; and that its bookkeeping is right."""

import contextlib
import json
from pathlib import Path

import pytest

from groundup.proof import trials as long_trials
from groundup.proof.trials import GUARANTEES, add_row, is_kept, main, planned, run_trials

GOOD = {"kills": 4, "inside_saves": 2, "runs": 3, "most_resumes": 2, "unequal": {}}


@pytest.mark.long
@pytest.mark.slow
def test_the_long_tier():
    repository = Path(__file__).parents[2]
    page, journal = repository / "docs" / "reliability.md", repository / "runs" / ".trials.jsonl"
    assert main(["--page", str(page), "--journal", str(journal)]) == 0


@pytest.fixture
def made(monkeypatch):
    """Trials that cost nothing; the third one is interrupted once."""
    seen = []

    def make(trial):
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return dict(GOOD)

    monkeypatch.setattr(long_trials, "_made", lambda guarantee: contextlib.nullcontext(make))
    return seen


def test_an_interrupted_tier_goes_on_where_it_was(made, tmp_path):
    journal = tmp_path / "deep" / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_trials("kills", 20, journal, print)
    with journal.open("a") as file:
        file.write('{"guarantee": "kills", "tri')  # torn by a power loss
    journal.write_text(journal.read_text().rpartition("\n")[0] + "\n")
    done = run_trials("kills", 20, journal, print)
    assert len(done) == 5 and len(made) == 2 + 1 + 3
    assert [entry["trial"] for entry in done] == planned("kills", 20)


def test_rows_are_added_to_the_table_of_their_guarantee(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Reliability\n\nWords.\n")
    kills = [{"outcome": GOOD}, {"outcome": GOOD}]
    signals = [
        {"outcome": {"phase": "eval", "signal": "SIGINT", "seconds": 1.25, "is_good": good}} for good in (True, False)
    ]
    add_row(page, "kills", kills)
    add_row(page, "signals", signals)
    add_row(page, "kills", kills)
    text = page.read_text()
    assert text.startswith("# Reliability\n\nWords.\n\n## Random SIGKILLs") and text.count("## ") == 2
    first, second = text.split("## ")[1:]
    assert first.count("| 8 | 4 (50%) | 6 | 2 | 0 |") == 2 and second.count("| 2 | 1 | 1.2 | eval SIGINT × 1 |") == 1
    assert is_kept("kills", kills) and not is_kept("signals", signals)
    unequal = [{"outcome": GOOD | {"unequal": {"weights": 1}}}]
    assert not is_kept("kills", unequal) and not is_kept("kills", [{"outcome": GOOD | {"inside_saves": 1}}])


def test_the_plan_has_the_promised_counts():
    assert 4 * len(planned("kills", 120)) == 120 and len(planned("signals", 160)) == 160
    assert len(planned("workers", 50)) == 50 and set(GUARANTEES) == {"kills", "signals", "workers"}
    by_phase = [trial["phase"] for trial in planned("signals", 160)]
    assert {by_phase.count(phase) for phase in by_phase} == {20}
    assert len({json.dumps(trial) for name in GUARANTEES for trial in planned(name, 100)}) == 225
