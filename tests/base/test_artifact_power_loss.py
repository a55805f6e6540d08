"""A power loss at any moment of a stage's life: the old stage or the new one is there, whole, after the repair."""

import json
import random
import shutil

import pytest

from groundup.base.artifact import MANIFEST, ChangePolicy, RunFolder, StageKey, read_manifest, verify
from groundup.base.errors import GroundupError
from groundup.proof.power_loss import every_prefix, rebuild, replay, sampled
from groundup.proof.recording_disk import NoSync, RecordingDisk

pytestmark = pytest.mark.costly

ALLOW_ALL, ALLOW_NONE = ChangePolicy(allow_change=["value"]), ChangePolicy()


def key(version, stage):
    return StageKey(stage, 1, {"value": version})


def write(disk, path, text):
    """What a stage writes and leaves to the commit to sync."""
    descriptor = disk.create(path)
    disk.write(descriptor, memoryview(text.encode()))
    disk.close(descriptor)


def make(run, version, stage="corpus", folder=None):
    with run.lock():
        attempt = run.begin(key(version, stage), ALLOW_NONE, folder=folder)
        run.disk.make_folder(attempt.folder / "deep")
        write(run.disk, attempt.folder / "deep" / "value.txt", f"value {version}")
        write(run.disk, attempt.folder / "other.txt", f"other {version}")
        run.commit(attempt)


def history(top, disk, stage, folder):
    """Log of a stage that is made, replaced, and replaced again, and a mark after each commit that returned."""
    run = RunFolder(top / "deep" / "run", disk=disk)
    if folder != stage:
        make(run, 0, "lora")
    for version in (1, 2, 3):
        make(run, version, stage, folder)
        disk.log.append(("saved", version))
    shutil.rmtree(top / "deep")
    return disk.log


def violations_after(log, states, top, look):
    """States (length of the log, seed, fate) after which `look` finds something else than it should."""
    place, found = top / "after", []
    for length, seed, fate in states:
        place.mkdir()
        rebuild(replay(log[:length], top), place, random.Random(f"{length} {seed}"), fate)
        saved = max((operation[1] for operation in log[:length] if operation[0] == "saved"), default=0)
        try:
            is_right = look(place / "deep" / "run", saved)
        except (GroundupError, OSError) as error:
            is_right = str(error)
        if is_right is not True:
            found.append((length, seed, fate, is_right))
        shutil.rmtree(place)
    return found


def stage_stands(stage, folder):
    """Whether, after the repair that every start makes, the stage said to be committed or the next one opens whole."""

    def look(path, saved):
        run = RunFolder(path, disk=NoSync())
        with run.lock():
            assert len(run.run_id) == 32
            manifest = read_manifest(path / folder)
            version = manifest.config["value"] if manifest else saved
            if version == 0:  # nothing was said to be committed: the first can begin
                return run.begin(key(1, stage), ALLOW_NONE, folder=folder) is not None
            if run.begin(key(version, stage), ALLOW_NONE, folder=folder) is not None:
                return f"version {version} is gone"
            verify(path / folder, read_manifest(path / folder))
            whole = (path / folder / "deep" / "value.txt").read_text() == f"value {version}"
            return version in (saved, saved + 1) and whole and not (path / ".old" / stage).exists()

    return look


@pytest.mark.parametrize(("stage", "folder"), [("corpus", "corpus"), ("merge", "lora/model")])
def test_after_a_power_loss_at_any_operation_a_committed_stage_stands(tmp_path, stage, folder):
    log = history(tmp_path, RecordingDisk(), stage, folder)
    assert len(log) > 90 and {"rename", "remove_file", "remove_folder", "sync"} <= {operation[0] for operation in log}
    assert not violations_after(log, every_prefix(log), tmp_path, stage_stands(stage, folder))


@pytest.mark.parametrize("num_states", [150, pytest.param(5_000, marks=pytest.mark.slow)])
def test_after_a_power_loss_in_any_order_a_committed_stage_stands(tmp_path, num_states):
    log = history(tmp_path, RecordingDisk(), "corpus", "corpus")
    assert not violations_after(log, sampled(log, num_states), tmp_path, stage_stands("corpus", "corpus"))


