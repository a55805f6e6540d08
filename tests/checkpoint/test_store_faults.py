"""Whatever is done to the files, and wherever the disk refuses: found before a tensor is used, the one before intact."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct

import pytest
import torch
from safetensors.torch import save

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError
from groundup.checkpoint import attempt as attempt_module
from groundup.checkpoint.attempt import MANIFEST
from groundup.checkpoint.manifest import FileRecord, Manifest
from groundup.checkpoint.shard import parse_shard
from groundup.checkpoint.store import CheckpointStore
from groundup.proof.damage_trials import DAMAGES, FILES, unseen_damages, unseen_flips
from groundup.proof.recording_disk import RecordingDisk

# ---- flipped bits


def test_every_flipped_bit_is_found(kit):
    assert unseen_flips(kit, 300, seed=0) == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.costly
def test_every_bit_of_a_beginning_is_found_and_the_file_is_named(kit, name, capsys):
    """There stand the manifest's step and the length of a safetensors header."""
    kit.save(1)
    path = kit.save(2) / name
    whole = path.read_bytes()
    for place in range(240):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        assert kit.store().newest().step == 1
    assert not kit.differs(kit.store(quiet=False).newest(), 1)
    warning = capsys.readouterr().err
    assert "WARNING W-CKPT-CORRUPT: step 2 is passed over: " in warning
    assert (name if name != MANIFEST else "the manifest is damaged") in warning and warning.count("\n") == 1


def test_without_the_hash_check_flipped_bits_are_seen_to_pass(kit, monkeypatch):
    monkeypatch.setattr(attempt_module, "check_digest", lambda path, num_bytes, sha256, record: None)
    assert unseen_flips(kit, 100, seed=3) > 10


def test_what_changes_between_verification_and_use_is_not_used(kit):
    for change in (lambda data: data[:-1] + b"\x01", lambda data: data[:-1], lambda data: data + b"x"):
        path = kit.save(1) / "model.safetensors"
        found = kit.store().newest()
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(CheckpointError, match="E-CKPT-CORRUPT: step 1 changed since it was verified"):
            found.tensors("model")
    with pytest.raises(CheckpointError, match="E-CKPT-CORRUPT"):
        found.tensors("nothing")


# ---- files that are cut, swapped, missing, extra, or another run's


def test_every_damaged_folder_is_passed_over(kit):
    assert len(DAMAGES) == 13 and unseen_damages(kit, range(52)) == []


def test_without_a_look_at_names_and_sizes_damages_are_seen_to_pass(kit, monkeypatch):
    monkeypatch.setattr(attempt_module, "_fault", lambda folder, step, run_id, manifest: None)
    assert {text.split()[0] for text in unseen_damages(kit, range(26))} >= {"extra", "another_run", "a_link"}


def test_none_loadable_is_an_error_and_not_a_start_from_nothing(kit):
    for step in (1, 2, 3):
        kit.save(step)
    for step in (1, 2, 3):
        next(kit.root.glob(f"step-00000{step}/*/state.json")).write_text("{}")
    before = kit.tree()
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE: 3 checkpoints found, 0 loadable") as caught:
        kit.store().newest()
    assert caught.value.exit_code == 4 and kit.tree() == before
    with pytest.raises(CheckpointError, match="2 checkpoints found"):
        kit.store().newest(before=3)
    assert kit.store().newest(before=1) is None


def test_a_strict_store_takes_no_earlier_one(kit):
    kit.save(1)
    path = kit.save(2) / "model.safetensors"
    assert not kit.differs(kit.store(is_strict=True).newest(), 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"E-CKPT-CORRUPT: step 2 cannot be used: model\.safetensors") as caught:
        kit.store(is_strict=True).newest()
    assert caught.value.exit_code == 4 and "`--strict`" in caught.value.line()
    assert not kit.differs(kit.store().newest(), 1)


def test_a_state_that_does_not_fit_is_passed_over(kit, capsys):
    for step in (1, 2, 3):
        kit.save(step)
    fault_of = lambda state: "it is not mine" if state["step"] > 1 else None  # noqa: E731
    assert not kit.differs(kit.store(quiet=False).newest(fault_of=fault_of), 1)
    assert capsys.readouterr().err.count("is passed over: it is not mine") == 2
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE"):
        kit.store().newest(fault_of=lambda state: "nor this")


def test_a_folder_of_another_run_is_refused_by_name(kit, capsys):
    kit.save(1)
    before = kit.tree()
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE"):
        kit.store(run_id="run-b", quiet=False).newest()
    assert "of another run ('run-a', not 'run-b')" in capsys.readouterr().err and kit.tree() == before


# ---- files made to hurt, with a manifest that agrees with them


