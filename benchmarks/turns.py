"""Measurements in turn: each in a process of its own, A B A B …, so that a machine whose speed drifts is fair to both."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from groundup.base.machine import prepare_process

Figures = dict[str, Any]
PEERS = ("trainer", "theirs")
"""Names of workers that are another project."""
ENVIRONMENT = dict(os.environ)
"""As the user has it: what `prepare` sets in one process is not handed to another project's."""


def prepare() -> None:
    """The settings of our processes, before torch is imported; a peer's worker runs as its users run it."""
    if not set(PEERS) & set(sys.argv):
        prepare_process()


def measure_in_turn(workers: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Figures]]:
    """Run each worker's command `rounds` times in turn; a worker's last line of output is a JSON object.

    Raises RuntimeError with the worker's last words where it fails.
    """
    found: dict[str, list[Figures]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, arguments in workers.items():
            process = subprocess.run(
                [sys.executable, "-m", *arguments], capture_output=True, text=True, env=ENVIRONMENT
            )
            if process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}: {process.stderr[-2000:]}")
            found[name].append(json.loads(process.stdout.strip().rpartition("\n")[2]))
            print(f"  round {number + 1}  {name}  {json.dumps(found[name][-1])}", flush=True)
    return found


def tell(figures: Figures) -> None:
    """A worker's last line."""
    print(json.dumps(figures), flush=True)


def median_of(found: Sequence[Figures], name: str) -> float:
    """Median of a figure over the rounds."""
    return statistics.median(float(figures[name]) for figures in found)


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> list[float]:
    """Ours over theirs, round by round."""
    return [float(mine[name]) / float(other[name]) for mine, other in zip(ours, theirs, strict=True)]


def run_worker(workers: Mapping[str, Callable[[argparse.Namespace], Figures]], wanted: argparse.Namespace) -> bool:
    """Run the worker that `--worker` names and tell its figures; False where none is named."""
    if wanted.worker is None:
        return False
    tell(workers[wanted.worker](wanted))
    return True
