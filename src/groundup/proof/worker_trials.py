"""Cleaning and tokenizing whose workers, or who themselves, are killed: the output is the same bytes."""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from groundup.base.artifact import read_manifest
from groundup.base.errors import CheckpointError, DataError
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial
from groundup.proof.kill_trials import KILLED
from groundup.proof.trial_client import Ended, Trials
from groundup.proof.trial_recipe import WORDS

STAGES = {"clean": "corpus", "tokenize": "tokens"}
NUM_ROWS = 9000
MAX_MISSES = 25


@dataclass(frozen=True)
class WorkerVerdict:
    """What the kill of a worker, or of the whole process, did to a stage."""

    stage: str
    is_worker: bool
    was_noticed: bool
    """Whether the loss of a worker was said, or the process was killed."""
    is_same: bool

    @property
    def is_good(self) -> bool:
        return self.is_same and self.was_noticed


class WorkerTrials:
    """A corpus of thousands of rows, and the stages that work on it in several processes."""

    def __init__(self, folder: Path, trials: Trials, *, seed: int = 0) -> None:
        self.folder, self.trials = folder, trials
        self.chosen = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rows.jsonl").open("w") as file:
            for number in range(NUM_ROWS):
                words = " ".join(self.chosen.choices(WORDS, k=self.chosen.randint(1, 60)))
                file.write(
                    json.dumps({"text": f"{words} {number % (NUM_ROWS - 100)}"}) + "\n" if number % 97 else "[1]\n"
                )
        self._recipe = folder / "rows.yaml"
        self._recipe.write_text(f"name: run\ncorpus:\n  source: {folder}/rows.jsonl\ntokenizer:\n  vocab_size: 300\n")
        self.expected: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    @property
    def unbroken(self) -> Path:
        return self.folder / "unbroken" / "run"

    def prepare(self) -> None:
        """Make the output in one process, and time it in two."""
        for stage in ("clean", "tokenizer", "tokenize"):
            self._must(self._run(stage, self.unbroken.parent, num_workers=1))
        for stage, name in STAGES.items():
            self.expected[stage] = output_of(self.unbroken / name)
            shutil.rmtree(self.fresh_run(stage).parent)
            self._seconds[stage] = self._must(self._run(stage, self.fresh_run(stage).parent, num_workers=2)).seconds

    def fresh_run(self, stage: str) -> Path:
        """A run in which all before `stage` is finished."""
        run = self.folder / "broken" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        dropped = ["corpus", "tokenizer", "tokens"] if stage == "clean" else ["tokens"]
        shutil.copytree(
            self.unbroken, run, ignore=lambda folder, names: dropped if Path(folder) == self.unbroken else []
        )
        return run

    def test(self, stage: str, *, is_worker: bool) -> WorkerVerdict:
        """Kill a worker, or the process itself, at a random time, until a kill has met one at work."""
        for _ in range(MAX_MISSES):
            verdict = self._test_once(stage, is_worker=is_worker)
            if verdict.was_noticed or not verdict.is_same:
                break
        return verdict

    def _test_once(self, stage: str, *, is_worker: bool) -> WorkerVerdict:
        """One kill; the same command again if the stage ended by it; then compare."""
        run = self.fresh_run(stage)
        send = {"signal": "SIGKILL", "seconds": self.chosen.uniform(0, 0.9 * self._seconds[stage]), "worker": is_worker}
        ended = self._run(stage, run.parent, num_workers=2, sends=[send])
        was_noticed = ended.status == KILLED or "W-WORKER-LOST" in ended.err
        if ended.status != 0:
            if ended.status != KILLED or (run / STAGES[stage]).exists():
                raise CheckpointError("E-PROOF-RUN", what=f"{stage} ended with {ended.status}: {ended.err[-300:]}")
            self._must(self._run(stage, run.parent, num_workers=2))
        return WorkerVerdict(stage, is_worker, was_noticed, output_of(run / STAGES[stage]) == self.expected[stage])

    def _run(self, stage: str, runs: Path, *, num_workers: int, sends: list[dict[str, object]] | None = None) -> Ended:
        section = "corpus" if stage == "clean" else "tokens"
        settings = () if stage == "tokenizer" else (f"--{section}.num_workers", num_workers)
        return self.trials.run(stage, self._recipe, "--runs-dir", runs, *settings, sends=sends or [])

    def _must(self, ended: Ended) -> Ended:
        if ended.status != 0:
            raise CheckpointError("E-PROOF-RUN", what=f"ended with {ended.status}: {ended.err[-300:]}")
        return ended


def output_of(folder: Path) -> str:
    """Hash of everything a data stage wrote. Raises DataError where it is not finished."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError("E-PROOF-NONE", what="not finished", where=folder)
    return manifest.output_hash()


def _planned(count: int) -> list[Trial]:
    stages = list(STAGES)
    return [{"stage": stages[n % len(stages)], "is_worker": n % 4 < 2, "seed": n} for n in range(count)]


@contextmanager
def _making(folder: Path) -> Iterator[Make]:
    with Trials() as trials:
        workers = WorkerTrials(folder, trials)
        workers.prepare()

        def make(trial: Trial) -> Outcome:
            workers.chosen.seed(trial["seed"])
            return vars(workers.test(trial["stage"], is_worker=trial["is_worker"]))

        yield make


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    by_worker = sum(outcome["is_worker"] for outcome in outcomes)
    noticed = sum(outcome["was_noticed"] for outcome in outcomes)
    other = sum(not outcome["is_same"] for outcome in outcomes)
    return [str(len(outcomes)), str(by_worker), str(noticed), str(other)]


WORKER_KILLS = Guarantee(
    name="workers",
    title="Kills of the workers of clean and tokenize, and of the stages themselves: byte-identical output",
    columns=("trials", "kills of a worker", "noticed", "other bytes"),
    usual_count=50,
    unit="kills of the data stages",
    plan=_planned,
    making=_making,
    figures=_figures,
    is_kept=lambda outcomes: all(outcome["is_same"] and outcome["was_noticed"] for outcome in outcomes),
)