def shard(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "no bytes": b"",
    "seven bytes": b"\x02" + bytes(6),
    "header longer than the file": shard({}, length=1 << 20),
    "header of 2^63 bytes": shard({}, length=1 << 63),
    "header of all bytes": shard({}, length=(1 << 64) - 1),
    "header of none": shard(b"", length=0),
    "not JSON": shard(b"{]"),
    "not text": shard(b"\xff\xfe{}"),
    "a list": shard([]),
    "nested deep": shard(b"[" * 200_000),
    "nested deep in an object": shard(b'{"a":' * 100_000),
    "a number of many digits": shard(b'{"a":' + b"9" * 10_000 + b"}"),
    "a pickle": b"\x80\x04\x95\x0b" + bytes(4) + b"cos\nsystem\n.",
    "entry is no object": shard({"w": 1}, bytes(8)),
    "unknown dtype": shard({"w": entry("F128")}, bytes(8)),
    "dtype is a list": shard({"w": entry(["F32"])}, bytes(8)),
    "shape too large": shard({"w": entry(shape=(1 << 40, 1 << 40))}, bytes(8)),
    "shape that wraps": shard({"w": entry(shape=(1 << 61, 8))}, bytes(8)),
    "negative shape": shard({"w": entry(shape=(-2, -1))}, bytes(8)),
    "fractional shape": shard({"w": entry(shape=(2.0,))}, bytes(8)),
    "true as a size": shard({"w": entry("F64", (True,))}, bytes(8)),
    "ten thousand dims": shard({"w": entry(shape=[1] * 10_000, offsets=(0, 4))}, bytes(4)),
    "offsets back to front": shard({"w": entry(offsets=(8, 0))}, bytes(8)),
    "offsets outside": shard({"w": entry(offsets=(8, 16))}, bytes(8)),
    "negative offsets": shard({"w": entry(offsets=(-8, 0))}, bytes(8)),
    "overlapping": shard({"w": entry(), "v": entry()}, bytes(8)),
    "a gap": shard({"w": entry(), "v": entry(offsets=(12, 20))}, bytes(20)),
    "too much data": shard({"w": entry()}, bytes(9)),
    "too little data": shard({"w": entry()}, bytes(7)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_is_a_plain_fault(kit, name):
    kit.save(1)
    folder = kit.save(2)
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    files = {
        path.name: FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(Manifest(2, folder.name, "run-a", None, files).encode())
    store = kit.store()
    assert not kit.differs(store.newest(), 1)
    with pytest.raises(ValueError, match=r"."):
        parse_shard(HOSTILE[name])


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '{"a": ' * 100_000, "\ud800"])
def test_a_hostile_state_is_a_plain_fault(kit, text):
    kit.save(1)
    folder = kit.save(2)
    (folder / "state.json").write_bytes(text.encode(errors="surrogatepass"))
    files = {
        path.name: FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(Manifest(2, folder.name, "run-a", None, files).encode())
    assert not kit.differs(kit.store().newest(), 1)


def test_random_bytes_never_crash_the_reader():
    whole = save({"w": torch.arange(6.0).view(2, 3), "v": torch.arange(3)})
    num_refused = 0
    for seed in range(2_000):
        generator = random.Random(seed)
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data) if seed % 2 else 40)] = generator.randrange(256)
        try:
            parse_shard(bytes(data))
        except ValueError:
            num_refused += 1
    assert 0 < num_refused < 2_000, "some bytes break the header, some only a value"


# ---- a disk that refuses


def refusal_violations(kit, *, error, for_good, refuses_removal=False):
    """Let every operation of a save fail in turn; (operations tried, saves after which something was not as it should)."""
    disk = RecordingDisk()
    kit.save(1, store=kit.store(disk=disk, keep_last=1))
    disk.log.clear()
    kit.save(2, store=kit.store(disk=disk, keep_last=1))
    names = [operation[0] for operation in disk.log]
    num_to_commit = names.index("remove_file")
    assert {"make_folder", "create", "write", "sync", "sync_folder", "rename"} <= set(names[:num_to_commit])
    violations = []
    for number, name in enumerate(names):
        shutil.rmtree(kit.root)
        kit.save(1)
        before, disk = kit.tree(), RecordingDisk()
        disk.fail_at, disk.error, disk.for_good, disk.refuses_removal = number, error, for_good, refuses_removal
        store = kit.store(disk=disk, keep_last=1)
        said = ""
        try:
            kit.save(2, store=store)
        except CheckpointError as caught:
            said = caught.line()
        is_told = all(
            words in said
            for words in (
                "E-DISK: cannot save step 2",
                os.strerror(error),
                "bytes wanted",
                " free)",
                str(disk.name(kit.root)),
            )
        )
        if number < num_to_commit:
            found = kit.store().newest()
            is_right = is_told and "step 1 is kept" in said and found is not None
            if refuses_removal and number > names.index("rename"):
                # whole, but nobody could be told that it would outlive a power loss
                is_right = is_right and not kit.differs(found, found.step)
            else:
                is_right = is_right and not kit.differs(found, 1) and (refuses_removal or kit.tree() == before)
        else:
            is_right = not said and not kit.differs(kit.store().newest(), 2)
        store.disk = Disk()
        kit.save(3, store=store)
        if not is_right or store.steps() != [3] or len(list(kit.root.rglob("*"))) != 6:
            violations.append((number, name, said))
    return len(names), violations


