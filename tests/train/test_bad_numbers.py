"""NaN and infinities at random places: nothing that is not finite is ever kept, and the state before the step stands."""

import random

import pytest
import torch

from groundup.base.errors import CheckpointError, NumericsError
from groundup.train.engine import TorchEngine
from groundup.train.run import TrainingRun

NUM_STEPS = 6
POISONS = (float("nan"), float("inf"), -float("inf"))


def snapshot(engine):
    return {
        (part, name): tensor.clone() for part, group in engine.state_dict().items() for name, tensor in group.items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def violations_of(make_job, seed, engine_step=None):
    """Trains with one bad element in one gradient of one step; lists what must never be."""
    draw = random.Random(seed)
    policy, optimizer = draw.choice(["stop", "skip", "rewind"]), draw.choice(["muon", "adamw"])
    job = make_job(
        f"run-{seed}",
        duration=f"{NUM_STEPS} steps",
        checkpoint_every="2 steps",
        on_nonfinite=policy,
        optimizer=optimizer,
        precision=draw.choice(["fp32", "bf16"]),
        attention="dense",
    )
    run = TrainingRun(job)
    engine, step = run.engine, draw.randrange(NUM_STEPS)
    master = engine.masters[draw.choice(sorted(engine.masters))]
    element, poison = draw.randrange(master.numel()), draw.choice(POISONS)
    norm, violations, before = engine.gradient_norm, [], []

    def poisoned():
        if run.state.step == step and not before:
            before.append(snapshot(engine))
            master.grad.view(-1)[element] = poison
        return norm()

    engine.gradient_norm = poisoned
    if engine_step is not None:
        engine.optimizer_step = lambda lr: engine_step(engine, lr)
    applied = run.engine.optimizer_step

    def checked(lr):
        rates = applied(lr)
        if not all(tensor.isfinite().all() for tensor in snapshot(engine).values()):
            violations.append("a value that is not finite was stored")
        return rates

    engine.optimizer_step = checked
    try:
        run.run()
        if policy == "stop":
            violations.append("the run went on")
    except NumericsError:
        if policy != "stop":
            violations.append("the policy was not followed")
        if not equal(snapshot(engine), before[0]):
            violations.append("the state before the step does not stand")
    except (ValueError, CheckpointError) as error:  # a later line of defence: JSON, the store
        return [*violations, str(error)]
    assert before, "the fault was not injected"
    resumed = TrainingRun(job)
    if not all(tensor.isfinite().all() for tensor in snapshot(resumed.engine).values()):
        violations.append("a checkpoint holds a value that is not finite")
    return violations


@pytest.mark.parametrize("seed", range(40))
def test_no_bad_number_is_ever_kept(make_job, seed):
    assert violations_of(make_job, seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(20))
def test_no_bad_number_is_ever_kept_in_a_thousand(make_job, chunk):
    for seed in range(50):
        assert violations_of(make_job, 1000 + 50 * chunk + seed) == []


def test_a_multiplication_by_zero_would_be_seen(make_job, monkeypatch):
    """The mutant that skips a step by scaling its update with 0: NaN x 0 is NaN."""
    from groundup.train import loop
    from groundup.train.guard import Verdict

    whole = TorchEngine.optimizer_step

    def judge(self, step, sums, grad_norm):
        self._state.spoiled = not (torch.isfinite(torch.tensor(grad_norm)) and torch.isfinite(sums.nll_sum))
        return Verdict.APPLY

    def times_zero(engine, lr_multiplier):
        for master in engine.masters.values():
            if master.grad is not None:
                master.grad *= float(torch.isfinite(torch.tensor(engine._norm)))
        return whole(engine, lr_multiplier)

    monkeypatch.setattr(loop.Guard, "judge", judge)
    found = [text for seed in range(4) for text in violations_of(make_job, seed, times_zero)]
    assert "a value that is not finite was stored" in found
