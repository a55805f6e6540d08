"""Named failpoints: faults that a test injects by an environment variable; without it, nothing happens.

`GROUNDUP_FAILPOINT=NAME:ACTION:NTH` makes the NTH passage (from 1) through `reach("NAME")` fail, ACTION being
kill (SIGKILL to this process), raise (RuntimeError), enospc (OSError, disk full), stall (sleep for an hour), slow
(half a second, at this and every later passage), oom (the RuntimeError of torch's CPU allocator), or nan (the caller
is told to spoil its numbers). `GROUNDUP_FAILPOINT=NAME:ACTION:NTH:RANK` does so in the process of that rank alone; NTH
may be several numbers, as in `2+3`.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter

VARIABLE = "GROUNDUP_FAILPOINT"
SLOW_SECONDS = 0.5
_passages: Counter[str] = Counter()
_counting = threading.Lock()


def reach(name: str) -> bool:
    """Pass the failpoint `name`; fails only where the environment asks for it. True: put a NaN into the numbers."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return False
    wanted_name, action, nth, *ranks = wanted.split(":")
    if wanted_name != name or (ranks and os.environ.get("RANK", "0") not in ranks):
        return False
    with _counting:
        _passages[name] += 1
        passage = _passages[name]
    wanted_passages = [int(number) for number in nth.split("+")]
    if action == "slow" and passage >= wanted_passages[0]:
        time.sleep(SLOW_SECONDS)
        return False
    if passage not in wanted_passages:
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "oom":
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: failpoint {name}")
    elif action == "stall":
        time.sleep(3600)
    elif action != "nan":
        raise ValueError(f"unknown failpoint action {action!r}")
    return action == "nan"
