"""The stage that writes a run's page."""

from pathlib import Path

from groundup.base.errors import ConfigError
from groundup.base.log import Log
from groundup.report.page import write_report


def make_report(run: Path, log: Log) -> Path:
    """Write report.html. Raises ConfigError if the folder is no run."""
    if not (run / "recipe.yaml").is_file():
        raise ConfigError(
            "E-RUN-NONE",
            what="no recipe.yaml: not a run",
            where=run,
            next="give a run's folder, such as runs/quickstart",
        )
    path = write_report(run)
    log.say(f"report  {path}  {path.stat().st_size / 1000:.0f} kB")
    return path
