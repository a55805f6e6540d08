"""What a run does not go on from or with: lines of metrics that are gone, a damaged checkpoint, another machine."""

import os
import signal
from dataclasses import replace

import pytest

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError, ConfigError, DoesNotFit, Preempted
from groundup.train.run import TrainingRun
from groundup.train.saving import most_checkpoints

pytestmark = pytest.mark.costly

SAVED = {"checkpoint_every": "3 steps", "keep_checkpoints": 4}


def stopped(job, step=8):
    """A run that a signal stopped after so many steps: saved there and at steps 3 and 6."""
    run = TrainingRun(job)
    record = run._record_timing

    def stop(result):
        record(result)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    run._record_timing = stop
    with pytest.raises(Preempted):
        run.run()
    return run


def cut(job, num_lines):
    path = job.folder / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:num_lines]))


@pytest.mark.parametrize(("num_lines", "step"), [(8, 8), (7, 6), (6, 6), (5, 3)])
def test_a_checkpoint_is_not_taken_that_counts_on_lines_that_are_gone(make_job, num_lines, step):
    job = make_job("run", **SAVED)
    stopped(job)
    cut(job, num_lines)
    resumed = TrainingRun(job)
    assert resumed.state.step == step
    resumed.run()
    unbroken = make_job("unbroken", **SAVED)
    TrainingRun(unbroken).run()
    assert (job.folder / "metrics.jsonl").read_bytes() == (unbroken.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("is_gone", [True, False])
def test_no_checkpoint_left_is_said_in_words_and_nothing_begins_again(make_job, is_gone):
    job = make_job("run", **SAVED)
    stopped(job)
    cut(job, 2)
    if is_gone:
        (job.folder / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE: 3 checkpoints found, 0 loadable") as caught:
        TrainingRun(job)
    assert caught.value.exit_code == 4 and len(list(job.folder.glob("checkpoints/*/*/MANIFEST.json"))) == 3


def test_strict_refuses_to_go_back(make_job):
    job = make_job("run", **SAVED)
    stopped(job)
    cut(job, 7)
    with pytest.raises(CheckpointError, match=r"E-CKPT-CORRUPT: step 8 cannot be used: metrics\.jsonl has \d+ bytes"):
        TrainingRun(replace(job, is_strict=True))
    assert TrainingRun(job).state.step == 6


def test_exact_refuses_another_machine_and_a_run_that_is_marked(make_job):
    job = replace(make_job("run", **SAVED), is_exact=True)
    stopped(job)
    resumed = TrainingRun(job)
    assert resumed.state.step == 8
    environment = resumed.state.environment | {"torch": "1.0", "cpu": "SSE2"}
    resumed.state.environment = environment
    with pytest.raises(ConfigError, match=r"E-NOT-EXACT: .*cpu: SSE2 → .*, torch: 1\.0 → ") as caught:
        resumed._refuse_inexact()
    assert caught.value.exit_code == 2
    resumed.state.environment, resumed.state.num_ranks = {}, 2
    with pytest.raises(ConfigError, match="2 ranks → 1 rank"):
        resumed._refuse_inexact()
    changed = replace(make_job("run", **SAVED, z_loss=1e-4), is_exact=True)
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(ConfigError, match=r"pretrain\.z_loss: None → 0\.0001"):
            TrainingRun(changed)
    TrainingRun(replace(changed, is_exact=False)).run()
    with pytest.raises(ConfigError, match="marked `exact: false` already"):
        TrainingRun(job)


class FullDisk(Disk):
    """Has room for so many bytes."""

    room = 0

    def free_bytes(self, path):
        return self.room


@pytest.fixture
def room(monkeypatch):
    def give(num_bytes):
        monkeypatch.setattr(FullDisk, "room", num_bytes)
        monkeypatch.setattr("groundup.checkpoint.store.Disk", FullDisk)

    return give


def test_room_is_asked_for_all_that_will_be_kept_and_again_on_resume(make_job, room):
    settings = SAVED | {"keep_every": "3 steps", "keep_checkpoints": 1}
    job = make_job("run", **settings)
    one = sum(path.stat().st_size for path in last_checkpoint_of(make_job("other", **settings)))
    room(int(3.5 * one))
    # steps 3, 6, 9 for good, the end; with keep_checkpoints 1 alone it would be two at once
    with pytest.raises(DoesNotFit, match=r"E-DISK-PREFLIGHT: checkpoints need .* bytes more \(4 of ") as caught:
        TrainingRun(job)
    assert caught.value.exit_code == 7 and not (job.folder / "metrics.jsonl").exists()
    room(5 * one)
    stopped(job)
    room(one // 2)
    with pytest.raises(DoesNotFit, match="E-DISK-PREFLIGHT"):
        TrainingRun(job)
    room(2 * one)
    TrainingRun(job).run()
    room(0)
    assert TrainingRun(job).state.step == 11, "a finished run needs no room"


def last_checkpoint_of(job):
    TrainingRun(job).run()
    return [path for path in max(job.folder.glob("checkpoints/step-*/*")).iterdir() if path.name != "MANIFEST.json"]


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (4, {}),  # two to keep, the best, the one being written
        (3, {"measures": False}),
        (14, {"keep_every": 100}),
        (9, {"keep_every": 200}),
        (9, {"keep_every": 40}),  # of what is saved every 50 steps only every 200th falls on it
        (2, {"checkpoint_every": 600}),
        (1, {"checkpoint_every": 0}),
        (2, {"checkpoint_every": 0, "first_step": True}),
    ],
)
def test_most_checkpoints_at_once(expected, changes):
    usual = {"total_steps": 1000, "checkpoint_every": 50, "keep_last": 2, "keep_every": 0, "first_step": False}
    assert most_checkpoints(**(usual | {"measures": True} | changes)) == expected
