"""A longer duration: the run goes on at the rates of the longer run, whichever its schedule, finished or not."""

import json
import os
import signal

import pytest

from groundup.base.errors import Preempted
from groundup.optim.lr_law import adamw_lr
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly

SHORT = {
    "duration": "5 steps",
    "warmup": "1 steps",
    "optimizer": "adamw",
    "batch_size_tokens": 16,
    "micro_batch_rows": 1,
}


def rates_of(job):
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["lr"]["matrices"] for line in lines]


def stop_after(run, steps):
    """Ask the run to stop as Ctrl-C does."""
    whole = run.engine.optimizer_step

    def count(multiplier):
        rates = whole(multiplier)
        if run.state.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return rates

    run.engine.optimizer_step = count


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_the_horizon_moves(make_job, schedule):
    settings = SHORT | {"schedule": schedule}
    whole = make_job("whole", **settings | {"duration": "10 steps"})
    TrainingRun(whole).run()
    expected = rates_of(whole)
    for name, done in (("unfinished", 3), ("finished", 5)):
        begun = make_job(name, **settings)
        run = TrainingRun(begun)
        if name == "finished":
            run.run()
        else:
            stop_after(run, done)
            with pytest.raises(Preempted):
                run.run()
        before = rates_of(begun)
        longer = make_job(name, **settings | {"duration": "10 steps"})
        TrainingRun(longer).run()
        found = rates_of(longer)
        assert len(found) == 10 and found[:done] == before[:done] and found[done:] == expected[done:]
        if schedule == "wsd" and name == "unfinished":  # still in the stable part: as if it had been longer all along
            assert found == expected and found[7] == found[1] > found[8], "the decay is that of the longer run"
        if schedule in ("linear", "cosine"):
            assert found != expected


def test_a_warmup_in_percent_stays_what_it_was(make_job):
    settings = SHORT | {"warmup": "40 %", "schedule": "wsd"}
    TrainingRun(make_job("run", **settings)).run()
    longer = settings | {"duration": "20 steps"}
    run = TrainingRun(make_job("run", **longer))
    assert run.resolved.warmup_steps == 2 and run.resolved.total_steps == 20
    for _ in range(2):
        assert TrainingRun(make_job("run", **longer | {"warmup": "30 %"})).resolved.warmup_steps == 6


def test_an_automatic_rate_is_the_laws(make_job):
    job = make_job("run", **SHORT | {"lr": "auto", "schedule": "constant"})
    run = TrainingRun(job)
    run.run()
    matrices = sum(p.numel() for p in job.model.parameters() if p.dim() >= 2)
    assert rates_of(job)[-1] == pytest.approx(adamw_lr(matrices, 16)) == run.config.lr
