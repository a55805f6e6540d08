"""A signal that asks to stop, in every phase: saved, out within ten seconds with exit 75, resumed to the same bits."""

import pytest

from groundup.proof.signal_trials import LIMIT_SECONDS, PHASES, SIGNALS, signal_trial

pytestmark = pytest.mark.end_to_end
CASES = [(phase, SIGNALS[(number + shift) % 4]) for number, phase in enumerate(PHASES) for shift in (0, 2)]


def test_every_phase_and_every_signal_is_tried():
    assert len(CASES) == 16 and len(PHASES) == 8
    assert {phase for phase, _ in CASES} == set(PHASES) and {name for _, name in CASES} == set(SIGNALS)


@pytest.mark.parametrize(("phase", "name"), CASES)
def test_a_signal_saves_and_leaves_in_time(engine, phase, name):
    verdict = signal_trial(engine, phase, name)
    assert verdict.seconds is not None, "the phase was never reached"
    assert verdict.is_good, verdict.line()


def test_a_second_interrupt_leaves_at_once_and_harms_nothing(engine):
    verdict = signal_trial(engine, "accumulate", "SIGINT", second_after=0.3)
    assert verdict.seconds is not None and verdict.seconds < 3, verdict.line()
    assert verdict.status != 0 and verdict.resumed_status == 0 and verdict.is_same, verdict.line()


def test_the_limit_is_the_promised_one():
    assert LIMIT_SECONDS == 10
