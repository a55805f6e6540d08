"""Starts the ranks of a run on this machine, watches them, and starts them again when one is lost. Imports no torch."""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from groundup.base.errors import DistributedError, Preempted
from groundup.base.log import Log
from groundup.base.signals import SIGNALS, stop_request
from groundup.parallel.config import ParallelConfig
from groundup.parallel.rank import LAUNCHER_PID, LISTEN_FD, REPORT_FD

POLL_SECONDS = 0.1
SILENT_SECONDS = 8.0
"""Without a heartbeat for so long, a rank that has met the others is looked at."""
SILENT_START_SECONDS = 120.0
"""As long as libraries are read from a cold disk, no heartbeat comes through."""
IDLE_SECONDS = 2.0
"""A silent rank that uses no processor time for so long is lost."""
GRACE_SECONDS = 2.0
"""For the others to end by themselves when one has failed."""
SAVED_GRACE_SECONDS = 60.0
BACKOFF_SECONDS = 1.0


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    pipe: int
    errors: IO[bytes] | None
    """What the rank writes to standard error; rank 0's is the launcher's own."""
    heard_at: float
    step: int | None = None
    has_begun: bool = False
    """Whether it trains: what an earlier run left was put away, as far as `--restart` asked for that."""
    words: str = ""
    has_lost_peer: bool = False
    ticks: int = -1
    received: bytes = b""

    @property
    def name(self) -> str:
        return f"rank {self.number} (pid {self.process.pid})"

    @property
    def where(self) -> str:
        return f"step {self.step}" if self.step is not None else "the start"

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None


@dataclass(frozen=True)
class _End:
    """Why a round of ranks is over."""

    code: int
    words: str = ""
    can_restart: bool = False
    has_begun: bool = False
    """Whether a rank had begun to train."""
    grace_seconds: float = 0.0


