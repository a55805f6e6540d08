"""The store of a run: what is saved comes back, in order, as many as were asked for, and the run goes on meanwhile."""

import errno
import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError, DoesNotFit
from groundup.checkpoint import store as store_module
from groundup.checkpoint.attempt import MANIFEST
from groundup.proof.recording_disk import RecordingDisk


def test_the_newest_comes_back_bit_for_bit(kit):
    assert kit.store().newest() is None and kit.store().steps() == []
    for step in (100, 20, 1_000_000, 3):
        kit.save(step)
    assert kit.store().steps() == [3, 20, 100, 1_000_000]
    for before, step in ((None, 1_000_000), (1_000_000, 100), (100, 20), (4, 3)):
        assert not kit.differs(kit.store().newest(before=before), step)
    assert kit.store().newest(before=3) is None


def test_any_reader_of_safetensors_reads_a_shard(kit):
    folder = kit.save(7)
    for name, group in kit.tensors(7).items():
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == group.keys() and all(torch.equal(found[key], group[key]) for key in group)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint16, torch.bool]
)
def test_every_dtype_comes_back(kit, dtype):
    tensors = {"model": {"odd": torch.ones(3).bool(), "w": torch.arange(5.0).to(dtype)}}
    kit.store().save(1, tensors, {}, wait=True)
    found = kit.store().newest().tensors("model")["w"]
    assert found.dtype == dtype and torch.equal(found.float(), tensors["model"]["w"].float())


def test_the_manifest_lists_every_file_and_names_no_time(kit):
    folder = kit.save(7, metric=2.5)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    assert {key: manifest[key] for key in ("step", "attempt", "run_id", "metric")} == {
        "step": 7, "attempt": folder.name, "run_id": "run-a", "metric": 2.5
    }  # fmt: skip
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(manifest) == {"format", "step", "attempt", "run_id", "metric", "files", "sha256"}


def test_order_is_by_step_and_attempt_whatever_the_clock_says(kit):
    kit.save(2)
    kit.save(2, store=kit.store(run_id="run-b"))
    third = kit.save(2)
    last = kit.save(10)
    names = sorted(path.name[:12] for path in (kit.root / "step-000002").iterdir())
    assert names == ["attempt-0002", "attempt-0003"], "the first of ours gave way to the third, the foreign one stays"
    for path, mtime in ((last, 0), (last / MANIFEST, 0), (third, 4e9), (third / MANIFEST, 4e9)):
        os.utime(path, (mtime, mtime))
    assert kit.store().newest().folder == last
    assert kit.store().newest(before=10).folder == third


# ---- asynchronous


class SlowDisk(Disk):
    """Writes nothing until it is let."""

    def __init__(self):
        self.may_write = threading.Event()

    def create(self, path):
        assert self.may_write.wait(20), "nobody let the disk go on"
        return super().create(path)


def test_a_snapshot_is_of_the_moment_of_the_call(kit):
    disk = SlowDisk()
    store = kit.store(disk=disk)
    tensors = kit.tensors(1)
    state = kit.state(1)
    store.save(1, tensors, state)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    state["rows"] = -1
    disk.may_write.set()
    assert not kit.differs(store.newest(), 1)
    store.finish()


def test_a_second_save_waits_for_the_first(kit):
    disk = SlowDisk()
    store = kit.store(disk=disk)
    held_up = store.save(1, kit.tensors(1), kit.state(1))
    assert held_up < 5
    threading.Timer(0.3, disk.may_write.set).start()
    began = time.monotonic()
    assert store.save(2, kit.tensors(2), kit.state(2)) >= 0.25, "two writes at once would be a queue"
    assert time.monotonic() - began >= 0.25
    store.finish()
    assert store.steps() == [1, 2]
    assert not kit.differs(kit.store().newest(), 2)


def test_thirty_saves_in_a_row_leave_what_is_kept(kit):
    store = kit.store(keep_last=2)
    for step in range(1, 31):
        store.save(step, kit.tensors(step), kit.state(step))
    store.finish()
    assert store.steps() == [29, 30]
    assert not kit.differs(store.newest(), 30) and not kit.differs(store.newest(before=30), 29)


def test_a_failed_write_is_told_at_the_next_save_and_the_run_goes_on(kit, capsys):
    disk = RecordingDisk()
    store = kit.store(disk=disk, quiet=False)
    kit.save(1, store=store)
    disk.fail_at = len(disk.log) + 5
    store.save(2, kit.tensors(2), kit.state(2))
    store.save(3, kit.tensors(3), kit.state(3))
    warning = capsys.readouterr().err
    assert "WARNING W-SAVE-FAILED: step 2 is not saved" in warning and "No space left on device" in warning
    assert "bytes wanted" in warning and "free" in warning and "step 1 is kept" in warning
    store.finish()
    assert store.steps() == [1, 3]


