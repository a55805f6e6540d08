"""What the guard decides on a step."""

import math

import pytest
import torch

from groundup.base.errors import NumericsError
from groundup.train.engine import StepSums
from groundup.train.guard import Verdict
from groundup.train.state import TrainingState


def sums(loss, tokens=10):
    return StepSums(torch.tensor(float(loss) * tokens), tokens)


def warm(guard, losses):
    for step, loss in enumerate(losses):
        assert guard.judge(step, sums(loss), 1.0) is Verdict.APPLY


STEADY = [3.0, 3.2, 2.9, 3.1] * 8


@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_never_applied_nor_remembered(make_guard, policy, loss, norm):
    state = TrainingState()
    guard = make_guard(lambda step: "chapter 7", state=state, on_nonfinite=policy)
    assert guard.judge(4, sums(loss), norm) is Verdict(policy)
    assert state.recent_losses == []
    ((step, kind, detail),) = guard.events
    assert (step, kind) == (5, "nonfinite") and detail.startswith(policy) and "chapter 7" in detail
    with pytest.raises(NumericsError, match=r"E-NONFINITE.*chapter 7 at step 5.*on_nonfinite: skip"):
        make_guard(lambda step: "chapter 7").judge(4, sums(loss), norm)


@pytest.mark.parametrize("policy", ["skip", "rewind", "warn", "stop", "off"])
def test_a_spike_meets_its_policy(make_guard, policy):
    state = TrainingState()
    guard = make_guard(state=state, on_spike=policy)
    warm(guard, STEADY)
    if policy == "stop":
        with pytest.raises(NumericsError, match="E-SPIKE: loss 60 is"):
            guard.judge(40, sums(60), 1.0)
    else:
        expected = {"warn": Verdict.APPLY, "off": Verdict.APPLY, "skip": Verdict.SKIP, "rewind": Verdict.REWIND}
        assert guard.judge(40, sums(60), 1.0) is expected[policy]
    assert (60.0 in state.recent_losses) == (policy == "off"), "a spike does not become the measure"
    assert [kind for _, kind, _ in guard.events] == ([] if policy == "off" else ["spike"])


def test_only_losses_far_above_the_recent_ones_are_spikes(make_guard):
    guard = make_guard(on_spike="stop")
    warm(guard, STEADY)
    for loss in (3.4, 3.9, 2.0, 0.1):  # a falling loss is none
        assert guard.judge(40, sums(loss), 1.0) is Verdict.APPLY
    assert guard.deviations(4.5) > 3


def test_too_few_losses_judge_nothing(make_guard):
    guard = make_guard(on_spike="stop", spike_window=64)
    warm(guard, [3.0] * 31)
    assert guard.judge(31, sums(1000), 1.0) is Verdict.APPLY


def test_the_window_slides(make_guard):
    state = TrainingState()
    warm(make_guard(state=state, spike_window=8), [9.0 - 0.1 * step for step in range(20)])
    assert state.recent_losses == pytest.approx([9.0 - 0.1 * step for step in range(12, 20)])


def test_the_same_memory_decides_the_same(make_guard):
    """A resumed run goes on with the window it was saved with."""
    state = TrainingState()
    warm(make_guard(state=state), STEADY)
    for loss in (3.3, 5.0, 60.0):
        copy = TrainingState(**vars(state))
        copy.recent_losses = list(state.recent_losses)
        again, first = make_guard(state=copy, on_spike="skip"), make_guard(state=state, on_spike="skip")
        assert again.judge(40, sums(loss), 1.0) is first.judge(40, sums(loss), 1.0)


def test_rewinds_are_counted_out(make_guard):
    state = TrainingState(rewinds=2)
    assert make_guard(state=state, on_nonfinite="rewind", max_rewinds=3).judge(0, sums(math.nan), 1.0) is Verdict.REWIND
    state.rewinds = 3
    with pytest.raises(NumericsError, match="after 3 rewinds"):
        make_guard(state=state, on_nonfinite="rewind", max_rewinds=3).judge(0, sums(math.nan), 1.0)


def test_no_supervised_token_is_passed_over(make_guard):
    guard = make_guard(on_nonfinite="stop")
    assert guard.judge(0, sums(0, tokens=0), 0.0) is Verdict.SKIP
    assert guard.events == [(1, "skip", "no supervised token")]
