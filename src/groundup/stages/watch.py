"""A run at work, watched from another process: curves in a terminal, figures to a tracker. It reads the run's files only."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from groundup.base.log import Log
from groundup.report.follow import RunFollower
from groundup.report.sinks import open_sink
from groundup.report.terminal import live_lines, stage_at_work, status_line
from groundup.stages.report import known_run

READS_A_LOOK = 5.0
"""Times that reading takes between two looks at least: a long run's files are not read all the time."""


def is_at_work(run: Path) -> bool:
    """Whether the process that locked a run still lives. On another machine that cannot be told: a run that changed in
    the last minute counts."""
    lock = run / ".lock"
    words = lock.read_text(errors="replace").split() if lock.is_file() else []
    if len(words) != 4 or not words[1].isdigit():
        return False
    if words[3] != os.uname().nodename:
        changes = [path.stat().st_mtime for path in run.glob(".attempts/*/*.jsonl")]
        return bool(changes) and time.time() - max(changes) < 60
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _looks(run: Path, every_seconds: float, *, is_once: bool) -> Iterator[None]:
    """Now, then again and again until the run's process is gone, and once after that."""
    is_last = is_once
    while True:
        began = time.monotonic()
        yield
        if is_last:
            return
        time.sleep(max(every_seconds, READS_A_LOOK * (time.monotonic() - began)))
        is_last = not is_at_work(run)


def watch_run(run: Path, log: Log, *, every_seconds: float = 2.0, is_once: bool = False) -> None:
    """Draw a run until its work ends; a line for each change where there is no terminal. Raises ConfigError for no run."""
    known_run(run)
    is_once = is_once or not is_at_work(run)
    if not log.is_live:
        last = ""
        for _ in _looks(run, every_seconds, is_once=is_once):
            stage = stage_at_work(known_run(run))
            line = status_line(stage) if stage is not None else "no training step yet"
            if line != last:
                log.say(line)
            last = line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False) as live:
        for _ in _looks(run, every_seconds, is_once=is_once):
            size = shutil.get_terminal_size()
            lines = live_lines(known_run(run), width=size.columns - 1, height=size.lines - 1)
            live.update(Text("\n".join(lines), no_wrap=True), refresh=True)


def follow_run(
    run: Path, tracker: str, log: Log, *, folder: Path | None = None, every_seconds: float = 2.0, is_once: bool = False
) -> None:
    """Send a run's figures to a tracker until its work ends. Raises ConfigError for no run and for a missing tracker."""
    known_run(run)
    folder = folder or run / tracker
    sink, follower, count = open_sink(tracker, folder, run.resolve().name), RunFollower(run), 0
    try:
        for _ in _looks(run, every_seconds, is_once=is_once or not is_at_work(run)):
            for step, values in follower.new():
                sink.log(step, values)
                count += 1
    finally:
        sink.close()
    log.say(f"{tracker}  {count:,} lines of {run} sent to {folder}")
