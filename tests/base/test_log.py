"""What is printed where no terminal is."""

import subprocess
import sys

import pytest

from groundup.base import log
from groundup.base.log import Log


def test_lines_and_warnings_go_to_their_streams(capsys):
    logger = Log()
    logger.say("hello")
    logger.warn("W-X", "odd")
    assert capsys.readouterr() == ("hello\n", "WARNING W-X: odd\n")


def test_quiet_says_nothing(capsys):
    logger = Log(quiet=True)
    logger.say("hello")
    with logger.progress() as progress:
        progress.update("50 %")
    assert capsys.readouterr().out == ""


def test_progress_is_plain_lines_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    logger = Log()
    assert not logger.is_live
    with logger.progress() as progress:
        for second in range(12):
            now[0] = 100.0 + second
            progress.update(f"second {second}")
    assert capsys.readouterr().out == "  second 5\n  second 10\n"
    assert log.PLAIN_INTERVAL_SECONDS == 5.0


def test_progress_on_a_terminal_is_one_live_line(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    logger = Log()
    assert logger.is_live
    with logger.progress() as progress:
        progress.update("[bold]not markup[/bold]")
    capsys.readouterr()


def test_a_reader_who_left_does_not_end_the_work(tmp_path):
    """`| head -1`: the work goes on, and the process ends without a word about its pipe."""
    code = """
import sys
from pathlib import Path
from groundup.base.log import Log
log = Log()
for number in range(2000):
    log.say(f"line {number} " + "x" * 100)
    log.warn("W-X", "also to nobody")
Path(sys.argv[1]).touch()
"""
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(done)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=30) == 0 and done.exists()
