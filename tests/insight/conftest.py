"""A probe that measures nothing."""

import pytest

from groundup.insight import plan
from groundup.insight.probe import Probe

PROCESS, STEP_SECONDS, LOOK_SECONDS = 300_000_000, 0.5, 0.01


@pytest.fixture
def no_probe(monkeypatch):
    """Plans take these figures for measured."""

    def answer(shape, config, *, times):
        return Probe(PROCESS, *((STEP_SECONDS, LOOK_SECONDS) if times else ()))

    monkeypatch.setattr(plan, "probe", answer)