def test_a_failed_write_is_an_error_at_the_end(kit):
    disk = RecordingDisk()
    store = kit.store(disk=disk)
    kit.save(1, store=store)
    disk.fail_at = len(disk.log) + 5
    store.save(2, kit.tensors(2), kit.state(2))
    with pytest.raises(CheckpointError, match="E-DISK: cannot save step 2: No space left on device") as caught:
        store.finish()
    assert caught.value.exit_code == 4
    store.finish()
    assert not kit.differs(store.newest(), 1)


def test_a_bug_in_the_writer_is_not_taken_for_a_full_disk(kit, monkeypatch):
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "ckpt.before_shard:raise:1")
    for tell in (lambda store: store.finish(), lambda store: kit.save(2, store=store)):
        store_module.reach.__globals__["_passages"].clear()
        store = kit.store()
        store.save(1, kit.tensors(1), kit.state(1))
        with pytest.raises(RuntimeError, match="failpoint"):
            tell(store)


def test_without_memory_for_a_snapshot_it_is_written_at_once(kit, capsys, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    store = kit.store(quiet=False)
    monkeypatch.setattr(store_module, "_empty_like", refuse)
    store.save(1, kit.tensors(1), kit.state(1))
    assert "W-SAVE-MEMORY" in capsys.readouterr().err
    assert not kit.differs(store.newest(), 1)
    monkeypatch.undo()
    kit.save(2, store=store, wait=False)
    assert not kit.differs(store.newest(), 2)


# ---- retention


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_are_kept(kit, keep):
    store = kit.store(keep_last=keep)
    for step in (1, 2, 3, 4):
        kit.save(step, store=store)
        assert store.steps() == list(range(1, step + 1))[-keep:]
    assert len(list(kit.root.iterdir())) == min(keep, 4), "no empty folder is left"


def test_the_best_and_every_so_many_are_kept(kit):
    store = kit.store(keep_last=1, keep_every=4)
    metrics = {1: 3.0, 2: 1.5, 3: 1.0, 4: 2.0, 5: 1.0, 6: 4.0, 7: None, 8: 1.25, 9: 5.0}
    kept = {}
    for step, metric in metrics.items():
        kit.save(step, store=store, metric=metric)
        kept[step] = store.steps()
    assert kept == {
        1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [4, 5], 6: [4, 5, 6], 7: [4, 5, 7], 8: [4, 5, 8], 9: [4, 5, 8, 9]
    }  # fmt: skip


def test_torn_attempts_do_not_count_and_go_with_the_next_save(kit):
    for step in (1, 2):
        kit.save(step)
    for folder in [kit.save(step) for step in (6, 7, 8)]:
        (folder / MANIFEST).unlink()
    store = kit.store(keep_last=2)
    assert store.steps() == [1, 2]
    assert not kit.differs(store.newest(), 2)
    assert len(list(kit.root.iterdir())) == 5, "looking removes nothing"
    kit.save(3, store=store)
    assert store.steps() == [2, 3] and len(list(kit.root.iterdir())) == 2


def test_a_damaged_one_does_not_count(kit):
    for step in (1, 2, 5):
        folder = kit.save(step)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    store = kit.store(keep_last=2)
    assert not kit.differs(store.newest(), 2)
    kit.save(3, store=store)
    assert store.steps() == [2, 3], "step 5 looks whole by its sizes alone"


def test_what_is_not_ours_is_never_removed(kit):
    kit.save(1)
    foreign = kit.save(2, store=kit.store(run_id="run-b"))
    torn = kit.save(3)
    (torn / MANIFEST).unlink()
    link = kit.root / "step-000009"
    mine = [
        kit.root / "notes.txt", kit.root / "step-000001" / "notes.txt", torn / "notes.txt", kit.root / "step-x" / "a",
        kit.root / "step-000004" / "attempt-of-mine" / "a", kit.root.parent / "elsewhere" / "attempt-0001-00000000" / "a",
    ]  # fmt: skip
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    link.symlink_to(kit.root.parent / "elsewhere")
    kit.save(5, store=kit.store(keep_last=1))
    assert all(path.read_text() == "mine" for path in mine) and (foreign / MANIFEST).exists() and link.is_symlink()
    assert kit.store().steps() == [5] and {path.name for path in torn.iterdir()} == {"notes.txt"}


def test_a_rewound_run_leaves_later_checkpoints_behind(kit):
    store = kit.store(keep_last=9)
    store.drop_after(0)
    for step in (1, 2, 3, 4):
        kit.save(step, store=store)
    foreign = kit.save(3, store=kit.store(run_id="run-b"))
    store.drop_after(2)
    assert store.steps() == [1, 2] and (foreign / MANIFEST).exists()
    assert not kit.differs(store.newest(before=3), 2)
    kit.save(3, store=store)
    assert not kit.differs(store.newest(), 3)


# ---- before the start


class SmallDisk(Disk):
    def free_bytes(self, path):
        return 2_999


def test_preflight_names_what_is_needed_and_free(kit):
    store = kit.store(disk=SmallDisk(), keep_last=2)
    store.preflight(999, 3)
    with pytest.raises(DoesNotFit, match=r"E-DISK-PREFLIGHT: checkpoints need 3,000 bytes .* has 2,999 free") as caught:
        store.preflight(1_000, 3)
    assert caught.value.exit_code == 7 and not kit.root.exists(), "a look makes nothing"
    kit.store().preflight(1, 1)
    kit.save(1)
    store.preflight(1_000, 3)
    with pytest.raises(DoesNotFit, match="checkpoints need 3,000 bytes more"):
        store.preflight(3_000, 0)


# ---- what is never saved


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("wait", [True, False])
def test_what_is_not_finite_is_refused(kit, value, dtype, wait):
    kit.save(1)
    before = kit.tree()
    tensors = {"model": {"w": torch.full((300, 300), 6e4).to(dtype), "v": torch.zeros(9).to(dtype)}}
    tensors["model"]["v"][4] = value
    with pytest.raises(CheckpointError, match="E-CKPT-NONFINITE: step 2 is not saved: model: v"):
        kit.store().save(2, tensors, {}, wait=wait)
    tensors["model"]["v"][4] = 0
    for state, metric in (({"loss": [value]}, None), ({}, value)):
        with pytest.raises(CheckpointError, match="E-CKPT-NONFINITE"):
            kit.store().save(2, tensors, state, metric=metric, wait=wait)
    assert kit.tree() == before
    kit.store().save(2, tensors, {}, wait=True)


def test_a_sum_that_overflows_is_finite_all_the_same(kit):
    kit.store().save(1, {"model": {"w": torch.full((9,), 3e38)}}, {}, wait=True)
    assert kit.store().newest().tensors("model")["w"].isfinite().all()


def test_a_dtype_without_a_name_is_refused(kit):
    with pytest.raises(CheckpointError, match="E-CKPT-FORMAT"):
        kit.store().save(1, {"model": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, wait=True)


# ---- where it stands


def test_a_root_behind_a_link_is_the_folder_it_points_to(kit, tmp_path):
    kit.save(1)
    link = tmp_path / "link"
    link.symlink_to(kit.root)
    kit.save(2, store=kit.store(link, keep_last=1))
    assert link.is_symlink() and kit.store().steps() == [2]


@pytest.mark.parametrize("what", ["file", "link to nowhere"])
def test_a_root_that_is_no_folder_is_refused_in_words(kit, tmp_path, what):
    root = tmp_path / "root"
    if what == "file":
        root.write_text("mine")
    else:
        root.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"E-DISK|E-CKPT-ROOT"):
        kit.save(1, store=kit.store(root))
    assert root.is_symlink() or root.read_text() == "mine"


def test_a_root_that_may_not_be_written_is_refused_in_words(kit):
    class ReadOnly(Disk):
        def make_folder(self, path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    kit.save(1)
    store = kit.store(disk=ReadOnly())
    assert not kit.differs(store.newest(), 1)
    with pytest.raises(CheckpointError, match=r"E-DISK: cannot save step 2: Read-only file system.*step 1 is kept"):
        kit.save(2, store=store)


def test_a_relative_root(kit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kit.save(1, store=kit.store(type(tmp_path)("here/checkpoints")))
    assert kit.store(tmp_path / "here" / "checkpoints").steps() == [1]


def test_a_rename_that_comes_late_is_no_commit(kit):
    class Late(Disk):
        def rename(self, old, new):
            pass

    kit.save(1)
    with pytest.raises(CheckpointError, match="E-DISK: cannot save step 2"):
        kit.save(2, store=kit.store(disk=Late()))
    assert kit.store().steps() == [1] and not kit.differs(kit.store().newest(), 1)
