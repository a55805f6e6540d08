"""What a person sees while groundup works: one line a stage, a live progress line, plain lines where no terminal is."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

PLAIN_INTERVAL_SECONDS = 5.0


class Progress(Protocol):
    """A line that is replaced while work goes on."""

    def update(self, text: str) -> None: ...


class Log:
    """Writes lines to standard output, warnings to standard error; the live line needs a terminal.

    Where nobody listens any more (`| head`, a terminal that is gone) it falls silent: the work matters more.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.is_live = sys.stdout.isatty() and not quiet

    def say(self, text: str = "") -> None:
        """One line for the user."""
        if not self.quiet:
            _write(sys.stdout, text)

    def warn(self, code: str, text: str) -> None:
        """One warning line."""
        if not self.quiet:
            _write(sys.stderr, f"WARNING {code}: {text}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A live line on a terminal; elsewhere a plain line every few seconds."""
        if self.is_live:
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            with Live(console=Console(), refresh_per_second=8, transient=True) as live:
                yield _LiveLine(lambda text: live.update(Text(text, overflow="ellipsis", no_wrap=True)))
        else:
            yield _PlainLines(self)


def _write(stream: TextIO | None, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:
        assert stream is not None
        # what is still held would be written again at the process's end, and fail again
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _LiveLine:
    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def update(self, text: str) -> None:
        self._show(text)


class _PlainLines:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._last = time.monotonic()

    def update(self, text: str) -> None:
        if time.monotonic() - self._last >= PLAIN_INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._log.say(f"  {text}")
