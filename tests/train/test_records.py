"""The jsonl files of a run."""

import json
import random
import shutil

import pytest
import torch

from groundup.base.log import Log
from groundup.checkpoint.store import CheckpointStore
from groundup.proof.power_loss import every_prefix, rebuild, replay
from groundup.proof.recording_disk import RecordingDisk
from groundup.train.records import JsonLines

pytestmark = pytest.mark.costly


def test_lines_are_appended_and_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    file.write({"step": 1, "text": "ünï\n"})
    length = file.num_bytes()
    file.write({"step": 2})
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3')
    file = JsonLines(path, keep_bytes=length)
    assert file.num_bytes() == length
    file.write({"step": 2, "again": True})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    file.close()


def test_keeping_more_than_there_is_adds_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    JsonLines(path, keep_bytes=100).close()
    assert path.read_bytes() == b""


def test_what_is_not_a_number_is_never_written(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        file.write({"loss": float("nan")})
    assert file.num_bytes() == 0


def history(top, disk):
    """Log of a run that writes a line a step and saves every second, is cut after the third save and goes on."""
    folder = top / "run"
    disk.make_folders(folder / "checkpoints")
    store = CheckpointStore(folder / "checkpoints", run_id="a", log=Log(quiet=True), keep_last=1, disk=disk)
    step, length = 0, None
    for last_step in (6, 10):
        metrics = JsonLines(folder / "metrics.jsonl", keep_bytes=length, disk=disk)
        while step < last_step:
            step += 1
            metrics.write({"step": step})
            if step % 2 == 0:
                length = metrics.num_bytes()
                store.save(step, {"model": {"w": torch.zeros(1)}}, {"metrics_bytes": length}, wait=True)
                disk.log.append(("saved", step))
        metrics.write({"step": step + 1})
    shutil.rmtree(folder)
    return disk.log


def lines_lost(top, log):
    """States after a power loss in which a checkpoint's lines of metrics are not all there."""
    lost = []
    for length, seed, fate in every_prefix(log, seeds=1):
        place = top / "after"
        place.mkdir()
        rebuild(replay(log[:length], top), place, random.Random(f"{length} {seed}"), fate)
        store = CheckpointStore(place / "run" / "checkpoints", run_id="a", log=Log(quiet=True))
        found, saved = store.newest(), max((step for name, step, *_ in log[:length] if name == "saved"), default=0)
        if found is None:
            is_right = saved == 0
        else:
            text = (place / "run" / "metrics.jsonl").read_bytes() if (place / "run" / "metrics.jsonl").exists() else b""
            expected = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in range(1, found.step + 1))
            is_right = found.step >= saved and text[: found.state["metrics_bytes"]] == expected
        lost += [] if is_right else [(length, seed, fate)]
        shutil.rmtree(place)
    return lost


def test_after_a_power_loss_a_checkpoint_has_its_lines_of_metrics(tmp_path):
    log = history(tmp_path, RecordingDisk())
    assert "cut" in {operation[0] for operation in log} and not lines_lost(tmp_path, log)


def test_lines_or_a_name_that_are_not_synced_are_seen(tmp_path):
    log = history(tmp_path, RecordingDisk())
    lines = [operation for operation in log if operation != ("sync", tmp_path / "run" / "metrics.jsonl")]
    names = [operation for operation in log if operation != ("sync_folder", tmp_path / "run")]
    assert len(lines) == len(log) - 5 and lines_lost(tmp_path, lines)
    assert len(names) == len(log) - 3 and lines_lost(tmp_path, names)
