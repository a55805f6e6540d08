"""A power loss at any moment of a history of saves: a checkpoint that was said to be saved loads."""

import random
import shutil

import pytest
from power_loss import NoSync, RecordingDisk, every_prefix, rebuild, replay, sampled

from groundup.base.errors import CheckpointError

STEPS = (1, 2, 3)


def history(kit, disk):
    """Log of three saves, the last with a purge, and a mark after each that returned."""
    store = kit.store(disk=disk, keep_last=1)
    for step in STEPS:
        kit.save(step, store=store)
        disk.log.append(("saved", step))
    return disk.log


def power_loss_violations(kit, log, states):
    """States (length of the log, seed, fate) in which something is lost that was said to be saved, or is not as it was."""
    top, violations = kit.root.parent.parent, []
    place = top / "after"
    shutil.rmtree(kit.root.parent)
    for number, (length, seed, fate) in enumerate(states):
        place.mkdir()
        rebuild(replay(log[:length], top), place, random.Random(f"{length} {seed}"), fate)
        saved = max((operation[1] for operation in log[:length] if operation[0] == "saved"), default=0)
        try:
            found = kit.store(place / "run" / "checkpoints").newest()
            is_right = saved == 0 if found is None else found.step >= saved and not kit.differs(found, found.step)
            if number % 5 == 0:
                kit.save(9, store=kit.store(place / "run" / "checkpoints", keep_last=1, disk=NoSync()))
                is_right = is_right and not kit.differs(kit.store(place / "run" / "checkpoints").newest(), 9)
        except CheckpointError as error:
            is_right = False
            violations.append(error.line())
        if not is_right:
            violations.append((length, seed, fate))
        shutil.rmtree(place)
    return violations


def test_the_model_loses_what_was_not_synced(kit):
    """The judge is judged first: a file made with care is there in every state, one without is not."""
    top = kit.root.parent.parent
    made = [("create", top / "a"), ("write", top / "a", b"word")]
    synced = [*made, ("sync", top / "a"), ("sync_folder", top)]
    outcomes = {"made": set(), "synced": set()}
    for name, log in (("made", made), ("synced", synced)):
        for seed in range(60):
            place = top / "after"
            place.mkdir()
            rebuild(replay(log, top), place, random.Random(seed), "mixed")
            outcomes[name].add((place / "a").read_bytes() if (place / "a").exists() else None)
            shutil.rmtree(place)
    assert outcomes["synced"] == {b"word"} and outcomes["made"] >= {None, b"", b"word", bytes(4), b"w"}


def test_after_a_power_loss_at_any_operation_a_saved_checkpoint_loads(kit):
    log = history(kit, RecordingDisk())
    assert len(log) > 90 and {"rename", "remove_file", "remove_folder"} <= {operation[0] for operation in log}
    assert not power_loss_violations(kit, log, every_prefix(log))


@pytest.mark.parametrize("num_states", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_after_a_power_loss_in_any_order_a_saved_checkpoint_loads(kit, num_states):
    log = history(kit, RecordingDisk())
    assert not power_loss_violations(kit, log, sampled(log, num_states))


@pytest.mark.slow
def test_after_a_power_loss_at_any_operation_in_any_order(kit):
    log = history(kit, RecordingDisk())
    assert not power_loss_violations(kit, log, every_prefix(log, seeds=20))


# ---- the tests above, tested: a store without one of its guards is seen


@pytest.mark.parametrize("ignored", ["sync", "sync_folder"])
def test_a_missing_sync_is_seen(kit, ignored):
    disk = RecordingDisk()
    disk.ignores = {ignored}
    log = history(kit, disk)
    assert len(power_loss_violations(kit, log, every_prefix(log)[::5])) > 10


def test_a_manifest_before_its_shards_is_seen(kit):
    log = history(kit, RecordingDisk())
    early = manifest_first(log)
    assert sorted(map(str, early)) == sorted(map(str, log)) and early != log
    assert power_loss_violations(kit, early, every_prefix(early)[: 2 * len(log)])


def manifest_first(log):
    """The log of a store that commits before it writes the shards."""
    result, waiting = [], []
    for operation in log:
        name, path = operation[0], operation[1]
        if name in ("create", "write", "sync") and path.suffix == ".safetensors":
            waiting.append(operation)
        else:
            result.append(operation)
            if name == "rename":
                result += waiting
                waiting = []
    return result