@dataclass
class _StopSignals:
    """Signals that asked for an end, in order; those of `passed_on` have reached the ranks."""

    received: list[int] = field(default_factory=list)
    num_passed_on: int = 0

    def __enter__(self) -> "_StopSignals":
        self._before = {
            number: signal.signal(number, self._receive)
            for number in SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def launch(command: Sequence[str], config: ParallelConfig, log: Log) -> int:
    """Run `command` on `config.num_ranks` ranks to its end; returns the exit code. Only the cause of a failure is shown.

    `--restart` is left out when ranks that had begun are started again: what they began goes on.
    """
    restarts = 0
    with stop_request() as request, request.handed_over(), _StopSignals() as stop:
        while True:
            end = _run_ranks(command, config.num_ranks, stop)
            if not end.can_restart or restarts == config.max_restarts or stop.received:
                if end.words:
                    print(end.words, file=sys.stderr, flush=True)
                return end.code
            wait_seconds = BACKOFF_SECONDS * 2**restarts
            restarts += 1
            log.warn(
                "W-RESTART",
                f"{end.words.removeprefix('ERROR ')} — begins again from the last checkpoint in {wait_seconds:g} s "
                f"({restarts} of {config.max_restarts})",
            )
            if end.has_begun:
                command = [argument for argument in command if argument != "--restart"]
            until = time.monotonic() + wait_seconds
            while time.monotonic() < until and not stop.received:
                time.sleep(POLL_SECONDS)


def _run_ranks(command: Sequence[str], num_ranks: int, stop: _StopSignals) -> _End:
    with contextlib.ExitStack() as stack:
        ranks = _start(command, num_ranks, stack)
        selector = stack.enter_context(selectors.DefaultSelector())
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        end: _End | None = None
        looked_at = time.monotonic()
        deadline = float("inf")
        while any(rank.is_running for rank in ranks) and time.monotonic() < deadline:
            for key, _ in selector.select(POLL_SECONDS):
                _listen(key.data)
            now = time.monotonic()
            if now - looked_at > SILENT_SECONDS / 4:  # the launcher itself was stopped: the ranks' silence says nothing
                for rank in ranks:
                    rank.heard_at = now
            looked_at = now
            _pass_on(stop, ranks)
            for rank in ranks:
                rank.process.poll()
            if end is None:
                end = _why_over(ranks, stop)
                deadline = now + end.grace_seconds if end is not None else deadline
        for rank in ranks:
            _listen(rank)
        end = end or _why_over(ranks, stop, is_final=True) or _End(0)
        return replace(end, has_begun=any(rank.has_begun for rank in ranks))


def _start(command: Sequence[str], num_ranks: int, stack: contextlib.ExitStack) -> list[_Rank]:
    # the socket is open before any rank is: the port cannot be taken by another process in between
    meeting = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    ranks: list[_Rank] = []
    stack.callback(_end_all, ranks)
    for number in range(num_ranks):
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        os.set_blocking(reading, False)
        environment = os.environ | {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
            REPORT_FD: str(writing),
            LAUNCHER_PID: str(os.getpid()),
        }
        if sys.platform == "linux":  # ranks of one machine do not listen to others
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        descriptors = [writing]
        if number == 0:
            environment[LISTEN_FD] = str(meeting.fileno())
            descriptors.append(meeting.fileno())
        errors = None if number == 0 else stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        try:
            # a group of its own: a terminal's Ctrl-C reaches the launcher alone, which passes it on once
            process = subprocess.Popen(
                list(command),
                env=environment,
                pass_fds=descriptors,
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=errors,
            )
        finally:
            os.close(writing)
        ranks.append(_Rank(number, process, reading, errors, time.monotonic()))
    return ranks


def _end_all(ranks: Sequence[_Rank]) -> None:
    """Kill what still runs, with its workers, and leave no zombie."""
    for rank in ranks:
        if rank.process.poll() != 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()


def _listen(rank: _Rank) -> None:
    try:
        while chunk := os.read(rank.pipe, 1 << 16):
            rank.received += chunk
    except BlockingIOError:
        pass
    *lines, rank.received = rank.received.split(b"\n")
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        rank.heard_at = time.monotonic()
        rank.step = message.get("step", rank.step)
        rank.has_begun = message.get("has_begun", rank.has_begun)
        rank.words = message.get("words", rank.words)
        rank.has_lost_peer = message.get("has_lost_peer", rank.has_lost_peer)


def _pass_on(stop: _StopSignals, ranks: Sequence[_Rank]) -> None:
    for number in stop.received[stop.num_passed_on :]:
        stop.num_passed_on += 1
        for rank in ranks:
            if rank.is_running:
                rank.process.send_signal(signal.SIGKILL if stop.num_passed_on > 2 else number)


def _why_over(ranks: Sequence[_Rank], stop: _StopSignals, *, is_final: bool = False) -> _End | None:
    """The cause, as soon as there is one. A rank that only lost its peer is none before all are ended."""
    for rank in ranks:
        code = rank.process.returncode
        if code is not None and code < 0:
            if stop.received:
                return _stopped(signal.Signals(stop.received[0]).name)
            return _lost(rank, f"signal {-code}")
        if code is None and _is_silent(rank):
            if stop.received:
                return _stopped(f"{signal.Signals(stop.received[0]).name}; {rank.name} gave no sign of life")
            return _lost(rank, f"no sign of life for {time.monotonic() - rank.heard_at:.0f} s", code="E-RANK-HUNG")
    for rank in ranks:
        code = rank.process.returncode
        if code:
            _listen(rank)
            if rank.has_lost_peer and not is_final:
                continue
            grace = SAVED_GRACE_SECONDS if code == Preempted.exit_code else GRACE_SECONDS
            return _End(code, _words_of(rank), can_restart=rank.has_lost_peer, grace_seconds=grace)
    return None


def _words_of(rank: _Rank) -> str:
    return rank.words or _stderr_of(rank) or f"ERROR {rank.name} ended with exit code {rank.process.returncode}"


def _stopped(name: str) -> _End:
    stop = Preempted("E-PREEMPTED", what=f"stopped by {name}", next="the same command goes on from what was finished")
    return _End(stop.exit_code, stop.line(), grace_seconds=GRACE_SECONDS)


def _lost(rank: _Rank, why: str, *, code: str = "E-RANK-LOST") -> _End:
    last = _stderr_of(rank).splitlines()[-1:]
    error = DistributedError(
        code,
        what=f"{rank.name} {why}",
        where=rank.where + "".join(f" ({line.strip()[:200]})" for line in last),
        next="the same command goes on from the last checkpoint",
    )
    return _End(error.exit_code, f"ERROR {error.line()}", can_restart=True)


def _stderr_of(rank: _Rank) -> str:
    if rank.errors is None:
        return ""
    rank.errors.seek(0)
    return rank.errors.read().decode(errors="replace").strip()


def _is_silent(rank: _Rank) -> bool:
    """No heartbeat and no processor time: a process deep in a library that holds Python's lock is not taken for dead."""
    now = time.monotonic()
    limit = SILENT_START_SECONDS if rank.step is None else SILENT_SECONDS
    if now - rank.heard_at < limit:
        return False
    ticks = _ticks(rank.process.pid)
    if ticks is not None and ticks != rank.ticks:
        rank.ticks = ticks
        rank.heard_at = now - limit + IDLE_SECONDS
        return False
    return True


def _ticks(pid: int) -> int | None:
    """Processor time a process has used so far, in the kernel's ticks; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])
