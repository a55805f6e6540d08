"""A whole run: the same bits however often it is interrupted."""

import hashlib
import json
import os
import signal

import pytest
import torch

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.base.errors import NumericsError, Preempted
from groundup.train.run import TrainingRun

SCHEDULED = {
    "sample_every": "1 steps",
    "sample_prompts": ("x",),
    "validate_every": "3 steps",
    "checkpoint_every": "4 steps",
}


def bits(outcome, folder):
    """SHA-256 of the weights and of metrics.jsonl."""
    weights = hashlib.sha256()
    for name in sorted(outcome.weights):
        weights.update(name.encode() + outcome.weights[name].contiguous().numpy().tobytes())
    return weights.hexdigest(), hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class StopAt:
    """A sample callback that interrupts the run at some of its calls."""

    def __init__(self, *calls, action=lambda: os.kill(os.getpid(), signal.SIGINT)):
        self.calls, self.action, self.count = calls, action, 0

    def __call__(self, model, prompt):
        self.count += 1
        if self.count in self.calls:
            self.action()
        return ""


def crash():
    raise OSError("the machine is gone")


def adapted(make_model):
    model = make_model(seed=4)
    inject_lora(model, AdapterConfig(adapter="lora", lora_rank=2, lora_dropout=0.2), seed=0)
    return model


MODES = {
    "muon": {"optimizer": "muon"},
    "adamw": {"optimizer": "adamw"},
    "bf16": {"precision": "bf16", "attention": "chunked"},
    "lora with dropout": {"optimizer": "adamw"},
    "dropout": {"dropout": 0.2, "activation_checkpointing": "selective"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.costly
def test_an_interrupted_run_ends_with_the_bits_of_an_unbroken_one(make_job, make_model, mode):
    changes = SCHEDULED | MODES[mode]

    def job(name, sample):
        model = adapted(make_model) if mode.startswith("lora") else make_model(seed=4)
        return make_job(name, model=model, sample=sample, **changes)

    unbroken = job("unbroken", StopAt())
    assert unbroken.source.rows_per_epoch == 18, "steps 5 and 8 end inside an epoch, one batch spans two"
    expected = bits(TrainingRun(unbroken).run(), unbroken.folder)

    again = job("again", StopAt())
    assert bits(TrainingRun(again).run(), again.folder) == expected, "the same run twice"

    handler_before = signal.getsignal(signal.SIGINT)
    broken = job("broken", StopAt(5))
    with pytest.raises(Preempted, match="stopped by SIGINT after step 5 of 11; everything is saved"):
        TrainingRun(broken).run()
    with pytest.raises(OSError, match="the machine is gone"):  # no chance to save: back to step 8
        TrainingRun(job("broken", StopAt(5, action=crash))).run()
    assert len(lines(broken.folder / "metrics.jsonl")) == 10
    resumed = TrainingRun(job("broken", StopAt()))
    assert resumed.is_resumed and resumed.state.step == 8
    assert bits(resumed.run(), broken.folder) == expected
    assert signal.getsignal(signal.SIGINT) is handler_before, "the run gives back the handlers it found"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_too(make_job, number):
    sample = StopAt(2, action=lambda: os.kill(os.getpid(), number))
    job = make_job("run", sample=sample, sample_every="1 steps", sample_prompts=("x",))
    with pytest.raises(Preempted, match=f"{number.name} after step 2"):
        TrainingRun(job).run()
    assert TrainingRun(job).state.step == 2


def test_a_second_interrupt_stops_at_once(make_job):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    job = make_job("run", sample=StopAt(5, action=twice), **SCHEDULED)
    run = TrainingRun(job)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.store.finish()  # what a process that ends at once would leave to the next to pass over
    assert TrainingRun(job).state.step == 4, "what was saved before still stands"


@pytest.mark.parametrize("every", [None, "11 steps", "1 steps"])
@pytest.mark.costly
def test_a_finished_run_stands(make_job, every):
    """Also where the interval's last save falls on the last step."""
    job = make_job("run", checkpoint_every=every)
    expected = bits(TrainingRun(job).run(), job.folder)
    checkpoints = sorted((job.folder / "checkpoints").rglob("*"))
    assert len(list((job.folder / "checkpoints" / "step-000011").iterdir())) == 1
    again = TrainingRun(make_job("run", checkpoint_every=every))
    assert bits(again.run(), job.folder) == expected
    assert sorted((job.folder / "checkpoints").rglob("*")) == checkpoints


def test_metrics_hold_every_step_and_nothing_of_the_machine(make_job):
    job = make_job("run", **SCHEDULED)
    outcome = TrainingRun(job).run()
    metrics = lines(job.folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 12))
    assert [line["tokens"] for line in metrics] == list(range(64, 64 * 12, 64))
    assert {key for line in metrics for key in line} == {
        "step", "tokens", "rows", "epoch", "loss", "num_loss_tokens", "grad_norm", "lr", "skipped_steps", "val",
    }  # fmt: skip
    assert [line["step"] for line in metrics if "val" in line] == [3, 6, 9, 11]
    assert metrics[-1]["epoch"] == 44 / job.source.rows_per_epoch
    assert outcome.figures["num_loss_tokens"] == sum(line["num_loss_tokens"] for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] and outcome.figures["skipped_steps"] == 0
    assert len(lines(job.folder / "timing.jsonl")) == 11
    assert all(torch.isfinite(tensor).all() for tensor in outcome.weights.values())


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_job, make_model):
    model = make_model(seed=4)
    job = make_job("run", model=model, name_documents=lambda step: "chapter 7", **SCHEDULED)
    run = TrainingRun(job)
    whole = run.engine.forward_backward

    def spoil(batch, seed_of, should_stop):
        sums = whole(batch, seed_of, should_stop)
        if run.state.step == 6:
            run.engine.masters["model.norm.weight"].grad[0] = float("nan")
            spoil.before = {name: master.detach().clone() for name, master in run.engine.masters.items()}
        return sums

    run.engine.forward_backward = spoil
    with pytest.raises(NumericsError, match="chapter 7 at step 7"):
        run.run()
    assert all(torch.equal(master, spoil.before[name]) for name, master in run.engine.masters.items())
    assert TrainingRun(job).state.step == 6, "the state before the bad step is saved"


