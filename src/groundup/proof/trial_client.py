"""The one who asks for trials: starts the server, hands it commands, reads how they ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    statuses: list[int | None]
    """Of every rank: exit code, the negative number of the signal that killed it, or None for one stopped at its limit."""
    out: str
    err: str
    seconds: float
    seconds_after_signal: float | None

    @property
    def status(self) -> int | None:
        """Of the rank that tells most: one that was killed, else one past its limit, else the highest exit code."""
        codes = [code for code in self.statuses if code is not None]
        if codes and min(codes) < 0:
            return min(codes)
        return max(codes) if len(codes) == len(self.statuses) else None


class Trials:
    """Runs groundup's commands in processes that may be killed; a context, at whose end the server leaves.

    `imports` are modules that the trials need beyond what every stage imports.
    """

    def __init__(self, imports: Sequence[str] = ("peft",)) -> None:
        # numpy's pool of threads would stand before the fork; the trials' own threads are torch's
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("GROUNDUP_FAILPOINT", None)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "groundup", "trial-server", *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.forks = bool(self._answer()["forks"])

    def _answer(self) -> dict[str, Any]:
        if self._server.stdout is None:
            raise AssertionError("the server has no standard output")
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the trial server left with {self._server.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(
        self,
        *arguments: object,
        failpoint: str = "",
        sends: Sequence[Mapping[str, Any]] = (),
        moments: Sequence[Mapping[str, Any]] = (),
        environment: Mapping[str, str] | None = None,
        limit_seconds: float = LIMIT_SECONDS,
        num_ranks: int = 1,
    ) -> Ended:
        """Run a command to its end. `sends` are signals and when, `moments` watched calls of functions."""
        wanted = {
            "num_ranks": num_ranks,
            "arguments": [str(argument) for argument in arguments],
            "environment": {**(environment or {}), **({"GROUNDUP_FAILPOINT": failpoint} if failpoint else {})},
            "sends": list(sends),
            "moments": list(moments),
            "limit_seconds": limit_seconds,
        }
        if self._server.stdin is None:
            raise AssertionError("the server has no standard input")
        self._server.stdin.write(json.dumps(wanted) + "\n")
        self._server.stdin.flush()
        return Ended(**self._answer())

    def close(self) -> None:
        """Let the server leave."""
        if self._server.stdin is not None:
            self._server.stdin.close()
        self._server.wait(60)
        if self._server.stdout is not None:
            self._server.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # a trial may be at work: it goes with its server
            os.killpg(self._server.pid, signal.SIGKILL)
        self.close()
