"""What a person sees while groundup works: one line a stage, a live progress line, plain lines where no terminal is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_INTERVAL_SECONDS = 5.0


class Progress(Protocol):
    """A line that is replaced while work goes on."""

    def update(self, text: str) -> None: ...


class Log:
    """Writes lines to standard output, warnings to standard error; the live line needs a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.is_live = sys.stdout.isatty() and not quiet

    def say(self, text: str = "") -> None:
        """One line for the user."""
        if not self.quiet:
            print(text, flush=True)

    def warn(self, code: str, text: str) -> None:
        """One warning line."""
        if not self.quiet:
            print(f"WARNING {code}: {text}", file=sys.stderr, flush=True)

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
