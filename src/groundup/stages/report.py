"""What a run shows: its page, several runs on one page, and the diagnosis in words."""

from collections.abc import Sequence
from pathlib import Path

from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.report.comparison import write_comparison
from groundup.report.diagnosis.words import diagnosis_lines
from groundup.report.page import write_report
from groundup.report.read import RunRecord, read_run


def make_report(run: Path, log: Log, *, to: Path | None = None) -> Path:
    """Write report.html. Raises ConfigError if the folder is no run."""
    _refuse_other(run)
    path = write_report(run, to)
    log.say(f"report  {path}  {path.stat().st_size / 1000:.0f} kB")
    return path


def make_comparison(runs: Sequence[Path], log: Log, *, to: Path | None = None) -> Path:
    """Write a page of several runs. Raises ConfigError if a folder is no run."""
    for run in runs:
        _refuse_other(run)
    path = write_comparison(runs, to)
    log.say(f"report  {path}  {path.stat().st_size / 1000:.0f} kB")
    return path


def say_diagnosis(run: Path, log: Log) -> None:
    """What each training stage of a run shows. Raises ConfigError if the folder is no run."""
    _refuse_other(run)
    record = read_run(run)
    for line in diagnosis_lines(record):
        log.say(line)
    if not record.stages:
        log.say(f"{record.name}  no stage has trained yet")


def known_run(run: Path) -> RunRecord:
    """A run's files. Raises ConfigError if the folder is no run."""
    _refuse_other(run)
    return read_run(run)


def _refuse_other(run: Path) -> None:
    if run.is_file():
        raise ConfigError(
            "E-RUN-NONE",
            what="a file, perhaps a recipe, not a run",
            where=run,
            next=f"of a recipe tell `groundup plan {run}` and `groundup doctor {run}`; give a run's folder here",
        )
    if not (run / "recipe.yaml").is_file():
        raise ConfigError(
            "E-RUN-NONE",
            what="no recipe.yaml: not a run",
            where=run,
            next="give a run's folder, such as runs/quickstart",
        )
