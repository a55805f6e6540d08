"""Commands in processes of their own, forked from one that has imported everything and started no thread.

Importing torch takes seconds, a trial less than one: so each trial is a fork. The server never computes, so that no
pool of threads exists before the fork. It is the parent of every trial, so a signal cannot meet a foreign process.
Where forking is not possible or threads are there already, each command is a fresh process. A command on several ranks
is as many processes, which meet over gloo at a socket that this one holds open.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NoReturn

from groundup.parallel.rank import LAUNCHER_PID, LISTEN_FD
from groundup.proof.moments import install

Main = Callable[[list[str]], None]
POLL_SECONDS = 0.001
NEEDED = "groundup.stages.training"
"""What trials import anyway, the slow part of their start."""
PEER_SECONDS = 30.0
"""For the other ranks to leave by themselves when one is gone."""


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
    with ExitStack() as stack:
        began = time.monotonic()
        environments, meeting = _environments(wanted, stack)
        # of every rank: what it says, and what it says of its errors
        said = [(_scratch(stack), _scratch(stack)) for _ in environments]
        pids = [
            _start(wanted, environment, main, out, err, meeting)
            for environment, (out, err) in zip(environments, said, strict=True)
        ]
        statuses, sent_at = _watch(pids, wanted, began)
        ended = time.monotonic()
        texts = [(_text(out), _text(err)) for out, err in said]
    return {
        "statuses": statuses,
        "out": "".join(out for out, _ in texts),
        "err": "".join(err for _, err in texts),
        "seconds": ended - began,
        "seconds_after_signal": None if sent_at is None else ended - sent_at,
    }


def _environments(wanted: Mapping[str, Any], stack: ExitStack) -> tuple[list[dict[str, str]], socket.socket | None]:
    """What each rank finds in its environment, and the socket at which rank 0 awaits the others."""
    num_ranks = wanted["num_ranks"]
    if num_ranks == 1:
        return [wanted["environment"]], None
    meeting = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    shared = {
        **wanted["environment"],
        **{"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])},
        **{"GLOO_SOCKET_IFNAME": "lo", LAUNCHER_PID: str(os.getpid())},
    }
    every = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    every[0][LISTEN_FD] = str(meeting.fileno())
    return every, meeting


def _start(
    wanted: Mapping[str, Any],
    environment: Mapping[str, str],
    main: Main | None,
    out: IO[bytes],
    err: IO[bytes],
    meeting: socket.socket | None,
) -> int:
    """Start a rank; returns its process id."""
    if main is not None:
        pid = os.fork()
        if pid == 0:
            _child(wanted, environment, main, out.fileno(), err.fileno())
        return pid
    return subprocess.Popen(
        [sys.executable, "-m", "groundup", *wanted["arguments"]],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env={**os.environ, **environment},
        pass_fds=[] if meeting is None else [meeting.fileno()],
    ).pid


def _scratch(stack: ExitStack) -> IO[bytes]:
    return stack.enter_context(tempfile.TemporaryFile())


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _watch(pids: Sequence[int], wanted: Mapping[str, Any], began: float) -> tuple[list[int | None], float | None]:
    """Wait for the ranks; (their statuses, when the first signal was sent). The status is None for one past its limit."""
    sends = [dict(send) for send in wanted["sends"]]
    deadline, sent_at = began + wanted["limit_seconds"], None
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(pids):
        running = [pid for pid in pids if pid not in statuses]
        now = time.monotonic()
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid] != 0:
                    deadline = min(deadline, now + PEER_SECONDS)
            elif now > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        if sends and _is_due(sends[0], now, began, sent_at):
            targets = [pid for pid in _targets(pids, sends[0]) if pid not in statuses]
            if targets:
                number = signal.Signals[sends.pop(0)["signal"]]
                for target in targets:
                    os.kill(target, number)
                sent_at = now if sent_at is None else sent_at
        time.sleep(POLL_SECONDS)
    return [statuses[pid] for pid in pids], sent_at


def _targets(pids: Sequence[int], send: Mapping[str, Any]) -> list[int]:
    """Whom a signal is for: a rank, rank 0 if none is named, all of them, or a worker of rank 0."""
    if send.get("worker"):
        return _workers(pids[0])[:1]
    rank = send.get("rank", 0)
    return list(pids) if rank == "all" else [pids[rank]]


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


def _child(wanted: Mapping[str, Any], environment: Mapping[str, str], main: Main, out: int, err: int) -> NoReturn:
    """The trial: run the command and leave with its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what a background job was told to ignore
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update(environment)
    if "GROUNDUP_TRIAL_FSIZE" in environment:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = int(environment["GROUNDUP_TRIAL_FSIZE"])
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
