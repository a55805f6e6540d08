"""Errors that people read: one line with what is wrong, where, and what to do next."""

from typing import ClassVar


class GroundupError(Exception):
    """An error that a user can mend; the command line prints it as one line and exits with its code."""

    exit_code: ClassVar[int] = 70

    def __init__(self, code: str, *, what: str, where: object = "", next: str = "") -> None:
        self.code, self.what, self.where, self.next = code, what, str(where), next
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error on one line, control characters escaped."""
        text = f"{self.code}: {self.what}"
        if self.where:
            text += f" at {self.where}"
        if self.next:
            text += f". {self.next[:1].upper()}{self.next[1:]}"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ConfigError(GroundupError):
    """A recipe or a command line that cannot be obeyed."""

    exit_code = 2


class DataError(GroundupError):
    """Input data, or the disk it is written to, that cannot be used."""

    exit_code = 3


class CheckpointError(GroundupError):
    """A checkpoint or model directory that cannot be loaded or saved."""

    exit_code = 4


class NumericsError(GroundupError):
    """Training or a proof whose numbers went wrong."""

    exit_code = 5


class DistributedError(GroundupError):
    """A rank that was lost, hangs, or disagrees."""

    exit_code = 6


class DoesNotFit(GroundupError):
    """Memory or disk that would not suffice, seen before the start."""

    exit_code = 7


class Preempted(GroundupError):
    """Stopped by a signal after the state was saved; the same command goes on."""

    exit_code = 75