# a stage that trains: its checkpoints outlive everything, opened again or not


def training_history(top, disk):
    """Log of a stage that saves, is committed, is opened again with a change, saves more and is committed."""
    run = RunFolder(top / "deep" / "run", disk=disk)
    for version in (1, 2):
        with run.lock():
            attempt = run.begin(key(version, "pretrain"), ALLOW_ALL, resumable=True)
            folder = attempt.folder / "checkpoints" / f"step-{version}" / "attempt-1"
            disk.make_folders(folder)
            disk.put(folder / MANIFEST, json.dumps({"step": version}).encode())
            disk.log.append(("saved", version))
            write(disk, attempt.folder / f"model-{version}", f"model {version}")
            run.commit(attempt)
    shutil.rmtree(top / "deep")
    return disk.log


def checkpoints_stand(path, saved):
    run = RunFolder(path, disk=NoSync())
    with run.lock():
        attempt = run.begin(key(2, "pretrain"), ALLOW_ALL, resumable=True)
        folder = path / "pretrain" if attempt is None else attempt.folder
        if attempt is None:
            verify(folder, read_manifest(folder))
        steps = [json.loads(file.read_text())["step"] for file in folder.glob(f"checkpoints/*/*/{MANIFEST}")]
        return max(steps, default=0) >= saved


def test_after_a_power_loss_the_checkpoints_of_a_stage_stand(tmp_path):
    log = training_history(tmp_path, RecordingDisk())
    assert not violations_after(log, every_prefix(log, seeds=1), tmp_path, checkpoints_stand)


# ---- the tests above, tested: a commit without one of its guards is seen


@pytest.mark.parametrize("ignored", ["sync", "sync_folder"])
def test_a_missing_sync_is_seen(tmp_path, ignored):
    disk = RecordingDisk()
    disk.ignores = {ignored}
    log = history(tmp_path, disk, "corpus", "corpus")
    assert violations_after(log, every_prefix(log)[::3], tmp_path, stage_stands("corpus", "corpus"))


def test_an_attempt_whose_name_is_not_synced_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingDisk, "make_folders", unsynced_folders, raising=False)
    log = training_history(tmp_path, RecordingDisk())
    assert violations_after(log, every_prefix(log), tmp_path, checkpoints_stand)


def unsynced_folders(disk, path):
    if not path.is_dir():
        unsynced_folders(disk, path.parent)
        disk.make_folder(path)


def test_an_old_stage_that_goes_before_the_new_one_has_its_name_is_seen(tmp_path, monkeypatch):
    commit = RunFolder.commit

    def hasty(run, attempt):
        run._remove_old(attempt.key.stage)
        return commit(run, attempt)

    monkeypatch.setattr(RunFolder, "commit", hasty)
    log = history(tmp_path, RecordingDisk(), "corpus", "corpus")
    assert violations_after(log, every_prefix(log), tmp_path, stage_stands("corpus", "corpus"))


# an unfinished stage that is to begin again


def restart_history(top, disk):
    run = RunFolder(top / "deep" / "run", disk=disk)
    for policy in (ALLOW_NONE, ChangePolicy(restart=True)):
        attempt = run.begin(key(1, "pretrain"), policy, resumable=True)
        for name in ("a", "b"):
            disk.put(attempt.folder / name, b"text")
        disk.log.append(("saved", 1))
    shutil.rmtree(top / "deep")
    return disk.log


def nothing_half_removed_goes_on(path, saved):
    run = RunFolder(path, disk=NoSync())
    attempt = run.begin(key(1, "pretrain"), ALLOW_NONE, resumable=True)
    return not saved or not attempt.is_continued or {file.name for file in attempt.folder.iterdir()} > {"a", "b"}


def test_after_a_power_loss_nothing_half_removed_goes_on(tmp_path):
    log = restart_history(tmp_path, RecordingDisk())
    first = log.index(("saved", 1)) + 1
    removed = max(number for number, operation in enumerate(log) if operation[0] == "remove_folder")
    states = [state for state in every_prefix(log, seeds=5) if first <= state[0] <= removed + 1]
    assert len(states) > 40 and not violations_after(log, states, tmp_path, nothing_half_removed_goes_on)