def test_skipped_steps_are_counted_and_have_no_loss(make_job, monkeypatch):
    job = make_job("run", duration="4 steps")
    run = TrainingRun(job)
    whole = job.source.row

    def row(index):
        tokens, labels, starts = whole(index)
        return tokens, labels * 0 - 100 if 4 <= index < 8 else labels, starts

    monkeypatch.setattr(job.source, "row", row)
    outcome = run.run()
    metrics = lines(job.folder / "metrics.jsonl")
    assert [line["skipped_steps"] for line in metrics] == [0, 1, 1, 1] and outcome.figures["skipped_steps"] == 1
    assert metrics[1]["loss"] is None and metrics[1]["lr"] == {} and metrics[2]["loss"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in outcome.weights.values())


def test_terms_of_the_objective_are_reported_apart_from_the_loss(make_job):
    lines = {}
    for name, changes in {"plain": {}, "more": {"z_loss": 1e-4, "label_smoothing": 0.1}}.items():
        job = make_job(name, duration="3 steps", **changes)
        TrainingRun(job).run()
        lines[name] = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines["plain"][0]["loss"] == pytest.approx(lines["more"][0]["loss"], abs=1e-12), "before any step"
    assert lines["plain"][2]["loss"] != lines["more"][2]["loss"]
    assert all("z_loss" not in line and "smoothing_loss" not in line for line in lines["plain"])
    assert all(30 < line["z_loss"] < 40 and 5.9 < line["smoothing_loss"] < 6.3 for line in lines["more"])


def test_dropout_is_drawn_from_the_seed_and_never_at_a_look(make_job, make_model):
    def metrics(name, **changes):
        job = make_job(name, model=make_model(seed=4), duration="2 steps", validate_every="1 steps", **changes)
        TrainingRun(job).run()
        return lines(job.folder / "metrics.jsonl")

    plain, dropped, recomputed = (
        metrics(name, **changes)
        for name, changes in {
            "plain": {"lr": 1e-30, "muon_lr": 1e-30},
            "dropped": {"lr": 1e-30, "muon_lr": 1e-30, "dropout": 0.3},
            "recomputed": {"lr": 1e-30, "muon_lr": 1e-30, "dropout": 0.3, "activation_checkpointing": "block"},
        }.items()
    )
    assert plain[0]["loss"] != dropped[0]["loss"] and plain[0]["val"] == dropped[0]["val"]
    assert recomputed == dropped
