"""Commands in processes of their own, forked from one that has imported everything and started no thread.

Importing torch takes seconds, a trial less than one: so each trial is a fork. The server never computes, so that no
pool of threads exists before the fork. It is the parent of every trial, so a signal cannot meet a foreign process.
Where forking is not possible or threads are there already, each command is a fresh process.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from groundup.proof.moments import install

Main = Callable[[list[str]], None]
POLL_SECONDS = 0.001
NEEDED = "groundup.stages.run"
"""What trials import anyway, the slow part of their start."""


def serve(main: Main, imports: Sequence[str]) -> None:
    """Import, then answer one JSON line of standard input after the other with one on standard output, until the input ends."""
    can_fork = hasattr(os, "fork")
    if can_fork:
        for name in (NEEDED, *imports):
            importlib.import_module(name)
        can_fork = num_threads() == 1
    print(json.dumps({"forks": can_fork}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_trial(json.loads(line), main if can_fork else None)), flush=True)


def num_threads() -> int:
    """Threads of this process; 1 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def _trial(wanted: Mapping[str, Any], main: Main | None) -> dict[str, Any]:
    """Run a command, send it its signals at their moments, and tell how it ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        if main is None:
            process = subprocess.Popen(
                [sys.executable, "-m", "groundup", *wanted["arguments"]],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | wanted["environment"],
            )
            pid = process.pid
        else:
            pid = os.fork()
            if pid == 0:
                _child(wanted, main, out.fileno(), err.fileno())
        status, sent_at = _watch(pid, wanted, began)
        ended = time.monotonic()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {
        "status": status,
        "out": texts[0],
        "err": texts[1],
        "seconds": ended - began,
        "seconds_after_signal": None if sent_at is None else ended - sent_at,
    }


def _watch(pid: int, wanted: Mapping[str, Any], began: float) -> tuple[int | None, float | None]:
    """Wait for a child; (its status, when the first signal was sent). The status is None for one past its limit."""
    sends = [dict(send) for send in wanted["sends"]]
    limit, sent_at = wanted["limit_seconds"], None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), sent_at
        now = time.monotonic()
        if now - began > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, sent_at
        if sends and _is_due(sends[0], now, began, sent_at):
            target = pid if not sends[0].get("worker") else next(iter(_workers(pid)), None)
            if target is None:
                time.sleep(POLL_SECONDS)
                continue
            os.kill(target, signal.Signals[sends.pop(0)["signal"]])
            sent_at = now if sent_at is None else sent_at
        time.sleep(POLL_SECONDS)


def _is_due(send: dict[str, Any], now: float, began: float, sent_at: float | None) -> bool:
    """Whether a signal's moment has come: a file was made or has so many lines; then its delay must pass."""
    if "since" not in send:
        if "exists" in send and not Path(send["exists"]).exists():
            return False
        if "lines_of" in send and _num_lines(Path(send["lines_of"])) < send["lines"]:
            return False
        send["since"] = sent_at if send.get("after_first") else now if {"exists", "lines_of"} & send.keys() else began
    return now - send["since"] >= send.get("seconds", 0.0) if send["since"] is not None else False


def _workers(pid: int) -> list[int]:
    """Worker processes of a trial, where the system tells; the busiest first."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return sorted(found, key=lambda worker: -_processor_ticks(worker))


def _processor_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _child(wanted: Mapping[str, Any], main: Main, out: int, err: int) -> NoReturn:
    """The trial: run the command and leave with its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what a background job was told to ignore
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(wanted["environment"])
    if wanted["environment"].get("GROUNDUP_TRIAL_FSIZE"):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = int(wanted["environment"]["GROUNDUP_TRIAL_FSIZE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    install(wanted.get("moments", []))
    code = 70
    try:
        main(wanted["arguments"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
