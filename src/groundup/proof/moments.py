"""Moments of a trial: what happens when a function is called for the nth time, without a word in that function."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


def install(moments: Sequence[Mapping[str, Any]]) -> None:
    """Watch for calls of functions by their qualified names.

    A moment is `{"call": NAME}` with `nth` (1), `every` (also each later call), `name` (only calls whose argument of
    that name is this), `after` (the number of a moment that must have come). What happens: `mark` makes a file, by
    which the one who sends signals knows; `sleep` stretches the moment in the way of a long computation: a signal's
    handler runs, the work goes on.
    """
    if not moments:
        return
    pending = [dict(moment) for moment in moments]
    counts = [0] * len(pending)
    has_come = [False] * len(pending)

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        called = frame.f_code.co_qualname
        for index, moment in enumerate(pending):
            if moment["call"] != called or ("after" in moment and not has_come[moment["after"]]):
                continue
            if "name" in moment and frame.f_locals.get("name") != moment["name"]:
                continue
            counts[index] += 1
            nth = moment.get("nth", 1)
            if counts[index] == nth or (moment.get("every") and counts[index] > nth):
                has_come[index] = True
                _happen(moment)

    threading.setprofile(watch)
    sys.setprofile(watch)


def _happen(moment: Mapping[str, Any]) -> None:
    if moment.get("mark"):
        Path(moment["mark"]).touch()
    end = time.monotonic() + moment.get("sleep", 0.0)
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.01, left))
