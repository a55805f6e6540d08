"""`groundup verify-resume`: the user's own recipe, shrunk, killed and resumed on their own machine, compared by bits."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from groundup.base.artifact import RunFolder
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.log import Log
from groundup.proof.kill_trials import KillTrials, StageVerdict
from groundup.proof.shrink import shrink
from groundup.proof.trial_client import Trials
from groundup.stages.recipe import Recipe


def verify_resume(recipe: Recipe, runs_dir: Path, log: Log, *, num_kills: int, seed: int) -> list[StageVerdict]:
    """Print a verdict for each training stage. Raises CheckpointError if a stage did not come back to its bits.

    A machine on which two unbroken runs differ as well is told so, and is no failure.
    """
    if num_kills < 1:
        raise ConfigError("E-CLI", what=f"--kills {num_kills}", next="give 1 or more")
    folder = (runs_dir / f".verify-{recipe.name}").absolute()
    run = RunFolder(folder)
    with run.lock():
        for left in folder.iterdir():  # of a proof that was broken off
            if left.is_dir():
                shutil.rmtree(left)
        (folder / "data").mkdir()
        small, said = shrink(recipe, folder / "data")
        for line in said:
            log.say(f"  {line}")
        with Trials(imports=[] if recipe.lora is None else ["peft"]) as trials:
            if not trials.forks:
                log.say("  trials are processes of their own here: a few seconds each")
            engine = KillTrials(small, folder / "trials", trials, seed=seed, num_ranks=small.parallel.num_ranks)
            if not engine.stages:
                raise ConfigError(
                    "E-CONFIG-SECTION",
                    what="the recipe trains nothing",
                    where=recipe.name,
                    next="add `pretrain:`, `sft:` or `lora:`",
                )
            engine.prepare()
            verdicts = []
            for stage in engine.stages:
                verdicts.append(engine.test(stage, num_kills, log.say))
                log.say(verdicts[-1].line())
                if verdicts[-1].device != "cpu":
                    log.say(_word_on_device(verdicts[-1]))
    _judge(verdicts, folder)
    shutil.rmtree(folder)
    with suppress(OSError):  # the runs folder goes too if it was made for this
        runs_dir.rmdir()
    return verdicts


def _word_on_device(verdict: StageVerdict) -> str:
    if verdict.is_exact:
        return f"  {verdict.device}: the same bits here; another device or driver may compute others"
    return f"  {verdict.device}: exactness cannot be promised here; measured above is how far the runs lie apart"


def _judge(verdicts: Sequence[StageVerdict], folder: Path) -> None:
    failed = [verdict.stage for verdict in verdicts if not verdict.is_exact and verdict.twin_difference == 0]
    if failed:
        raise CheckpointError(
            "E-RESUME-BITS",
            what=f"resumed runs of {', '.join(failed)} ended in other bits than the unbroken one",
            where=folder,
            next="keep that folder and report it; `--seed` repeats the same kills",
        )
