"""Memory that is refused in the middle of a step: smaller micro-batches, the same step, the same batch."""

import json
from collections import Counter

import pytest
import torch
from train.test_engine import flat, gradients_of, make_engine, ragged_batch

from groundup.base import failpoints
from groundup.base.errors import DistributedError, DoesNotFit
from groundup.parallel.world import World
from groundup.train import resolve as resolve_module
from groundup.train.out_of_memory import is_out_of_memory
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly


@pytest.fixture
def refuse_memory(monkeypatch):
    """Memory is refused in the forward passes with these numbers, counted from 1."""

    def refuse(*passages):
        monkeypatch.setattr(failpoints, "_passages", Counter())
        monkeypatch.setenv(failpoints.VARIABLE, f"engine.forward:oom:{'+'.join(map(str, passages))}")

    return refuse


def lines(job, name):
    return [json.loads(line) for line in (job.folder / name).read_text().splitlines()]


def test_what_torch_really_says_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(KeyError("x"))


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("passages", [(1,), (2,), (2, 3)])
def test_the_step_is_computed_again_in_smaller_micro_batches(make_model, refuse_memory, passages, dtype, lanes):
    batch = ragged_batch(0)
    expected = make_engine(make_model(), rows=4 >> len(passages), dtype=dtype, lanes=lanes)
    expected.forward_backward(batch, lambda row: row)
    engine = make_engine(make_model(), rows=4, dtype=dtype, lanes=lanes)
    refuse_memory(*passages)
    seen = []
    sums = engine.forward_backward(batch, lambda row: seen.append(row) or row)
    assert engine.micro_batch_rows == 4 >> len(passages)
    assert sums.num_loss_tokens == batch.num_loss_tokens
    assert torch.equal(flat(gradients_of(engine)), flat(gradients_of(expected))), "nothing of the failed pass is left"
    num_parts = len(batch) // engine.micro_batch_rows
    if lanes == 1:  # several draw no seeds
        assert seen[-num_parts:] == list(range(0, len(batch), engine.micro_batch_rows))


def test_a_single_row_that_does_not_fit_is_told(make_model, refuse_memory):
    refuse_memory(1, 2, 3)
    with pytest.raises(DoesNotFit, match=r"E-MEMORY: out of memory in a micro-batch of a single row.*row_length.*lora"):
        make_engine(make_model(), rows=4).forward_backward(ragged_batch(0), lambda row: row)


def test_single_rows_go_through_in_fewer_lanes(make_model, refuse_memory):
    batch = ragged_batch(0)
    expected = make_engine(make_model(), rows=1)
    expected.forward_backward(batch, lambda row: row)
    engine = make_engine(make_model(), rows=1, lanes=4)
    refuse_memory(1, 6)  # in four lanes, and once more in two: a lane that fell out leaves up to three others at work
    engine.forward_backward(batch, lambda row: row)
    assert engine.micro_batch_rows == 1 and engine.num_lanes in (1, 2)
    torch.testing.assert_close(flat(gradients_of(engine)), flat(gradients_of(expected)), rtol=1e-5, atol=1e-7)


def test_a_resume_keeps_the_fewer_lanes(make_job, refuse_memory, monkeypatch):
    monkeypatch.setattr(resolve_module, "LANE_TOKENS", 16)
    lanes = {"micro_batch_rows": 1, "num_threads": 2}
    run = TrainingRun(make_job("run", **lanes))
    assert run.resolved.num_lanes == 2
    refuse_memory(9)
    assert run.run().figures["exact"] is False
    events = [event["detail"] for event in lines(run.job, "events.jsonl") if event["kind"] == "oom"]
    assert events == [
        "out of memory with micro-batches of 1 rows, 2 at a time: micro-batches of 1 rows from here on, the same batch"
    ]
    again = TrainingRun(make_job("run", **lanes))
    assert (again.engine.num_lanes, again.resolved.num_lanes, again.resolved.shrunk_from) == (1, 1, 1)


