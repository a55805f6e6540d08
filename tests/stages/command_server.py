"""Runs groundup's commands in processes of their own, each forked from this one, which has imported everything.

A process that is to be killed or interrupted must not be the test's own, and importing torch for each would take most
of the tests' time. One JSON line in: arguments, environment, the step at which to interrupt. One JSON line out: exit
status and what was written to standard error.
"""

import json
import os
import signal
import sys
import tempfile

from groundup.base.machine import prepare_process

prepare_process()

from groundup.cli import main  # noqa: E402
from groundup.stages import training  # noqa: E402, F401 (what the children need)
from groundup.train.run import TrainingRun  # noqa: E402


def interrupt_at(step: int) -> None:
    """Send this process a SIGINT when a step of training is done."""
    record = TrainingRun._record_timing

    def record_and_interrupt(self, result):
        record(self, result)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    TrainingRun._record_timing = record_and_interrupt


def work(arguments, environment, step, err) -> None:
    """The child: run a command and leave with its exit code."""
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(environment)
    if step:
        interrupt_at(step)
    try:
        main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    else:
        code = 0
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    wanted = json.loads(line)
    with tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            work(*wanted, err.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        print(json.dumps([status, err.read().decode()]), flush=True)
