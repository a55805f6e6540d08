"""fp16: the scale of the loss, overflows that are passed over, and what a checkpoint keeps of it."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.amp import GradScaler
from train.test_engine import flat, gradients_of, make_engine, ragged_batch

from groundup.base import failpoints
from groundup.base.errors import NumericsError
from groundup.train import combinations
from groundup.train.loop import training_steps
from groundup.train.run import TrainingRun
from groundup.train.scaler import MAX_SCALE, MIN_SCALE, LossScaler

pytestmark = pytest.mark.costly


def test_scale_moves_as_that_of_torch():
    generator, ours = torch.Generator().manual_seed(0), LossScaler()
    scale, tracker = torch.tensor([ours.scale]), torch.zeros(1, dtype=torch.int32)
    theirs = GradScaler("cpu", enabled=True)
    assert ours.scale == theirs.get_scale()
    seen = set()
    for _ in range(40_000):
        overflows = bool(torch.rand((), generator=generator) < 3e-4)
        ours.back_off() if overflows else ours.grow()
        torch._amp_update_scale_(
            scale,
            tracker,
            torch.tensor([float(overflows)]),
            theirs.get_growth_factor(),
            theirs.get_backoff_factor(),
            theirs.get_growth_interval(),
        )
        assert (ours.scale, ours.good_steps) == (float(scale), int(tracker))
        seen.add(ours.scale)
    assert len(seen) > 4, "it moved both ways"


def test_scale_has_bounds():
    scaler = LossScaler()
    scaler.scale = MAX_SCALE
    for _ in range(5000):
        scaler.grow()
    assert scaler.scale == MAX_SCALE
    scaler.scale = 2 * MIN_SCALE
    scaler.refuse_overflow_at_minimum()
    scaler.back_off()
    with pytest.raises(
        NumericsError, match="E-LOSS-SCALE: gradients overflow fp16 although the loss scale has come down"
    ):
        scaler.refuse_overflow_at_minimum()


def test_gradients_in_fp16_are_those_of_fp32(make_model):
    """The scale is taken out before the norm; weights that a step moves are those of the fp32 masters."""
    batch = ragged_batch(0)
    exact, scaled = (make_engine(make_model(), dtype=dtype) for dtype in (torch.float32, torch.float16))
    sums = [engine.forward_backward(batch, lambda row: row) for engine in (exact, scaled)]
    assert sums[0].loss_scale is None and sums[1].loss_scale == 2.0**16
    norms = [engine.gradient_norm() for engine in (exact, scaled)]
    assert norms[0] == pytest.approx(norms[1], rel=3e-3)
    ours, theirs = flat(gradients_of(scaled)), flat(gradients_of(exact))
    assert (ours - theirs).norm() < 3e-3 * theirs.norm()


def test_small_gradients_are_not_lost(make_model):
    """A batch of very many tokens: without the scale most of its gradients would be 0 in fp16."""
    found = []
    for dtype, scale in ((torch.float32, None), (torch.float16, 1.0), (torch.float16, 2.0**16)):
        engine = make_engine(make_model(), dtype=dtype)
        if scale is not None:
            engine.scaler.scale = scale
        batch = replace(ragged_batch(0), num_loss_tokens=1 << 22)
        engine.forward_backward(batch, lambda row: row)
        engine.gradient_norm()
        found.append(flat(gradients_of(engine)))
    exact, without, scaled = found
    assert (without - exact).norm() > 0.1 * exact.norm()
    assert (scaled - exact).norm() < 0.005 * exact.norm()


def overflow_at(engine, *passages):
    """Spoil gradients after some of the passes, counted from 0."""
    whole, count = engine.gradient_norm, []

    def spoiled():
        if len(count) in passages:
            next(iter(engine.masters.values())).grad.view(-1)[1] = float("inf")
        count.append(1)
        return whole()

    engine.gradient_norm = spoiled


def test_an_overflow_is_passed_over_and_halves_the_scale(make_model, make_guard):
    engine, guard = make_engine(make_model(), dtype=torch.float16), make_guard(on_nonfinite="stop")
    overflow_at(engine, 1, 2)
    before = []
    results = []
    for result in training_steps(
        engine,
        [ragged_batch(seed) for seed in range(4)],
        lambda step: 1.0,
        guard,
        seed_of=lambda step, row: row,
        start_step=0,
    ):
        results.append(result)
        before.append({name: master.detach().clone() for name, master in engine.masters.items()})
    assert [result.is_skipped for result in results] == [False, True, True, False]
    assert [result.sums.loss_scale for result in results] == [2.0**16, 2.0**16, 2.0**15, 2.0**14]
    assert [(step, kind) for step, kind, _ in guard.events] == [(2, "overflow"), (3, "overflow")]
    assert all(torch.equal(before[0][name], before[2][name]) for name in before[0]), "weights stand"
    assert not all(torch.equal(before[2][name], before[3][name]) for name in before[0])
    assert (engine.scaler.scale, engine.scaler.good_steps) == (2.0**14, 1)


def test_a_loss_that_is_not_finite_is_the_guards(make_model, make_guard):
    engine = make_engine(make_model(), dtype=torch.float16)
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(60000.0)  # logits leave the range: no scale of the loss mends that
    with pytest.raises(NumericsError, match="E-NONFINITE"):
        list(
            training_steps(
                engine,
                [ragged_batch(0)],
                lambda step: 1.0,
                make_guard(),
                seed_of=lambda step, row: row,
                start_step=0,
            )
        )
    assert engine.scaler.scale == 2.0**16


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """A recipe with fp16 is refused on a CPU; the run itself can be tried there."""
    monkeypatch.setattr(combinations, "RULES", ())
    return {"precision": "fp16", "attention": "dense", "checkpoint_every": "4 steps"}


def lines(job, name):
    return [json.loads(line) for line in (job.folder / name).read_text().splitlines()]


def test_scale_and_skipped_steps_stand_in_the_metrics(make_job, fp16_on_cpu, monkeypatch):
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "opt.pre_step:nan:3")
    monkeypatch.setattr(failpoints, "_passages", Counter())
    job = make_job("run", **fp16_on_cpu)
    run = TrainingRun(job)
    run.state.passed_over = [5]  # another reason to pass over a step
    outcome = run.run()
    metrics = lines(job, "metrics.jsonl")
    assert [line.get("overflow_steps") for line in metrics] == [0, 0, 1, 1, 1, None, *[1] * 5]
    metrics.pop(5)
    assert [line["loss_scale"] for line in metrics] == [2.0**16] * 3 + [2.0**15] * 7
    assert [line["skipped_steps"] for line in metrics] == [0, 0, 1, 1, 1, *[2] * 5]
    assert metrics[2]["loss"] is None and metrics[-1]["loss"] < metrics[0]["loss"]
    assert outcome.figures["loss_scale"] == 2.0**15 and outcome.figures["skipped_steps"] == 2
    assert outcome.figures["overflow_steps"] == 1 and "peak_cuda_memory_bytes" not in outcome.figures
    assert [e["step"] for e in lines(job, "events.jsonl") if e["kind"] == "overflow"] == [3]


def test_a_resumed_run_has_the_scale_it_left(make_job, fp16_on_cpu):
    def ends(name, *, is_broken):
        job = make_job(name, **fp16_on_cpu)
        run = TrainingRun(job)
        if is_broken:
            overflow_at(run.engine, 1)
            run.engine.optimizer_step, whole = lambda lr: crash(run, whole, lr), run.engine.optimizer_step
            with pytest.raises(OSError, match="gone"):
                run.run()
            run = TrainingRun(job)
            assert run.state.step == 4 and run.engine.scaler.scale == 2.0**15 and run.engine.scaler.good_steps == 2
        else:
            overflow_at(run.engine, 1)
        outcome = run.run()
        return run, outcome.weights, lines(job, "metrics.jsonl")

    def crash(run, whole, lr):
        if run.state.step == 6:
            raise OSError("the machine is gone")
        return whole(lr)

    unbroken, broken = ends("unbroken", is_broken=False), ends("broken", is_broken=True)
    assert unbroken[2] == broken[2]
    assert all(torch.equal(unbroken[1][name], broken[1][name]) for name in unbroken[1])
    scalers = [run.engine.scaler for run in (unbroken[0], broken[0])]
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_an_overflow_that_no_scale_mends_stops_the_run(make_job, fp16_on_cpu):
    job = make_job("run", **fp16_on_cpu)
    run = TrainingRun(job)
    run.engine.scaler.scale = 4 * MIN_SCALE
    overflow_at(run.engine, 3, 4, 5)
    with pytest.raises(NumericsError, match=r"E-LOSS-SCALE.*come down to 1.*precision: bf16"):
        run.run()
    assert [line["step"] for line in lines(job, "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert TrainingRun(job).state.step == 5, "saved as it was before the step"
