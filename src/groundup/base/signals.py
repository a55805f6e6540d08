"""Signals that ask a process to stop: an interrupt where nothing polls, a wish where work polls, a deadline for both.

Python runs a signal's handler between two bytecodes of the main thread, which may sit in a long call of a library. A
thread that the system wakes at once keeps the time: what has not ended by itself is ended, its state saved if it can be.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS = 8.0
"""From a signal to the end of a process that did not end by itself; saving then has two seconds to the promised ten."""
SAVE_SECONDS = 60.0
"""For a save that a slow disk has not finished by then: longer than the promise, and not for ever."""
SECOND_INTERRUPT_SECONDS = 0.5
EXIT_CODE = 75


class StopRequest:
    """What a process was asked by a signal. Used as a context on the main thread; elsewhere it is never asked."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS, save_seconds: float = SAVE_SECONDS) -> None:
        self.name = ""
        """Name of the first signal; empty while there was none."""
        self._grace_seconds, self._save_seconds = grace_seconds, save_seconds
        self._is_polled = self._is_handed_over = False
        self._rescue: Callable[[], str] | None = None
        self._before: dict[int, Any] = {}
        self._fd_before = -1
        self._is_over = threading.Event()

    def is_asked(self) -> bool:
        """Whether a signal asked to stop."""
        return bool(self.name)

    @contextmanager
    def polled(self, rescue: Callable[[], str]) -> Iterator[None]:
        """Within it a signal raises nothing: the work asks `is_asked` often, saves, and ends.

        `rescue` is called from another thread if it does not end in time; it saves and says what it saved. It too has
        its time: `save_seconds`.
        """
        self._is_polled, self._rescue = True, rescue
        try:
            yield
        finally:
            self._is_polled, self._rescue = False, None

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Within it no deadline counts: the process passes signals on to others, who keep theirs."""
        self._is_handed_over = True
        try:
            yield
        finally:
            self._is_handed_over = False

    def wait_until_over(self) -> None:
        """Wait, in a rescue, for the work to end by itself, as long as a save may take."""
        self._is_over.wait(self._save_seconds)

    def __enter__(self) -> "StopRequest":
        self._is_woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        self._fd_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish stands
                self._before[number] = signal.signal(number, self._receive)
        self._watch_thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._watch_thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._is_over.set()
        os.close(self._wakes)
        self._watch_thread.join()
        os.close(self._is_woken)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second_interrupt = bool(self.name) and number == signal.SIGINT
        self.name = self.name or signal.Signals(number).name
        if is_second_interrupt or not self._is_polled:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            number = self._next_signal(None)
            if number is None:
                return
            if number in SIGNALS and not self._is_handed_over:
                break
        name, deadline = signal.Signals(number).name, time.monotonic() + self._grace_seconds
        while (number := self._next_signal(max(0.0, deadline - time.monotonic()))) is not None:
            if number == signal.SIGINT:
                deadline, self._rescue = min(deadline, time.monotonic() + SECOND_INTERRUPT_SECONDS), None
        if not self._is_over.is_set():
            self._end(name)

    def _next_signal(self, timeout_seconds: float | None) -> int | None:
        """The next signal's number; None when the time is over or the context was left."""
        if not select.select([self._is_woken], [], [], timeout_seconds)[0]:
            return None
        received = os.read(self._is_woken, 1)
        return received[0] if received else None

    def _end(self, name: str) -> None:
        rescue = self._rescue
        if rescue is None:
            _leave(name, "what was finished before is kept")
        too_late = threading.Timer(
            self._save_seconds,
            _leave,
            (name, f"the save at work took more than {self._save_seconds:g} s; the last one stands"),
        )
        too_late.daemon = True
        too_late.start()
        try:
            saved = rescue()
        except Exception as error:  # the end of the process must not depend on it
            saved = f"the last save stands, another was not possible ({error})"
        too_late.cancel()
        if not self._is_over.is_set():
            _leave(name, saved)


def _leave(name: str, saved: str) -> NoReturn:
    """End the process: another thread is in the middle of a call, neither it nor Python's own exit can be waited for."""
    line = f"E-PREEMPTED: stopped by {name}; {saved}. Run the same command again to go on\n"
    try:
        os.write(sys.stderr.fileno() if sys.stderr is not None else 2, line.encode())
    finally:  # a terminal that is gone, too
        os._exit(EXIT_CODE)


_current: StopRequest | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """The process's StopRequest: that of a caller further out, else a new one."""
    global _current
    if _current is not None:
        yield _current
        return
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    with StopRequest() as request:
        _current = request
        try:
            yield request
        finally:
            _current = None
