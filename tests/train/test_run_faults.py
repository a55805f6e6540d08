"""A run whose numbers go bad, that is stopped anywhere, whose settings change: what is applied, saved and told."""

import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from groundup.base import failpoints
from groundup.base.errors import CheckpointError, ConfigError, DataError, NumericsError, Preempted
from groundup.base.signals import StopRequest
from groundup.train import resolve as resolve_module
from groundup.train.engine import StepAbandoned
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly

SCHEDULED = {"checkpoint_every": "4 steps", "validate_every": "3 steps", "sample_every": "2 steps"}


def bits(run, outcome):
    weights = {name: outcome.weights[name].numpy().tobytes() for name in sorted(outcome.weights)}
    optimizer = {name: t.numpy().tobytes() for name, t in sorted(run.engine.state_dict()["optimizer"].items())}
    metrics = (run.job.folder / "metrics.jsonl").read_bytes()
    return hashlib.sha256(repr((weights, optimizer, metrics)).encode()).hexdigest()


def lines(run, name):
    return [json.loads(line) for line in (run.job.folder / name).read_text().splitlines()]


def spoil_batches(run, *steps, times=1):
    """Put a NaN into the gradients of some steps, counted from 0, the first times they are computed."""
    whole, seen = run.engine.gradient_norm, []

    def spoiled():
        step = run.state.step
        if step in steps and seen.count(step) < times:
            seen.append(step)
            next(iter(run.engine.masters.values())).grad.view(-1)[3] = float("nan")
        return whole()

    run.engine.gradient_norm = spoiled
    return seen


def all_finite(run):
    state = run.engine.state_dict()
    return all(torch.isfinite(tensor).all() for group in state.values() for tensor in group.values())


