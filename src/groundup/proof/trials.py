"""`python -m groundup.proof.trials`: the long tier. Trial by trial, resumable; what it finds is added to a page.

Each trial is one line of a journal, so that the same command goes on where it was stopped; when every trial of a
guarantee is done, or `--stop-after` says that it is enough, a row with date, machine and counts is added to the
guarantee's table in docs/reliability.md.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from groundup.base import machine
from groundup.base.files import atomic_write
from groundup.proof.bad_number_trials import BAD_NUMBERS, BAD_NUMBERS_ON_RANKS
from groundup.proof.crash_trials import CRASHES
from groundup.proof.damage_trials import DAMAGED, FLIPS
from groundup.proof.guarantee import Guarantee, Outcome
from groundup.proof.random_kills import KILLS, RANK_KILLS
from groundup.proof.save_cost import SAVE_COST
from groundup.proof.signal_trials import STOPS
from groundup.proof.worker_trials import WORKER_KILLS

PAGE = Path("docs/reliability.md")
JOURNAL = Path("runs/.trials.jsonl")
GUARANTEES = (
    *(KILLS, RANK_KILLS, FLIPS, DAMAGED, CRASHES, BAD_NUMBERS, BAD_NUMBERS_ON_RANKS, STOPS, WORKER_KILLS),
    SAVE_COST,
)
Entry = dict[str, Any]
"""A line of the journal: guarantee, trial, outcome."""


def run_trials(
    guarantee: Guarantee,
    count: int,
    journal: Path,
    say: Callable[[str], None],
    *,
    until: float = float("inf"),
) -> list[Entry]:
    """Make the trials that are not in the journal yet; returns all that are made. No new one begins after `until`."""
    trials = guarantee.plan(count)
    known = {_key(entry["trial"]): entry for entry in _read(journal) if entry["guarantee"] == guarantee.name}
    done = [known[_key(trial)] for trial in trials if _key(trial) in known]
    left = [trial for trial in trials if _key(trial) not in known]
    journal.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(journal)
    if left and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as name, guarantee.making(Path(name)) as make, journal.open("a") as file:
            for trial in left:
                if time.monotonic() >= until:
                    say(f"{guarantee.name}  stopped at {len(done)} of {len(trials)}")
                    break
                done.append({"guarantee": guarantee.name, "trial": trial, "outcome": make(trial)})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
                say(f"{guarantee.name}  {len(done)} of {len(trials)}  {json.dumps(done[-1]['outcome'])}")
    return done


def _key(trial: dict[str, Any]) -> str:
    return json.dumps(trial, sort_keys=True)


def add_row(page: Path, guarantee: Guarantee, outcomes: Sequence[Outcome]) -> None:
    """Add a row to the guarantee's table; the table is made where the page has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Reliability\n"
    heading = f"## {guarantee.title}"
    if heading not in text:
        columns = ("date", "machine", *guarantee.columns)
        text = f"{text.rstrip()}\n\n{heading}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    before, _, after = text.partition(heading)
    table, separator, rest = after.partition("\n\n## ")
    row = [datetime.datetime.now(datetime.UTC).date().isoformat(), _machine(), *guarantee.figures(outcomes)]
    table = f"{table.rstrip()}\n| {' | '.join(row)} |"
    text = f"{before}{heading}{table}{separator}{rest}"
    with atomic_write(page) as file:
        file.write(text.rstrip().encode() + b"\n")


def _machine() -> str:
    facts = machine.describe()
    return f"{facts['cpu']}, {facts['cores']} cores, torch {facts['packages'].get('torch', '?')}"


def _read(journal: Path) -> list[Entry]:
    if not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n")[:-1]]


def _cut_torn_line(journal: Path) -> None:
    """A last line without an end was no trial."""
    if journal.exists():
        data = journal.read_bytes()
        with journal.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the trials that are asked for; 0 if every one of them showed what is promised."""
    parser = argparse.ArgumentParser(prog="python -m groundup.proof.trials", description=__doc__.partition("\n")[0])
    for guarantee in GUARANTEES:
        parser.add_argument(
            f"--{guarantee.name}", type=int, metavar="N", help=f"{guarantee.unit} (usually {guarantee.usual_count:,})"
        )
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="MINUTES", help="begin none later")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the rows go")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help="what is done already; remove it to begin again")
    wanted = parser.parse_args(arguments)
    counts = {guarantee.name: getattr(wanted, guarantee.name.replace("-", "_")) for guarantee in GUARANTEES}
    asks_for_some = any(count is not None for count in counts.values())
    until = time.monotonic() + 60 * wanted.stop_after
    kept = True
    for guarantee in GUARANTEES:
        count = (counts[guarantee.name] or 0) if asks_for_some else guarantee.usual_count
        if count:
            done = run_trials(guarantee, count, wanted.journal, lambda text: print(text, flush=True), until=until)
            outcomes = [entry["outcome"] for entry in done]
            if outcomes:
                add_row(wanted.page, guarantee, outcomes)
            is_kept = bool(outcomes) and guarantee.is_kept(outcomes)
            kept = kept and is_kept
            print(f"{guarantee.title}: {'PASS' if is_kept else 'FAIL'}", flush=True)
    if kept:
        wanted.journal.unlink(missing_ok=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
