"""`python -m groundup.proof.trials`: the long tier. Trial by trial, resumable; what it finds is added to a page.

Each trial is one line of a journal, so that the same command goes on where it was stopped; when every trial of a
guarantee is done, a row with date, machine and counts is added to the guarantee's table in docs/reliability.md.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundup.base import machine
from groundup.base.files import atomic_write
from groundup.proof.kill_trials import TRAINING, KillTrials
from groundup.proof.signal_trials import PHASES, SIGNALS, signal_trial
from groundup.proof.trial_client import Trials
from groundup.proof.trial_recipe import write_trial_data
from groundup.proof.worker_trials import STAGES, WorkerTrials
from groundup.stages.recipe import load_recipe

PAGE = Path("docs/reliability.md")
JOURNAL = Path("runs/.trials.jsonl")
KILLS_A_TRIAL = 4
Trial = dict[str, Any]

GUARANTEES = {
    "kills": "Random SIGKILLs: the resumed run ends in the bits of the unbroken one",
    "signals": "SIGTERM, SIGINT, SIGHUP and SIGUSR1 in eight phases: exit 75 within 10 s, resumed to the same bits",
    "workers": "Kills of the workers of clean and tokenize, and of the stages themselves: byte-identical output",
}
COLUMNS = {
    "kills": ("date", "machine", "kills", "inside saves", "runs to their end", "most resumes of one", "unequal"),
    "signals": ("date", "machine", "trials", "exit 75 in time, same bits", "slowest s", "failed"),
    "workers": ("date", "machine", "trials", "kills of a worker", "noticed", "other bytes"),
}


def planned(guarantee: str, count: int) -> list[Trial]:
    """The trials of a guarantee, each told apart by its number and what it does."""
    if guarantee == "kills":
        return [
            {"stage": TRAINING[number % len(TRAINING)], "seed": number} for number in range(-(-count // KILLS_A_TRIAL))
        ]
    if guarantee == "signals":
        cases = [(phase, name) for phase in PHASES for name in SIGNALS]
        return [{"phase": cases[n % len(cases)][0], "signal": cases[n % len(cases)][1], "n": n} for n in range(count)]
    stages = list(STAGES)
    return [{"stage": stages[n % len(stages)], "is_worker": n % 4 < 2, "seed": n} for n in range(count)]


def run_trials(guarantee: str, count: int, journal: Path, say: Callable[[str], None]) -> list[Trial]:
    """Make the trials that are not in the journal yet; returns all of them with their outcome."""
    trials = planned(guarantee, count)
    done = [entry for entry in _read(journal) if entry["guarantee"] == guarantee and entry["trial"] in trials]
    left = [trial for trial in trials if trial not in [entry["trial"] for entry in done]]
    journal.parent.mkdir(parents=True, exist_ok=True)
    if left:
        with _made(guarantee) as make, journal.open("a") as file:
            for number, trial in enumerate(left):
                done.append({"guarantee": guarantee, "trial": trial, "outcome": make(trial)})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
                say(f"{guarantee}  {len(done)} of {len(trials)}  {json.dumps(done[-1]['outcome'])}")
                if number == len(left) - 1:
                    say(f"{guarantee}  done")
    return done


@contextmanager
def _made(guarantee: str) -> Iterator[Callable[[Trial], Trial]]:
    """What makes one trial of a guarantee and tells its outcome."""
    with tempfile.TemporaryDirectory() as name, Trials() as trials:
        folder = Path(name)
        if guarantee == "workers":
            workers = WorkerTrials(folder, trials)
            workers.prepare()

            def make(trial: Trial) -> Trial:
                workers.chosen.seed(trial["seed"])
                return vars(workers.test(trial["stage"], is_worker=trial["is_worker"]))

        else:
            engine = KillTrials(load_recipe(str(write_trial_data(folder))), folder / "runs", trials)
            engine.prepare()

            def make(trial: Trial) -> Trial:
                if guarantee == "signals":
                    verdict = signal_trial(engine, trial["phase"], trial["signal"])
                    return vars(verdict) | {"is_good": verdict.is_good}
                engine.chosen.seed(trial["seed"])
                return vars(engine.test(trial["stage"], KILLS_A_TRIAL))

        yield make


def figures(guarantee: str, done: Sequence[Trial]) -> list[str]:
    """The cells of a guarantee's row, after date and machine."""
    outcomes = [entry["outcome"] for entry in done]
    if guarantee == "kills":
        kills, inside = sum(o["kills"] for o in outcomes), sum(o["inside_saves"] for o in outcomes)
        most = max(o["most_resumes"] for o in outcomes)
        unequal = sum(sum(o["unequal"].values()) for o in outcomes)
        runs = sum(o["runs"] for o in outcomes)
        return [str(kills), f"{inside} ({inside / kills:.0%})", str(runs), str(most), str(unequal)]
    if guarantee == "signals":
        bad = [f"{o['phase']} {o['signal']}" for o in outcomes if not o["is_good"]]
        slowest = max(o["seconds"] or 0.0 for o in outcomes)
        listing = ", ".join(f"{case} × {bad.count(case)}" for case in sorted(set(bad))) or "none"
        return [str(len(outcomes)), str(len(outcomes) - len(bad)), f"{slowest:.1f}", listing]
    by_worker = [o for o in outcomes if o["is_worker"]]
    noticed = sum(o["was_noticed"] for o in outcomes)
    other = sum(not o["is_same"] for o in outcomes)
    return [str(len(outcomes)), str(len(by_worker)), str(noticed), str(other)]


