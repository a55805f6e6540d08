"""A promise as the long tier tries it: what its trials are, how one is made, what they count as."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Trial = dict[str, Any]
Outcome = dict[str, Any]
Make = Callable[[Trial], Outcome]


@dataclass(frozen=True)
class Guarantee:
    """A table of docs/reliability.md, and how its rows come about."""

    name: str
    title: str
    """Heading of its table."""
    columns: tuple[str, ...]
    """After date and machine."""
    usual_count: int
    unit: str
    """What `usual_count` counts, for the help of the command."""
    plan: Callable[[int], list[Trial]]
    """The trials that make up a count, each told apart by what is in it."""
    making: Callable[[Path], AbstractContextManager[Make]]
    """Makes ready in an empty folder; gives what makes one trial and tells its outcome."""
    figures: Callable[[Sequence[Outcome]], list[str]]
    """The cells of a row."""
    is_kept: Callable[[Sequence[Outcome]], bool]
    """Whether every trial showed what is promised."""


def chunks(count: int, size: int) -> list[Trial]:
    """Trials that try many small things each: seed and how many."""
    return [{"seed": begin // size, "count": min(size, count - begin)} for begin in range(0, count, size)]


def total(outcomes: Sequence[Outcome], key: str) -> int:
    """Sum over the outcomes."""
    return sum(outcome[key] for outcome in outcomes)
