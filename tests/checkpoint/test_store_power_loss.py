"""A power loss at any moment of a history of saves: a checkpoint that was said to be saved loads."""

import random
import shutil

import pytest

from groundup.proof.crash_trials import history, lost_states
from groundup.proof.power_loss import every_prefix, rebuild, replay, sampled
from groundup.proof.recording_disk import RecordingDisk

pytestmark = pytest.mark.costly


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
    assert not lost_states(kit, log, every_prefix(log))


def test_after_a_power_loss_in_any_order_a_saved_checkpoint_loads(kit):
    log = history(kit, RecordingDisk())
    assert not lost_states(kit, log, sampled(log, 100))


@pytest.mark.slow
def test_after_a_power_loss_at_any_operation_in_any_order(kit):
    log = history(kit, RecordingDisk())
    assert not lost_states(kit, log, every_prefix(log, seeds=20))


# ---- the tests above, tested: a store without one of its guards is seen


@pytest.mark.parametrize("ignored", ["sync", "sync_folder"])
def test_a_missing_sync_is_seen(kit, ignored):
    disk = RecordingDisk()
    disk.ignores = {ignored}
    log = history(kit, disk)
    assert len(lost_states(kit, log, every_prefix(log)[::5])) > 10


def test_a_manifest_before_its_shards_is_seen(kit):
    log = history(kit, RecordingDisk())
    early = manifest_first(log)
    assert sorted(map(str, early)) == sorted(map(str, log)) and early != log
    assert lost_states(kit, early, every_prefix(early)[: 2 * len(log)])


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
