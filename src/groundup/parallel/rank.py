"""A rank's side of its launcher: signs of life, last words, and an end when the launcher is gone. Imports no torch."""

import os
import signal
import sys
import threading
import time
from functools import cache
from typing import Any

REPORT_FD = "GROUNDUP_REPORT_FD"
LAUNCHER_PID = "GROUNDUP_LAUNCHER_PID"
LISTEN_FD = "GROUNDUP_LISTEN_FD"
"""Variables by which the launcher names a pipe, itself, and (to rank 0) the socket at which the ranks meet."""
TORCHRUN_REPLY = "TORCHELASTIC_ERROR_FILE"
TORCHRUN_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""torchrun's: a file for what a rank ends with, and how often it has started the ranks again."""
BEAT_SECONDS = 1.0
PEER_LOST = "E-RANK-GONE"
"""Code of the error of a rank that can no longer reach another one: a consequence, never the cause."""
_PR_SET_PDEATHSIG = 1


class Reports:
    """The pipe to the launcher. A thread beats every second: a process that is stopped beats no more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._step: int | None = None
        self._lock = threading.Lock()
        os.set_blocking(descriptor, False)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def met(self) -> None:
        """Tell that this rank has met the others: from now on silence is suspicious."""
        self._step = 0
        self._send({"step": 0})

    def reached(self, step: int) -> None:
        """Tell that training has begun, and that so many steps are done."""
        self._step = step
        self._send({"step": step, "has_begun": True})

    def last_words(self, text: str, *, has_lost_peer: bool) -> None:
        """What this rank ends with; the launcher shows the words of the first one only."""
        os.set_blocking(self._descriptor, True)
        self._send({"words": text, "has_lost_peer": has_lost_peer})

    def _beat(self) -> None:
        wait = threading.Event()
        while True:
            self._send({"step": self._step})
            wait.wait(BEAT_SECONDS)

    def _send(self, message: dict[str, Any]) -> None:
        import json

        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # the launcher itself is stopped: nobody listens, nothing is lost
                return
            except BrokenPipeError:  # the launcher is gone
                os.kill(os.getpid(), signal.SIGKILL)


@cache
def launcher_reports() -> Reports | None:
    """The line to the launcher that started this process; None where none did. Binds this process's life to it."""
    if REPORT_FD not in os.environ:
        return None
    descriptor, launcher = int(os.environ.pop(REPORT_FD)), int(os.environ[LAUNCHER_PID])
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":
        import ctypes  # late, as json below: what a command's help does without

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)
    return Reports(descriptor)


def tell_torchrun(text: str) -> None:
    """Leave what this rank ends with where torchrun, if it started the rank, looks for the first cause."""
    import json

    reply = os.environ.get(TORCHRUN_REPLY)
    if reply:
        with open(reply, "w", encoding="utf-8") as file:  # noqa: PTH123 (pathlib is what a command's help does without)
            json.dump({"message": text, "timestamp": int(time.time())}, file)


def was_started_again() -> bool:
    """Whether torchrun started this rank again after one was lost: then `--restart` would throw away what was saved."""
    return int(os.environ.get(TORCHRUN_RESTARTS) or 0) > 0
