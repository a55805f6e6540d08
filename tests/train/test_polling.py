"""A signal is asked for between micro-batches; a test of that test."""

import os
import signal

import pytest

from groundup.base.errors import Preempted
from groundup.base.signals import GRACE_SECONDS
from groundup.train.run import TrainingRun

STRETCH_SECONDS = 2.5
"""Of a micro-batch: one who polls only between steps of four is late."""


def seconds_from_a_signal(make_job):
    """From a signal in the first of four micro-batches to the end of the step, if each took `STRETCH_SECONDS`: counted,
    not waited for."""
    run = TrainingRun(make_job("run", micro_batch_rows=1))
    begun, forward = [], run.engine._forward

    def stretched(part):
        if run.state.step == 4:
            begun.append(part)
            if len(begun) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(part)

    run.engine._forward = stretched
    with pytest.raises(Preempted):
        run.run()
    return STRETCH_SECONDS * len(begun)


def test_a_signal_is_asked_for_between_micro_batches(make_job):
    assert seconds_from_a_signal(make_job) < GRACE_SECONDS


def test_polling_only_between_steps_would_be_seen(make_job, monkeypatch):
    """The mutant: a signal in an accumulation is noticed at its end, which the deadline would have to rescue."""
    monkeypatch.setattr(TrainingRun, "_should_stop", lambda run, stop: lambda: False)
    assert seconds_from_a_signal(make_job) > GRACE_SECONDS