def test_skip_passes_over_the_batch_and_goes_on(make_job):
    run = TrainingRun(make_job("run", on_nonfinite="skip", **SCHEDULED))
    spoil_batches(run, 5)
    run.run()
    metrics = lines(run, "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 12))
    assert metrics[5]["loss"] is None and metrics[5]["grad_norm"] is None and metrics[10]["skipped_steps"] == 1
    assert [(e["step"], e["kind"]) for e in lines(run, "events.jsonl") if e["kind"] == "nonfinite"] == [
        (6, "nonfinite")
    ]
    assert all_finite(run)


def test_rewind_goes_back_and_leaves_the_batch_out(make_job):
    run = TrainingRun(make_job("run", on_nonfinite="rewind", spike_batches=2, **SCHEDULED))
    seen = spoil_batches(run, 6, times=9)
    outcome = run.run()
    assert seen == [6], "the second time the batch is not computed"
    metrics = lines(run, "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 12)), "the file is cut back as the run is"
    assert [line["step"] for line in metrics if line["loss"] is None] == [6, 7]
    rewinds = [event for event in lines(run, "events.jsonl") if event["kind"] == "rewind"]
    assert [(event["step"], event["detail"]) for event in rewinds] == [(7, "to step 4, without the batches [5, 6]")]
    assert all_finite(run) and outcome.figures["rewinds"] == 1

    again = TrainingRun(make_job("again", on_nonfinite="rewind", spike_batches=2, **SCHEDULED))
    spoil_batches(again, 6)
    assert bits(again, again.run()) == bits(run, outcome), "a replay decides the same"


def test_a_rewind_before_the_first_checkpoint_goes_to_the_beginning(make_job):
    run = TrainingRun(make_job("run", on_nonfinite="rewind"))
    spoil_batches(run, 2)
    run.run()
    assert [line["loss"] is None for line in lines(run, "metrics.jsonl")][:4] == [False, False, True, False]


def test_a_rewind_to_the_beginning_forgets_the_moments(make_job):
    """As if the run had begun without the bad batch."""
    run = TrainingRun(make_job("run", on_nonfinite="rewind", optimizer="adamw"))
    spoil_batches(run, 2)
    outcome = run.run()
    other = TrainingRun(make_job("other", on_nonfinite="rewind", optimizer="adamw"))
    other.state.passed_over = [2]
    found, expected = outcome.weights, other.run().weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_save_that_failed_in_the_background_is_tried_again_at_a_stop(make_job, monkeypatch):
    run = TrainingRun(make_job("run", checkpoint_every="4 steps"))
    StopIn(run, "_record_timing", 4)
    write, seen = run.store._write, []

    def refuse_once(snapshot):
        seen.append(snapshot.step)
        if len(seen) == 1:
            raise CheckpointError("E-DISK", what="the disk is full")
        return write(snapshot)

    monkeypatch.setattr(run.store, "_write", refuse_once)
    with pytest.raises(Preempted, match="after step 4 of 11; everything is saved"):
        run.run()
    assert seen == [4, 4] and TrainingRun(make_job("run")).state.step == 4


def test_a_run_past_its_duration_is_refused(make_job):
    TrainingRun(make_job("run")).run()
    with pytest.raises(ConfigError, match="at step 11 already, the duration asks for 5"):
        TrainingRun(make_job("run", duration="5 steps")).run()


def test_the_mark_of_a_changed_run_outlives_a_kill_before_the_next_save(make_job):
    run = TrainingRun(make_job("run"))
    StopIn(run.engine, "gradient_norm", 5)
    with pytest.raises(Preempted):
        run.run()
    changed = TrainingRun(make_job("run", z_loss=1e-4))
    changed._train = lambda stop, line: (_ for _ in ()).throw(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        changed.run()
    again = TrainingRun(make_job("run", z_loss=1e-4))
    assert again.state.is_exact is False and not again._changes()
    assert again._here == again.state.environment


def begun(job):
    """Train a step and stop in the next; what it was computed with."""
    run = TrainingRun(job)
    StopIn(run.engine, "gradient_norm", 2)
    with pytest.raises(Preempted):
        run.run()
    return run.resolved


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.125},
        {"muon_lr": 0.125},
        {"precision": "bf16"},
        {"attention": "dense"},
        {"micro_batch_rows": 1},
        {"num_threads": 2},
        {"warmup": "3 steps"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_pinned_setting_that_was_changed_stays_changed(make_job, change):
    """Each was undone once at the second resume: the value of the beginning was taken again."""
    ((name, value),) = change.items()
    name, value = ("warmup_steps", 3) if name == "warmup" else (name, value)
    first = begun(make_job("run"))
    assert getattr(first, name) != value
    for _ in range(3):
        resolved = begun(make_job("run", **change))
        assert getattr(resolved, name) == value
    back = TrainingRun(make_job("run"))
    assert getattr(back.resolved, name) == getattr(first, name) and back.state.is_exact is False


def test_dropout_that_was_added_leaves_one_lane(make_job, monkeypatch):
    """Masks are drawn from one generator: two lanes would make them a matter of time."""
    monkeypatch.setattr(resolve_module, "LANE_TOKENS", 16)
    lanes = {"micro_batch_rows": 1, "num_threads": 2}
    assert begun(make_job("run", **lanes)).num_lanes == 2
    assert begun(make_job("run", **lanes, dropout=0.1)).num_lanes == 1
    assert TrainingRun(make_job("run", **lanes, dropout=0.1)).resolved.num_lanes == 1


def test_rewinds_end(make_job):
    run = TrainingRun(make_job("run", on_nonfinite="rewind", max_rewinds=2, **SCHEDULED))
    spoil_batches(run, *range(3, 11), times=99)
    with pytest.raises(NumericsError, match="after 2 rewinds"):
        run.run()
    assert all_finite(run)


def test_a_stop_saves_the_state_before_the_bad_step(make_job):
    run = TrainingRun(make_job("run", **SCHEDULED))
    spoil_batches(run, 6)
    with pytest.raises(NumericsError):
        run.run()
    healed = TrainingRun(make_job("run", **SCHEDULED))
    assert healed.state.step == 6
    whole = TrainingRun(make_job("whole", **SCHEDULED))
    assert bits(healed, healed.run()) == bits(whole, whole.run()), "as if the fault had never been"


class StopIn:
    """Sends a signal at the nth call of a method of the run."""

    def __init__(self, holder, name, nth, number=signal.SIGTERM):
        whole, self.calls = getattr(holder, name), 0

        def call(*arguments, **options):
            self.calls += 1
            if self.calls == nth:
                os.kill(os.getpid(), number)
            return whole(*arguments, **options)

        setattr(holder, name, call)


@pytest.mark.parametrize(
    ("holder", "method", "nth", "step"),
    [
        (lambda run: run.engine, "_forward", 11, 5),  # the first of two micro-batches, a step of two computed before
        (lambda run: run.engine, "gradient_norm", 5, 5),
        (lambda run: run.engine, "optimizer_step", 5, 5),
        (lambda run: run.looks, "validate", 2, 6),
        (lambda run: run.looks, "sample", 2, 4),
        (lambda run: run, "_save", 1, 4),
        (lambda run: run.metrics, "write", 6, 6),
    ],
    ids=["forward", "norm", "optimizer", "validation", "sample", "save", "metrics"],
)
def test_a_signal_anywhere_keeps_the_last_step_and_the_bits(make_job, holder, method, nth, step):
    whole = TrainingRun(make_job("whole", sample_prompts=("x",), **SCHEDULED))
    expected = bits(whole, whole.run())
    run = TrainingRun(make_job("run", sample_prompts=("x",), **SCHEDULED))
    StopIn(holder(run), method, nth)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {step} of 11"):
        run.run()
    resumed = TrainingRun(make_job("run", sample_prompts=("x",), **SCHEDULED))
    assert resumed.state.step == step
    assert bits(resumed, resumed.run()) == expected


def test_a_partial_accumulation_is_thrown_away(make_job):
    run = TrainingRun(make_job("run", **SCHEDULED))
    parts = []
    whole = run.engine._forward

    def forward(part):
        parts.append(run.state.step)
        if len(parts) == 6:  # the second micro-batch of step 3 is never begun... this is its first
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(part)

    run.engine._forward = forward
    with pytest.raises(Preempted):
        run.run()
    assert all(master.grad is None for master in run.engine.masters.values())


def test_another_thread_saves_the_last_step(make_job):
    """What the deadline does while the main thread computes."""
    whole = TrainingRun(make_job("whole"))
    expected = bits(whole, whole.run())
    run = TrainingRun(make_job("run"))
    forward = run.engine._forward

    def stuck(part):
        if run.state.step == 7:
            assert run._rescue(StopRequest()) == "everything is saved after step 7 of 11"
            raise KeyboardInterrupt
        return forward(part)

    run.engine._forward = stuck
    with pytest.raises(KeyboardInterrupt):
        run.run()
    resumed = TrainingRun(make_job("run"))
    assert resumed.state.step == 7 and bits(resumed, resumed.run()) == expected


def test_a_save_at_work_is_waited_for_by_the_deadline(make_job):
    run = TrainingRun(make_job("run", checkpoint_every="4 steps"))
    save, said = run.store.save, []

    def rescue():
        said.append(run._rescue(StopRequest()))
        run._state_is_whole.release()  # where a process would have ended

    def slow_save(step, *given, **named):
        if step == 4:
            threading.Thread(target=rescue).start()
            time.sleep(1.5)  # longer than the deadline waits for the state
            save(step, *given, **named)
            return
        save(step, *given, **named)

    run.store.save = slow_save
    run.run()
    while not said:
        time.sleep(0.01)
    assert said[0].startswith("everything is saved after step 4")


def test_the_deadline_saves_nothing_in_the_middle_of_a_rewind(make_job):
    run = TrainingRun(make_job("run", checkpoint_every="2 steps", on_nonfinite="rewind"))
    load, said = run._load, []

    def slow_load():
        thread = threading.Thread(target=lambda: said.append(run._rescue(StopRequest())))
        thread.start()
        found = load()
        thread.join()
        return found

    run._load = slow_load
    norms = iter([1.0] * 4 + [float("nan")])
    measured = run.engine.gradient_norm

    def norm():
        value = measured()
        return next(norms, 1.0) * value

    run.engine.gradient_norm = norm
    run.run()
    assert said == ["the last save stands"]


def test_a_look_made_again_tells_its_checkpoint_how_good_it_is(make_job):
    """Stopped in the look at a checkpoint's step: the best checkpoint is the same as without a stop."""

    def metrics_of(run):
        return {
            attempt.step: manifest.metric for attempt, manifest in run.store._whole() if manifest.metric is not None
        }

    settings = {"checkpoint_every": "4 steps", "validate_every": "4 steps", "keep_checkpoints": 5}
    whole = TrainingRun(make_job("whole", **settings))
    whole.run()
    run = TrainingRun(make_job("run", **settings))
    validate = run.looks.validate

    def interrupted(stop):
        if run.state.step == 8:
            raise StepAbandoned
        return validate(stop)

    run.looks.validate = interrupted
    with pytest.raises(Preempted):
        run.run()
    assert 8 not in metrics_of(run)
    resumed = TrainingRun(make_job("run", **settings))
    resumed.run()
    assert metrics_of(resumed) == metrics_of(whole) and 8 in metrics_of(whole)


def test_a_fault_of_the_loader_ends_the_run_in_words(make_job, monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "loader.batch:raise:3")
    run = TrainingRun(make_job("run", checkpoint_every="1 steps"))
    with pytest.raises(DataError, match=r"E-LOADER: cannot read row .*loader\.batch"):
        run.run()
    monkeypatch.delenv("GROUNDUP_FAILPOINT")
    assert TrainingRun(make_job("run", checkpoint_every="1 steps")).state.step == 2


def test_a_changed_machine_is_told_and_marked(make_job, capsys):
    job = make_job("run", **SCHEDULED)
    run = TrainingRun(job)
    StopIn(run.engine, "gradient_norm", 5)
    with pytest.raises(Preempted):
        run.run()
    resumed = TrainingRun(job)
    resumed.state.environment["torch"] = "1.0"
    outcome = resumed.run()
    (change,) = [event for event in lines(resumed, "events.jsonl") if event["kind"] == "change"]
    assert "torch: 1.0 →" in change["detail"] and outcome.figures["exact"] is False
    assert run.state.is_exact


def changing_parts(thing, path="run", seen=None):
    """Every value that can be reached from an object, by its path: numbers, texts, tensors' bytes, lengths."""
    seen = set() if seen is None else seen
    if isinstance(thing, bool | int | float | str | bytes | type(None)):
        yield path, thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield path, hashlib.sha256(thing.detach().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    elif isinstance(thing, dict):
        yield f"{path}.keys", tuple(sorted(map(str, thing)))
        for key, value in list(thing.items()):
            yield from changing_parts(value, f"{path}[{key if isinstance(key, str) else 'object'}]", seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        yield f"{path}.len", len(thing)
        for index, value in enumerate(list(thing)):
            yield from changing_parts(value, f"{path}[{index}]", seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type) and not callable(getattr(thing, "__code__", None)):
        for name, value in list(vars(thing).items()):
            yield from changing_parts(value, f"{path}.{name}", seen)


SAVED = re.compile(r"run\.state\.|run\.engine\.(masters\[|optimizers\[|average\.)|run\.job\.model\..*_parameters\[")
NOT_STATE = {
    "run._began", "run._elapsed_before", "run._saving_seconds", "run.stragglers._busy_seconds", "run.stragglers._named", "run._saved_step",  # clocks, and where the disk is
    "run.engine._norm",  # set before each use
    "run.meter._step_flops",  # of the last step, for its line of timing
    "run.store._buffers.keys", "run.store._buffers[object]",  # what is being written
}  # fmt: skip


def hidden_changes(run):
    before = dict(changing_parts(run))
    run.run()
    after = dict(changing_parts(run))
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert any("_parameters[" in path for path in changed) and "run.state.step" in changed
    return {path for path in changed if not SAVED.match(path) and path not in NOT_STATE}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adafactor"},
        {"precision": "bf16", "ema_decay": 0.9},
    ],
)
def test_all_that_changes_is_in_the_state(make_job, changes):
    run = TrainingRun(make_job("run", **SCHEDULED, **changes))
    assert hidden_changes(run) == set()
    assert {"step", "rows", "recent_losses"} <= vars(run.state).keys()


def test_a_forgotten_counter_would_be_seen(make_job):
    run = TrainingRun(make_job("run", **SCHEDULED))
    run.engine.num_steps = 0
    whole = run.engine.optimizer_step

    def count(lr_multiplier):
        run.engine.num_steps += 1
        return whole(lr_multiplier)

    run.engine.optimizer_step = count
    assert "run.engine.num_steps" in hidden_changes(run)