@pytest.mark.parametrize(
    ("error", "for_good"), [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, True), (errno.EDQUOT, False)]
)
@pytest.mark.costly
def test_whatever_operation_fails_the_one_before_stands(kit, error, for_good):
    num_tried, violations = refusal_violations(kit, error=error, for_good=for_good)
    assert num_tried > 30 and not violations


def test_a_disk_that_is_gone_takes_nothing_back(kit):
    num_tried, violations = refusal_violations(kit, error=errno.EIO, for_good=True, refuses_removal=True)
    assert num_tried > 30 and not violations


FAILPOINTS = [
    f"ckpt.{when}_{what}" for what in ("shard", "fsync", "manifest", "rename") for when in ("before", "after")
]


@pytest.mark.parametrize("name", FAILPOINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_failpoints_of_a_save(kit, monkeypatch, name, action):
    kit.save(1)
    before = kit.tree()
    monkeypatch.setenv("GROUNDUP_FAILPOINT", f"{name}:{action}:1")
    with pytest.raises(CheckpointError if action == "enospc" else RuntimeError):
        kit.save(2)
    assert kit.tree() == before
    kit.save(2)
    assert not kit.differs(kit.store().newest(), 2)


@pytest.mark.parametrize("name", [*FAILPOINTS, "ckpt.before_purge"])
def test_a_kill_at_any_failpoint_leaves_a_whole_checkpoint(kit, monkeypatch, name):
    kit.save(1)
    monkeypatch.setenv("GROUNDUP_FAILPOINT", f"{name}:kill:1")
    child = os.fork()
    if child == 0:
        try:
            kit.save(2, store=kit.store(keep_last=1))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    is_committed = name in ("ckpt.after_rename", "ckpt.before_purge")
    assert not kit.differs(kit.store().newest(), 2 if is_committed else 1)
    monkeypatch.delenv("GROUNDUP_FAILPOINT")
    kit.save(2, store=kit.store(keep_last=1))
    assert not kit.differs(kit.store().newest(), 2) and len(list(kit.root.glob("*/*"))) == 1


def test_a_purge_that_fails_is_a_warning(kit, monkeypatch, capsys):
    kit.save(1)
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "ckpt.before_purge:enospc:1")
    store = kit.store(keep_last=1, quiet=False)
    kit.save(2, store=store)
    assert "W-PURGE" in capsys.readouterr().err and store.steps() == [1, 2]
    kit.save(3, store=store)
    assert store.steps() == [3]


@pytest.mark.parametrize("limit", [0, 100, 4096, 20_000])
def test_a_disk_that_really_refuses_leaves_the_one_before(kit, limit):
    """A limit on the size of files is a full disk that a test can afford: `write` itself fails."""
    kit.save(1)
    before = kit.tree()
    big = {"model": {"w": torch.zeros(8192)}, "optimizer": {"w": torch.zeros(8192)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"E-DISK: cannot save step 2: .*File too large"):
            kit.store().save(2, big, {"step": 2}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kit.tree() == before


# ---- a disk that lies


class LyingDisk(Disk):
    """Writes one bit of a weight differently; sizes and manifest are right."""

    def write(self, descriptor, data):
        if len(data) == 96:
            data = bytearray(data)
            data[50] ^= 1
        super().write(descriptor, memoryview(data))


def early_purge_violations(kit, kind):
    """Saves that the disk spoilt, after which the checkpoint before is gone or the save is believed."""
    violations = 0
    for step in (2, 3):
        shutil.rmtree(kit.root, ignore_errors=True)
        kit.save(1)
        try:
            kit.save(step, store=kit.store(kind=kind, disk=LyingDisk(), keep_last=1))
            violations += 1
        except CheckpointError:
            try:
                violations += kit.differs(kit.store().newest(), 1)
            except CheckpointError:
                violations += 1
    return violations


def test_nothing_is_removed_before_the_new_one_was_read_back(kit):
    assert early_purge_violations(kit, CheckpointStore) == 0


def test_a_purge_before_verification_is_seen(kit, monkeypatch):
    from groundup.checkpoint.writer import AttemptWriter

    read_back = AttemptWriter.check_files

    class EarlyPurge(CheckpointStore):
        def _write(self, snapshot):
            def purge_first(writer, folder, files):
                self.purge(folder)
                read_back(writer, folder, files)

            monkeypatch.setattr(AttemptWriter, "check_files", purge_first)
            super()._write(snapshot)

    assert early_purge_violations(kit, EarlyPurge) > 0
