"""Artifacts: whole or not there, whatever moment the process dies in."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from groundup.base import artifact, failpoints
from groundup.base.artifact import (
    MANIFEST,
    ChangePolicy,
    RunFolder,
    StageKey,
    differences,
    read_manifest,
    verify,
    write_summary,
)
from groundup.base.errors import ConfigError, DataError
from groundup.base.failpoints import VARIABLE
from groundup.base.files import read_json
from groundup.proof.recording_disk import RecordingDisk

KEY = StageKey("corpus", 1, {"corpus": {"source": "a.txt", "filters": {"min_characters": 1}}}, {"a.txt": "00"})
NEW_KEY = StageKey("corpus", 1, {"corpus": {"source": "a.txt", "filters": {"min_characters": 9}}}, {"a.txt": "00"})
FAILPOINTS = re.findall(r'reach\("([^"]+)"\)', Path(artifact.__file__).read_text())
ALLOW_NONE = ChangePolicy()


def run_stage(path, value, folder="corpus", is_resumable=False):
    """A small stage, with its lock; says what became of it."""
    run = RunFolder(path)
    key = StageKey("merge" if folder == "lora/model" else folder, 1, {"value": value})
    with run.lock():
        attempt = run.begin(key, ALLOW_NONE, folder=folder, resumable=is_resumable)
        if attempt is None:
            return "skipped"
        (attempt.folder / "deep").mkdir(exist_ok=True)
        (attempt.folder / "deep" / "value.txt").write_text(value)
        run.commit(attempt)
        return "continued" if attempt.is_continued else "began"


def kill_stage(failpoint, *args):
    """The same in a process of its own, which is killed at the failpoint."""
    child = os.fork()
    if child == 0:
        try:
            os.environ[VARIABLE] = f"{failpoint}:kill:1"
            run_stage(*args)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def make(run, key=KEY, content="text", **how):
    attempt = run.begin(key, ALLOW_NONE, **how)
    assert attempt is not None
    (attempt.folder / "0.txt").write_text(content)
    run.commit(attempt)
    return attempt


def leftovers(path):
    return [name for name in (".attempts", ".old") if (path / name).exists()]


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def test_committed_stage_stands_at_its_fixed_place(run):
    attempt = make(run)
    manifest = read_manifest(run.path / "corpus")
    assert manifest.key == KEY
    assert manifest.files.keys() == {"0.txt"}
    assert run.committed("corpus") == manifest
    assert run.stage_folder("corpus") == run.path / "corpus" == attempt.target
    assert not leftovers(run.path)
    verify(run.path / "corpus", manifest)


def test_stage_whose_key_stands_is_skipped(run):
    make(run)
    assert run.begin(KEY, ALLOW_NONE) is None


@pytest.mark.parametrize(
    "key",
    [NEW_KEY, replace(KEY, code_version=2), replace(KEY, inputs={"a.txt": "01"}), replace(KEY, inputs={})],
    ids=["config", "code", "input", "no input"],
)
def test_changed_key_moves_the_old_away_and_removes_it_on_commit(run, key):
    make(run)
    attempt = run.begin(key, ALLOW_NONE)
    assert not (run.path / "corpus").exists()
    assert (run.path / ".old" / "corpus" / "0.txt").read_text() == "text"
    assert run.stage_folder("corpus") == attempt.folder
    (attempt.folder / "0.txt").write_text("new")
    run.commit(attempt)
    assert (run.path / "corpus" / "0.txt").read_text() == "new"
    assert not leftovers(run.path)


def test_restart_makes_a_finished_stage_again(run):
    make(run)
    assert run.begin(KEY, ChangePolicy(restart=True)) is not None


def test_skipping_notices_a_missing_or_shortened_file(run):
    make(run)
    (run.path / "corpus" / "0.txt").write_text("tex")
    with pytest.raises(DataError, match=r"E-ARTIFACT-MISSING.*0\.txt"):
        run.begin(KEY, ALLOW_NONE)
    (run.path / "corpus" / "0.txt").unlink()
    with pytest.raises(DataError, match=r"E-ARTIFACT-MISSING.*0\.txt"):
        run.begin(KEY, ALLOW_NONE)


def test_flipped_byte_is_found_by_verify(run):
    make(run)
    path = run.path / "corpus" / "0.txt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"E-SHARD-HASH: 0\.txt"):
        verify(run.path / "corpus", read_manifest(run.path / "corpus"))
    path.unlink()
    with pytest.raises(DataError, match=r"E-ARTIFACT-MISSING: 0\.txt"):
        verify(run.path / "corpus", read_manifest(run.path / "corpus"))


def test_equal_files_have_equal_hashes_whatever_the_key(tmp_path):
    hashes = set()
    for name, key in [("one", KEY), ("two", NEW_KEY)]:
        make(RunFolder(tmp_path / name), key)
        hashes.add(read_manifest(tmp_path / name / "corpus").output_hash())
    assert len(hashes) == 1
    make(RunFolder(tmp_path / "three"), content="other")
    assert read_manifest(tmp_path / "three" / "corpus").output_hash() not in hashes


def test_hash_of_a_part_sees_only_that_part(tmp_path):
    hashes = set()
    for name, log in [("one", "fast"), ("two", "slow")]:
        run = RunFolder(tmp_path / name)
        attempt = run.begin(KEY, ALLOW_NONE)
        (attempt.folder / "model").mkdir()
        (attempt.folder / "model" / "weights").write_text("w")
        (attempt.folder / "timing.jsonl").write_text(log)
        manifest = run.commit(attempt)
        hashes |= {manifest.output_hash("model/"), manifest.output_hash()}
    assert len(hashes) == 3


def test_checkpoints_keep_manifests_of_their_own(run):
    attempt = run.begin(KEY, ALLOW_NONE)
    (attempt.folder / "checkpoints").mkdir()
    (attempt.folder / "checkpoints" / "step").write_text("weights")
    assert run.commit(attempt).files == {}
    assert (run.path / "corpus" / "checkpoints" / "step").exists()


def test_summary_stands_outside_the_manifest(run):
    attempt = run.begin(KEY, ALLOW_NONE)
    write_summary(attempt.folder, {"documents": 3})
    assert run.commit(attempt).files == {}
    before = read_manifest(run.path / "corpus").output_hash()
    write_summary(run.path / "corpus", {"bytes": 4})
    first = (run.path / "corpus" / "summary.json").read_bytes()
    write_summary(run.path / "corpus", {"bytes": 4})
    assert (run.path / "corpus" / "summary.json").read_bytes() == first
    assert read_json(run.path / "corpus" / "summary.json") == {"documents": 3, "bytes": 4}
    verify(run.path / "corpus", read_manifest(run.path / "corpus"))
    assert read_manifest(run.path / "corpus").output_hash() == before


def test_leftover_of_a_killed_write_is_no_part_of_the_artifact(run):
    attempt = run.begin(KEY, ALLOW_NONE)
    (attempt.folder / "0.txt").write_text("text")
    (attempt.folder / ".0.txt.tmp").write_text("te")
    assert run.commit(attempt).files.keys() == {"0.txt"}
    assert not (run.path / "corpus" / ".0.txt.tmp").exists()


def test_stage_that_is_not_there_is_told_in_words(run):
    with pytest.raises(DataError, match="E-STAGE-NONE: tokens/ is not there yet"):
        run.committed("tokens")


def test_differences_name_old_and_new():
    assert differences(KEY, NEW_KEY) == {"corpus.filters.min_characters": (1, 9)}
    assert differences(KEY, replace(KEY, inputs={})) == {"input a.txt": ("00", None)}
    assert differences(KEY, KEY) == {}


# unfinished stages


def test_unfinished_stage_begins_again(run):
    attempt = run.begin(KEY, ALLOW_NONE)
    (attempt.folder / "half.txt").write_text("ha")
    again = run.begin(KEY, ALLOW_NONE)
    assert not again.is_continued
    assert not (again.folder / "half.txt").exists()


def test_unfinished_resumable_stage_goes_on(run):
    (run.begin(KEY, ALLOW_NONE, resumable=True).folder / "half.txt").write_text("ha")
    again = run.begin(KEY, ALLOW_NONE, resumable=True)
    assert again.is_continued
    assert (again.folder / "half.txt").read_text() == "ha"


def save_checkpoint(attempt):
    """What a stage that trains leaves in its folder."""
    folder = attempt.folder / "checkpoints" / "step-000001" / "attempt-0"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return attempt


def test_unfinished_resumable_stage_with_a_changed_key_names_the_difference(run):
    save_checkpoint(run.begin(KEY, ALLOW_NONE, resumable=True))
    with pytest.raises(ConfigError) as caught:
        run.begin(NEW_KEY, ALLOW_NONE, resumable=True)
    assert "E-STAGE-CHANGED" in str(caught.value)
    assert "corpus.filters.min_characters: 1 → 9" in str(caught.value)
    assert "--allow-change corpus.filters.min_characters" in str(caught.value)


@pytest.mark.parametrize("allowed", ["corpus.filters.min_characters", "min_characters"])
def test_allowed_change_goes_on_and_is_written_down(run, allowed):
    save_checkpoint(run.begin(KEY, ALLOW_NONE, resumable=True))
    policy = ChangePolicy(allow_change=[allowed])
    again = run.begin(NEW_KEY, policy, resumable=True)
    assert again.is_continued
    assert run.begin(NEW_KEY, ALLOW_NONE, resumable=True).is_continued
    assert run.commit(again).key == NEW_KEY


def test_a_stage_that_saved_nothing_begins_again_with_other_settings(run):
    (run.begin(KEY, ALLOW_NONE, resumable=True).folder / "half.txt").write_text("ha")
    again = run.begin(NEW_KEY, ALLOW_NONE, resumable=True)
    assert not again.is_continued and not (again.folder / "half.txt").exists()


def test_a_finished_stage_that_a_mistake_moved_aside_is_taken_back(run):
    run.commit(run.begin(KEY, ALLOW_NONE, resumable=True))
    attempt = run.begin(NEW_KEY, ALLOW_NONE, resumable=True)
    assert not attempt.target.exists()
    assert run.begin(KEY, ALLOW_NONE, resumable=True) is None
    assert read_manifest(attempt.target).key == KEY
    assert not (run.path / ".old").exists() and not (run.path / ".attempts").exists()
    save_checkpoint(run.begin(NEW_KEY, ALLOW_NONE, resumable=True))
    with pytest.raises(ConfigError, match="E-STAGE-CHANGED"):
        run.begin(KEY, ALLOW_NONE, resumable=True)


def test_another_change_than_the_allowed_is_refused(run):
    save_checkpoint(run.begin(KEY, ALLOW_NONE, resumable=True))
    changed = replace(KEY, config={"corpus": {"source": "b.txt", "filters": {"min_characters": 9}}})
    with pytest.raises(ConfigError, match=r"settings changed: corpus\.source: 'a\.txt' → 'b\.txt' at"):
        run.begin(changed, ChangePolicy(allow_change=["min_characters"]), resumable=True)


def finish_with_checkpoint(run):
    attempt = save_checkpoint(run.begin(KEY, ALLOW_NONE, resumable=True))
    run.commit(attempt)
    return attempt


def test_a_finished_stage_goes_on_where_its_changes_were_allowed(run):
    finish_with_checkpoint(run)
    again = run.begin(NEW_KEY, ChangePolicy(allow_change=["min_characters"]), resumable=True)
    assert again.is_continued
    assert list(again.folder.glob("checkpoints/*/*/MANIFEST.json")) and not again.target.exists()
    assert run.commit(again).key == NEW_KEY and read_manifest(again.target).key == NEW_KEY


def test_a_finished_stage_whose_changes_were_not_all_allowed_begins_again(run):
    finish_with_checkpoint(run)
    changed = replace(KEY, config={"corpus": {"source": "b.txt", "filters": {"min_characters": 9}}})
    again = run.begin(changed, ChangePolicy(allow_change=["min_characters"]), resumable=True)
    assert not again.is_continued and not list(again.folder.glob("checkpoints/*"))


def test_cut_while_it_is_opened_again_nothing_is_lost(tmp_path):
    """Whatever operation of it the disk refuses, the next start goes on from the checkpoint."""
    policy = ChangePolicy(allow_change=["min_characters"])
    for number in range(100):
        run = RunFolder(tmp_path / str(number), disk=RecordingDisk())
        finish_with_checkpoint(run)
        run.disk.fail_at = len(run.disk.log) + number
        with suppress(OSError), run.lock():
            run.begin(NEW_KEY, policy, resumable=True)
        was_cut = len(run.disk.log) > run.disk.fail_at
        run = RunFolder(run.path)
        with run.lock():
            again = run.begin(NEW_KEY, policy, resumable=True)
        assert again.is_continued and list(again.folder.glob("checkpoints/*/*/MANIFEST.json"))
        if not was_cut:
            break
    assert 8 < number < 100


def test_restart_begins_an_unfinished_stage_again(run):
    (run.begin(KEY, ALLOW_NONE, resumable=True).folder / "half.txt").write_text("ha")
    again = run.begin(NEW_KEY, ChangePolicy(restart=True), resumable=True)
    assert not again.is_continued
    assert not (again.folder / "half.txt").exists()


# kills


def test_the_failpoints_of_a_commit_are_known():
    assert FAILPOINTS == ["artifact.before_manifest", "artifact.before_rename", "artifact.after_rename"]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
@pytest.mark.parametrize("is_replaced", [False, True], ids=["first", "replaced"])
@pytest.mark.parametrize("folder", ["corpus", "lora/model"])
def test_kill_in_a_commit_then_recovery(tmp_path, failpoint, is_replaced, folder):
    path = tmp_path / "run"
    if folder == "lora/model":  # a stage that writes into another one's folder
        run_stage(path, "adapter", "lora")
    if is_replaced:
        assert run_stage(path, "old", folder) == "began"
    kill_stage(failpoint, path, "new", folder)
    if (path / folder).exists():  # what stands under the fixed name is whole at any moment
        verify(path / folder, read_manifest(path / folder))
        assert (path / folder / "deep" / "value.txt").read_text() == "new"
    is_committed = failpoint != "artifact.before_manifest"
    assert run_stage(path, "new", folder) == ("skipped" if is_committed else "began")
    verify(path / folder, read_manifest(path / folder))
    assert (path / folder / "deep" / "value.txt").read_text() == "new"
    assert {entry.name for entry in (path / folder).iterdir()} == {MANIFEST, "deep"}
    assert not leftovers(path)


def test_kill_in_a_commit_loses_nothing_of_a_resumable_stage(tmp_path):
    path = tmp_path / "run"
    kill_stage("artifact.before_manifest", path, "a", "pretrain", True)
    assert run_stage(path, "a", "pretrain", True) == "continued"
    assert {entry.name for entry in (path / "pretrain").iterdir()} == {MANIFEST, "deep"}


def test_full_disk_in_a_commit_leaves_a_stage_that_can_be_committed_again(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setattr(failpoints, "_passages", type(failpoints._passages)())
    monkeypatch.setenv(VARIABLE, "artifact.before_manifest:enospc:1")
    with pytest.raises(OSError, match="No space"):
        run_stage(path, "a", is_resumable=True)
    assert run_stage(path, "a", is_resumable=True) == "continued"
    assert run_stage(path, "a", is_resumable=True) == "skipped"


# locks and foreign folders

HOLD = """
import sys, time, os
from pathlib import Path
from groundup.base.artifact import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    if sys.argv[2] == "alone" or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["alone", "with a worker"])
def test_lock_is_refused_while_another_process_holds_it_and_free_after_its_death(run, kind):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path), kind], stdout=subprocess.PIPE, text=True
    ) as owner:
        worker = int(owner.stdout.readline())
        try:
            with pytest.raises(DataError, match=f"E-LOCKED.*pid {owner.pid}"), run.lock():
                pass
            owner.kill()
            owner.wait()
            with run.lock():
                assert (run.path / ".lock").read_text().startswith(f"pid {os.getpid()} ")
        finally:
            owner.kill()
            if worker != owner.pid:
                os.kill(worker, signal.SIGKILL)


def test_lock_is_free_after_the_work_and_after_an_error(run):
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    for version in (1, 2):
        with run.lock():
            make(run, replace(KEY, code_version=version))


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="E-OUT-FOREIGN"):
        RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="E-OUT-FOREIGN"):
        RunFolder(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_empty_and_own_folders_are_taken(tmp_path):
    make(RunFolder(tmp_path))
    assert RunFolder(tmp_path).begin(KEY, ALLOW_NONE) is None
