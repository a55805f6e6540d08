"""Runs of a training stage that are killed at random places and go on, against one that nobody disturbed.

On several ranks one of them, or all, are killed; where it happens inside a save, rank 0 is at work on it.
"""

import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.base.artifact import CHECKPOINTS
from groundup.base.errors import CheckpointError
from groundup.base.files import read_json
from groundup.proof.evidence import Evidence, evidence_of, largest_difference
from groundup.proof.trial_client import Ended, Trials
from groundup.proof.trial_recipe import write_trial_data
from groundup.stages.recipe import Recipe, load_recipe, write_recipe

TRAINING = ("pretrain", "sft", "lora")
SAVE_FAILPOINTS = (
    *(f"ckpt.{when}_{what}" for what in ("shard", "fsync", "manifest", "rename") for when in ("before", "after")),
    "ckpt.before_purge",
)
INSIDE_FRACTION = 0.4
"""Share of kills that are aimed into a save; the figure to reach is 0.3."""
MAX_NTH = 3
HELD_SECONDS = 0.5
"""Rank 0 is held up at a place of its save for so long while another rank is killed."""
KILLED = -signal.SIGKILL


@dataclass
class StageVerdict:
    """What the trials of one stage showed."""

    stage: str
    kills: int = 0
    inside_saves: int = 0
    runs: int = 0
    most_resumes: int = 0
    unequal: dict[str, int] = field(default_factory=dict)
    """Runs in which weights, optimizer or metrics were other bits."""
    largest_difference: float = 0.0
    device: str = "cpu"
    lost_steps: int = 0
    """Most steps that a kill took back."""
    twin_difference: float = 0.0
    """Largest difference of two runs that nobody disturbed: above 0, no resume can be exact here."""

    @property
    def is_exact(self) -> bool:
        return self.runs > 0 and not self.unequal

    def line(self) -> str:
        """The verdict as one line."""
        kills = f"{self.stage:<9} {self.kills} kills ({self.inside_saves} inside saves)"
        if self.is_exact:
            return f"{kills}  weights, optimizer, metrics: equal  PASS"
        end = f"two unbroken runs {self.twin_difference:.2e}  NOT EXACT HERE" if self.twin_difference > 0 else "FAIL"
        parts = ", ".join(f"{kind} in {count} of {self.runs} runs" for kind, count in self.unequal.items())
        return f"{kills}  differ: {parts}  largest difference of a weight {self.largest_difference:.2e}  {end}"


