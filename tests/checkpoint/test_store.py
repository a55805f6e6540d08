"""Training checkpoints: whole or not at all."""

import errno
import json
import random
import resource
import shutil
from collections import Counter

import pytest
import torch

from groundup.base import failpoints
from groundup.base.errors import CheckpointError
from groundup.base.log import Log
from groundup.checkpoint.store import MANIFEST, committed_folders, newest_checkpoint, retain, save_checkpoint


@pytest.fixture(autouse=True)
def fresh_failpoints(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(4, 6, generator=generator), "b": torch.randn(3, generator=generator)},
        "optimizer": {"a.weight:step": torch.tensor(float(step)), "b:exp_avg": torch.randn(3, generator=generator)},
    }


def save(root, step):
    return save_checkpoint(root, step, tensors(step), {"step": step, "rows": step * 4})


def check(checkpoint, step):
    assert checkpoint is not None and checkpoint.step == step and checkpoint.state == {"step": step, "rows": step * 4}
    for name, group in tensors(step).items():
        found = checkpoint.tensors(name)
        assert found.keys() == group.keys() and all(torch.equal(found[key], group[key]) for key in group)


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    assert newest_checkpoint(tmp_path, Log()) is None
    for step in (100, 20, 1_000_000, 3):
        save(tmp_path, step)
    check(newest_checkpoint(tmp_path, Log()), 1_000_000)
    assert [step for step, _ in committed_folders(tmp_path)] == [1_000_000, 100, 20, 3]


def test_transposed_and_shared_tensors_are_saved(tmp_path):
    weight = torch.arange(6.0).view(2, 3).t()
    save_checkpoint(tmp_path, 1, {"model": {"w": weight}}, {})
    assert torch.equal(newest_checkpoint(tmp_path, Log()).tensors("model")["w"], weight)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_seen(tmp_path, capsys, name):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    whole = (folder / name).read_bytes()
    places = range(len(whole) * 8)
    # the beginning whole: there stand the manifest's step and the lengths of a safetensors header
    for place in [*places[:240], *random.Random(0).sample(places, 120)]:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(data)
        assert newest_checkpoint(tmp_path, Log(quiet=True)).step == 1, f"bit {place} of {name}: {bytes(data[:200])}"
    newest_checkpoint(tmp_path, Log())
    warning = capsys.readouterr().err
    assert "WARNING W-CKPT-CORRUPT: step 2 is passed over" in warning and (name == MANIFEST or name in warning)
    (folder / name).write_bytes(whole)
    check(newest_checkpoint(tmp_path, Log()), 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "emptied", "removed", "longer", "of another step"])
def test_damaged_files_are_passed_over(tmp_path, name, how):
    other = save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path = folder / name
    if how == "removed":
        path.unlink()
    elif how == "of another step":
        shutil.copyfile(other / name, path)
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-2], "emptied": b"", "longer": data + b"x"}[how])
    check(newest_checkpoint(tmp_path, Log(quiet=True)), 1)


@pytest.mark.parametrize(
    "manifest", [b"[]", b"{}", b'{"files": []}', b'{"files": {"state.json": 5}}', b"\xff", b"null"]
)
def test_a_manifest_of_another_kind_is_passed_over(tmp_path, manifest):
    save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).write_bytes(manifest)
    check(newest_checkpoint(tmp_path, Log(quiet=True)), 1)


def test_none_loadable_is_an_error_not_a_start_from_nothing(tmp_path):
    for step in (1, 2, 3):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE: 3 checkpoints found, 0 loadable"):
        newest_checkpoint(tmp_path, Log(quiet=True))
    assert len(committed_folders(tmp_path)) == 3, "nothing is removed"


def test_what_was_never_committed_does_not_count(tmp_path):
    (save(tmp_path, 5) / MANIFEST).unlink()
    assert newest_checkpoint(tmp_path, Log()) is None
    save(tmp_path, 3)
    check(newest_checkpoint(tmp_path, Log()), 3)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_retain_keeps_the_newest(tmp_path, keep):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    torn = save(tmp_path, 9)
    (torn / MANIFEST).unlink()
    retain(tmp_path, keep)
    assert [step for step, _ in committed_folders(tmp_path)] == [4, 3, 2, 1][:keep]
    assert not torn.exists() and len(list(tmp_path.iterdir())) == min(keep, 4)
    check(newest_checkpoint(tmp_path, Log()), 4)


def test_retain_removes_nothing_while_the_newest_is_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (save(tmp_path, 3) / "model.safetensors").write_bytes(b"")
    retain(tmp_path, 1)
    assert len(committed_folders(tmp_path)) == 3
    check(newest_checkpoint(tmp_path, Log(quiet=True)), 2)


FAILPOINTS = [
    ("ckpt.before_shard", 1), ("ckpt.before_shard", 2), ("ckpt.before_fsync", 1), ("ckpt.before_manifest", 1)
]  # fmt: skip


@pytest.mark.parametrize(("name", "nth"), FAILPOINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, name, nth, action):
    save(tmp_path, 1)
    monkeypatch.setenv("GROUNDUP_FAILPOINT", f"{name}:{action}:{nth}")
    if action == "enospc":
        with pytest.raises(CheckpointError, match="E-DISK: cannot save step 2: No space left on device"):
            save(tmp_path, 2)
        assert not list(tmp_path.glob("step-000002/*")), "a torn attempt takes space"
    else:
        with pytest.raises(RuntimeError):
            save(tmp_path, 2)
    check(newest_checkpoint(tmp_path, Log()), 1)
    monkeypatch.delenv("GROUNDUP_FAILPOINT")
    save(tmp_path, 2)
    retain(tmp_path, 1)
    check(newest_checkpoint(tmp_path, Log()), 2)
    assert len(list(tmp_path.rglob(MANIFEST))) == 1 and len(list(tmp_path.glob("*/*"))) == 1


@pytest.mark.parametrize("limit", [0, 100, 4096, 20_000])
def test_a_disk_that_really_refuses_leaves_the_earlier_one(tmp_path, limit):
    """A limit on the size of files is a full disk that a test can afford: `write` itself fails."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"model": {"w": torch.zeros(8192)}, "optimizer": {"w": torch.zeros(8192)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"E-DISK: cannot save step 2: .*File too large"):
            save_checkpoint(tmp_path, 2, big, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("step-000002/*"))
    check(newest_checkpoint(tmp_path, Log()), 1)


def test_an_error_of_fsync_is_an_error_of_the_save(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("groundup.checkpoint.store.sync_file", refuse)
    with pytest.raises(CheckpointError, match=r"E-DISK.*Input/output error"):
        save(tmp_path, 1)
    assert newest_checkpoint(tmp_path, Log()) is None


def test_the_manifest_lists_every_file(tmp_path):
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST} == set(FILES) - {MANIFEST}