def test_a_rank_without_memory_is_named(make_model, refuse_memory):
    engine = make_engine(make_model(), rows=2)
    engine.world = World(1, 2)
    refuse_memory(1)
    with pytest.raises(DistributedError, match=r"E-OOM-RANK: rank 1 ran out of memory.*2 rows.*micro_batch_rows: 1"):
        engine.forward_backward(ragged_batch(0), lambda row: row)


def test_other_errors_are_not_taken_for_it(make_model, monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())
    monkeypatch.setenv(failpoints.VARIABLE, "engine.forward:raise:1")
    engine = make_engine(make_model(), rows=4)
    with pytest.raises(RuntimeError, match="failpoint"):
        engine.forward_backward(ragged_batch(0), lambda row: row)
    assert engine.micro_batch_rows == 4


def test_a_run_goes_on_with_less_and_says_so(make_job, refuse_memory, capsys):
    plain = make_job("plain", micro_batch_rows=4)
    whole = TrainingRun(plain).run()
    job = make_job("run", micro_batch_rows=4, checkpoint_every="4 steps")
    refuse_memory(3)  # step 3, whose only micro-batch this is
    run = TrainingRun(job)
    outcome = run.run()
    metrics, expected = lines(job, "metrics.jsonl"), lines(plain, "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 12)) and metrics[10]["skipped_steps"] == 0
    for name in ("rows", "tokens", "num_loss_tokens"):
        assert [line[name] for line in metrics] == [line[name] for line in expected], name
    assert metrics[:2] == expected[:2]
    assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    assert whole.figures["exact"] is True and outcome.figures["exact"] is False
    events = [(event["step"], event["detail"]) for event in lines(job, "events.jsonl") if event["kind"] == "oom"]
    assert events == [
        (3, "out of memory with micro-batches of 4 rows: micro-batches of 2 rows from here on, the same batch")
    ]
    again = TrainingRun(make_job("run", micro_batch_rows=4, checkpoint_every="4 steps"))
    assert again.engine.micro_batch_rows == 2 and again.resolved.shrunk_from == 4


def test_a_resume_keeps_the_smaller_micro_batch_and_the_mark(make_job, refuse_memory):
    """Killed before a checkpoint was saved: the run is inexact all the same, for it goes on in smaller micro-batches."""
    job = make_job("run", micro_batch_rows=4)
    refuse_memory(3)
    run = TrainingRun(job)
    run.engine.optimizer_step, whole = lambda lr: crash(run, whole, lr), run.engine.optimizer_step

    def crash(run, whole, lr):
        if run.state.step == 5:
            raise OSError("the machine is gone")
        return whole(lr)

    with pytest.raises(OSError, match="gone"):
        run.run()
    again = TrainingRun(job)
    assert not again.is_resumed and again.engine.micro_batch_rows == 2
    assert again.run().figures["exact"] is False


def test_memory_refused_elsewhere_ends_in_words(make_job):
    run = TrainingRun(make_job("run"))

    def refuse(lr):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    run.engine.optimizer_step = refuse
    with pytest.raises(DoesNotFit, match="E-MEMORY: out of memory in step 1"):
        run.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_refused_in_the_middle_of_a_backward_pass_leaves_nothing(make_model, dtype):
    batch = ragged_batch(0)
    expected = make_engine(make_model(), rows=2, dtype=dtype)
    expected.forward_backward(batch, lambda row: row)
    engine, times = make_engine(make_model(), rows=4, dtype=dtype), []

    def refuse_once(gradient):
        times.append(1)
        if len(times) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    dict(engine.model.named_parameters())["model.layers.0.mlp.up_proj.weight"].register_hook(refuse_once)
    engine.forward_backward(batch, lambda row: row)
    assert torch.equal(flat(gradients_of(engine)), flat(gradients_of(expected)))