class KillTrials:
    """One recipe's trials in a folder of their own: what comes before training is made once and shared by links."""

    def __init__(self, recipe: Recipe, folder: Path, trials: Trials, *, seed: int = 0, num_ranks: int = 1) -> None:
        self.folder, self.trials, self.num_ranks = folder, trials, num_ranks
        self.recipe = recipe.model_copy(update={"name": "run"})
        self.chosen = random.Random(seed)
        self._failpoints = list(SAVE_FAILPOINTS)
        self._seen: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._reached = -1
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "recipe.yaml"
        write_recipe(self.recipe, self._path)

    @property
    def stages(self) -> list[str]:
        """The recipe's training stages."""
        return [stage for stage in TRAINING if getattr(self.recipe, stage) is not None]

    @property
    def unbroken(self) -> Path:
        """The run that nobody disturbs."""
        return self.folder / "unbroken" / "run"

    def command(self, stage: str, runs: Path) -> tuple[object, ...]:
        """The command line of a stage in one of the trials' folders."""
        return (stage, self._path, "--runs-dir", runs)

    def run_stage(self, stage: str, run: Path, **how: Any) -> Ended:
        """Run a stage of a run to its end, or to where it is killed."""
        num_ranks = self.num_ranks if stage in TRAINING else 1
        return self.trials.run(*self.command(stage, run.parent), num_ranks=num_ranks, **how)

    def prepare(self) -> None:
        """Make the unbroken run, every stage once."""
        needs_text = self.recipe.corpus is not None and self.recipe.tokens.path is None
        before = ["clean"] if needs_text else []
        if needs_text or self.recipe.tokens.path is not None:
            before += ["tokenizer", "tokenize"]
        for stage in [*before, *self.stages]:
            ended = self.run_stage(stage, self.unbroken)
            self._seconds[stage] = ended.seconds
            if ended.status != 0:
                raise _broken(stage, ended)

    def fresh_run(self, stage: str, name: str) -> Path:
        """A run in which everything before `stage` is finished, by links into the unbroken one."""
        run = self.folder / name / "run"
        if run.parent.exists():
            shutil.rmtree(run.parent)
        later = self.stages[self.stages.index(stage) :]
        run.mkdir(parents=True)
        for entry in self.unbroken.iterdir():
            if entry.name in later or entry.name in (".lock", ".attempts"):
                continue
            if entry.is_dir():
                shutil.copytree(
                    entry, run / entry.name, copy_function=_link, ignore=shutil.ignore_patterns(CHECKPOINTS)
                )
            else:
                shutil.copy2(entry, run / entry.name)
        return run

    def test(self, stage: str, num_kills: int, say: Callable[[str], None] = lambda text: None) -> StageVerdict:
        """Kill runs of a stage until `num_kills` kills were made, and compare each when it has come to its end."""
        expected = evidence_of(self.unbroken / stage)
        verdict = StageVerdict(stage, device=self.device_of(stage))
        while verdict.kills < num_kills:
            run = self.fresh_run(stage, f"broken-{stage}")
            kills_before = verdict.kills
            self._one_run(stage, run, verdict, num_kills)
            self._compare(stage, run, expected, verdict)
            say(f"  {stage}  {verdict.kills} of {num_kills} kills, {verdict.runs} runs to their end")
            if verdict.kills == kills_before and not self._failpoints and verdict.runs > 3 * num_kills:
                raise CheckpointError(
                    "E-PROOF-NONE", what=f"{stage} ends before it can be killed", next="give it more steps"
                )
            shutil.rmtree(run.parent)
        if verdict.unequal:
            verdict.twin_difference = self._twin_difference(stage)
        return verdict

    def _twin_difference(self, stage: str) -> float:
        """How far a second run that nobody disturbs ends from the first."""
        run = self.fresh_run(stage, f"twin-{stage}")
        ended = self.run_stage(stage, run)
        if ended.status != 0:
            raise _broken(stage, ended)
        return largest_difference(run / stage, self.unbroken / stage)

    def _one_run(self, stage: str, run: Path, verdict: StageVerdict, num_kills: int) -> None:
        """Kill one run again and again until it ends or enough kills were made; then let it end."""
        resumes = 0
        self._reached = -1
        while verdict.kills < num_kills:
            reached_before = self._progress(run / ".attempts" / stage)
            wants_inside = verdict.inside_saves < math.ceil(INSIDE_FRACTION * (verdict.kills + 1))
            is_inside = wants_inside and bool(self._failpoints)
            ended = self._kill_inside(stage, run) if is_inside else self._kill_anywhere(stage, run, reached_before)
            if ended.status != KILLED:
                break
            verdict.kills += 1
            verdict.inside_saves += is_inside
            resumes += 1
            lost = self._reached - self._progress(run / ".attempts" / stage)
            verdict.lost_steps = max(verdict.lost_steps, lost)
        else:
            ended = self.run_stage(stage, run)
        if ended.status != 0:
            raise _broken(stage, ended)
        verdict.most_resumes = max(verdict.most_resumes, resumes)

    def _kill_inside(self, stage: str, run: Path) -> Ended:
        """Kill the process, one rank or all, at a random passage of a random failpoint of a save."""
        name = self.chosen.choice(self._failpoints)
        nth = self.chosen.randint(1, MAX_NTH) if name in self._seen else 1
        is_fresh = self._progress(run / ".attempts" / stage) == 0
        ended = self.kill_at(stage, run, name, nth, self._whom())
        if ended.status == KILLED:
            self._seen.add(name)
        elif is_fresh and name not in self._seen:
            self._failpoints.remove(name)  # a whole run passed by without it: there is no such place
        self._note(run / ".attempts" / stage)
        return ended

    def kill_at(self, stage: str, run: Path, failpoint: str, nth: int, who: int | str) -> Ended:
        """Rank 0 kills itself there; or it is held there while another rank, or all, are killed."""
        if who == 0:
            return self.run_stage(stage, run, failpoint=f"{failpoint}:kill:{nth}:0")
        mark = run.parent / "moment"
        mark.unlink(missing_ok=True)
        moment = {"call": "reach", "name": failpoint, "nth": nth, "mark": str(mark), "sleep": HELD_SECONDS}
        send = {"signal": "SIGKILL", "exists": str(mark), "rank": who}
        return self.run_stage(stage, run, moments=[moment], sends=[send])

    def _whom(self) -> int | str:
        """Rank 0 where it is alone; else any rank, or all."""
        return 0 if self.num_ranks == 1 else self.chosen.choice([*range(self.num_ranks), "all"])

    def _kill_anywhere(self, stage: str, run: Path, reached: int) -> Ended:
        """Kill by the clock, or a random while after a random step."""
        whole = self._seconds[stage]
        if self.chosen.random() < 0.4:
            send = {"signal": "SIGKILL", "seconds": self.chosen.uniform(0.0, whole)}
        else:
            lines = max(reached, 0) + self.chosen.randint(1, 6)
            metrics = run / ".attempts" / stage / "metrics.jsonl"
            seconds = self.chosen.uniform(0.0, whole / 20)
            send = {"signal": "SIGKILL", "lines_of": str(metrics), "lines": lines, "seconds": seconds}
        ended = self.run_stage(stage, run, sends=[send | {"rank": self._whom()}])
        self._note(run / ".attempts" / stage)
        return ended

    def _note(self, attempt: Path) -> None:
        metrics = attempt / "metrics.jsonl"
        self._reached = metrics.read_bytes().count(b"\n") if metrics.exists() else -1

    def _progress(self, attempt: Path) -> int:
        """Step of an attempt's newest committed checkpoint."""
        steps = [path.parent.parent.name for path in (attempt / CHECKPOINTS).glob("step-*/*/MANIFEST.json")]
        return max((int(name.removeprefix("step-")) for name in steps), default=0)

    def _compare(self, stage: str, run: Path, expected: Evidence, verdict: StageVerdict) -> None:
        verdict.runs += 1
        differing = evidence_of(run / stage).differing(expected)
        for kind in differing:
            verdict.unequal[kind] = verdict.unequal.get(kind, 0) + 1
        if differing:
            found = largest_difference(run / stage, self.unbroken / stage)
            verdict.largest_difference = max(verdict.largest_difference, found)

    def device_of(self, stage: str) -> str:
        """Where the unbroken run was computed."""
        path = self.unbroken / stage / "resolved.json"
        return str(read_json(path).get("device", "cpu")) if path.exists() else "cpu"


@contextmanager
def trial_engine(folder: Path, *, seed: int = 0, num_ranks: int = 1) -> Iterator[KillTrials]:
    """Trials of the project's own recipe, made ready in an empty folder."""
    with Trials() as trials:
        recipe = load_recipe(str(write_trial_data(folder)))
        engine = KillTrials(recipe, folder / "runs", trials, seed=seed, num_ranks=num_ranks)
        engine.prepare()
        yield engine


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the disk has none. No committed file is ever written into."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _broken(stage: str, ended: Ended) -> CheckpointError:
    last = ended.err.strip().splitlines()[-1:] or ["no message"]
    return CheckpointError(
        "E-PROOF-RUN",
        what=f"{stage} ended with {ended.status}: {last[0][:300]}",
        next="mend that first; the same recipe must run to its end",
    )
