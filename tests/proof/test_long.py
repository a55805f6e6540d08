"""The long tier: hours of trials, resumable, whose rows go to docs/reliability.md; and that its bookkeeping is right."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from groundup.proof.random_kills import KILLS
from groundup.proof.signal_trials import STOPS
from groundup.proof.trials import GUARANTEES, add_row, main, run_trials

GOOD = {"kills": 4, "inside_saves": 2, "runs": 3, "most_resumes": 2, "unequal": {}}


@pytest.mark.long
@pytest.mark.slow
def test_the_long_tier():
    repository = Path(__file__).parents[2]
    page, journal = repository / "docs" / "reliability.md", repository / "runs" / ".trials.jsonl"
    assert main(["--page", str(page), "--journal", str(journal)]) == 0


@pytest.fixture
def made():
    """A guarantee whose trials cost nothing; the third one is interrupted once."""
    seen = []

    def make(trial):
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return dict(GOOD)

    return replace(KILLS, making=lambda folder: contextlib.nullcontext(make)), seen


def test_an_interrupted_tier_goes_on_where_it_was(made, tmp_path):
    guarantee, seen = made
    journal = tmp_path / "deep" / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_trials(guarantee, 20, journal, print)
    with journal.open("a") as file:
        file.write('{"guarantee": "kills", "tri')  # torn by a power loss
    done = run_trials(guarantee, 20, journal, print)
    assert len(done) == 5 and len(seen) == 2 + 1 + 3
    assert [entry["trial"] for entry in done] == guarantee.plan(20)
    assert run_trials(guarantee, 20, journal, print) == done and len(seen) == 6


def test_a_tier_that_is_told_to_stop_keeps_what_it_made(made, tmp_path):
    guarantee, _ = made
    assert run_trials(guarantee, 20, tmp_path / "journal", print, until=0.0) == []


def test_rows_are_added_to_the_table_of_their_guarantee(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Reliability\n\nWords.\n")
    signals = [{"phase": "eval", "signal": "SIGINT", "seconds": 1.25, "is_good": good} for good in (True, False)]
    add_row(page, KILLS, [GOOD, GOOD])
    add_row(page, STOPS, signals)
    add_row(page, KILLS, [GOOD, GOOD])
    text = page.read_text()
    assert text.startswith("# Reliability\n\nWords.\n\n## Random SIGKILLs") and text.count("## ") == 2
    first, second = text.split("## ")[1:]
    assert first.count("| 8 | 4 (50%) | 6 | 2 | 0 |") == 2 and second.count("| 2 | 1 | 1.2 | eval SIGINT × 1 |") == 1


BAD = {
    "kills": [GOOD | {"unequal": {"weights": 1}}, GOOD | {"inside_saves": 1}],
    "rank-kills": [GOOD | {"unequal": {"metrics": 1}}],
    "flips": [{"tried": 5, "unseen": 1}],
    "damages": [{"tried": 5, "unseen": 1}],
    "crashes": [{"tried": 5, "lost": 1}],
    "bad-numbers": [{"violations": ["a value that is not finite was stored"]}],
    "rank-bad-numbers": [{"violations": ["rank 1: the run went on"]}],
    "signals": [{"phase": "eval", "signal": "SIGINT", "seconds": 1.25, "is_good": False}],
    "workers": [{"is_worker": True, "was_noticed": True, "is_same": False}],
    "save-cost": [
        {"writer_seconds": 0.2, "held_seconds": 4.0, "saving_step_seconds": 2.5, "plain_step_seconds": 2.0, "bytes": 1},
        {"writer_seconds": 5.0, "held_seconds": 0.1, "saving_step_seconds": 1.5, "plain_step_seconds": 2.0, "bytes": 1},
    ],
}
HEALTHY = {
    "flips": {"unseen": 0},
    "damages": {"unseen": 0},
    "crashes": {"lost": 0},
    "bad-numbers": {"violations": []},
    "rank-bad-numbers": {"violations": []},
    "signals": {"is_good": True},
    "workers": {"is_same": True},
    "save-cost": {"held_seconds": 0.1, "writer_seconds": 0.2},
}


@pytest.mark.parametrize("guarantee", GUARANTEES, ids=lambda guarantee: guarantee.name)
def test_one_trial_that_fails_is_a_promise_broken(guarantee):
    for bad in BAD[guarantee.name]:
        good = GOOD if "kills" in guarantee.name else bad | HEALTHY[guarantee.name]
        assert guarantee.is_kept([good]) and not guarantee.is_kept([bad])
        assert len(guarantee.figures([good, bad])) == len(guarantee.columns)


def test_the_plan_has_the_promised_counts():
    usual = {guarantee.name: guarantee.usual_count for guarantee in GUARANTEES}
    assert usual["kills"] + usual["rank-kills"] >= 120 and usual["signals"] == 160 and usual["workers"] == 50
    assert (usual["flips"], usual["damages"]) == (10_000, 1_000) and usual["crashes"] >= 500
    assert usual["bad-numbers"] == 1_000
    for guarantee in GUARANTEES:
        trials = guarantee.plan(usual[guarantee.name])
        assert len({json.dumps(trial) for trial in trials}) == len(trials), "told apart"
        assert sum(trial.get("count", 0) for trial in trials) in (0, usual[guarantee.name])
    by_phase = [trial["phase"] for trial in STOPS.plan(160)]
    assert {by_phase.count(phase) for phase in by_phase} == {20}


def test_a_short_tier_really_makes_its_trials(tmp_path, capsys):
    page, journal = tmp_path / "page.md", tmp_path / "journal.jsonl"
    counts = ["--flips", "40", "--damages", "13", "--crashes", "10", "--bad-numbers", "2"]
    assert main([*counts, "--page", str(page), "--journal", str(journal)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| 2")]
    assert [row.split(" | ", 2)[2] for row in rows] == ["40 | 40 | 0 |", "13 | 13 | 0 |", "10 | 0 |", "2 | 2 | 0 |"]
    assert capsys.readouterr().out.count(": PASS") == 4 and not journal.exists()