def is_kept(guarantee: str, done: Sequence[Trial]) -> bool:
    """Whether every trial showed what is promised."""
    outcomes = [entry["outcome"] for entry in done]
    if guarantee == "kills":
        inside = sum(o["inside_saves"] for o in outcomes) / sum(o["kills"] for o in outcomes)
        return inside >= 0.3 and not any(o["unequal"] for o in outcomes)
    return all(o["is_good"] if guarantee == "signals" else o["is_same"] and o["was_noticed"] for o in outcomes)


def add_row(page: Path, guarantee: str, done: Sequence[Trial]) -> None:
    """Add a row to the guarantee's table; the table is made where the page has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Reliability\n"
    heading = f"## {GUARANTEES[guarantee]}"
    columns = COLUMNS[guarantee]
    if heading not in text:
        text = f"{text.rstrip()}\n\n{heading}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    before, _, after = text.partition(heading)
    table, separator, rest = after.partition("\n\n## ")
    row = [datetime.datetime.now(datetime.UTC).date().isoformat(), _machine(), *figures(guarantee, done)]
    table = f"{table.rstrip()}\n| {' | '.join(row)} |"
    text = f"{before}{heading}{table}{separator}{rest}"
    with atomic_write(page) as file:
        file.write(text.rstrip().encode() + b"\n")


def _machine() -> str:
    facts = machine.describe()
    return f"{facts['cpu']}, {facts['cores']} cores, torch {facts['packages'].get('torch', '?')}"


def _read(journal: Path) -> list[Trial]:
    if not journal.exists():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1]  # a torn last line was no trial
    return [json.loads(line) for line in lines if line]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the trials that are asked for; 0 if every one of them showed what is promised."""
    parser = argparse.ArgumentParser(prog="python -m groundup.proof.trials", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=120, help="SIGKILLs of pretrain, sft and lora together")
    parser.add_argument("--signals", type=int, default=160, help="signals over eight phases")
    parser.add_argument("--workers", type=int, default=50, help="kills of the data stages")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the rows go")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help="what is done already; remove it to begin again")
    wanted = parser.parse_args(arguments)
    kept = True
    for guarantee in GUARANTEES:
        count = getattr(wanted, guarantee)
        if count:
            done = run_trials(guarantee, count, wanted.journal, lambda text: print(text, flush=True))
            add_row(wanted.page, guarantee, done)
            kept = kept and is_kept(guarantee, done)
            print(f"{GUARANTEES[guarantee]}: {'PASS' if is_kept(guarantee, done) else 'FAIL'}", flush=True)
    if kept:
        wanted.journal.unlink(missing_ok=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
