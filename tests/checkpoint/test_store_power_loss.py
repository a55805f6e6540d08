"""Power loss: every state a disk may be found in after one, rebuilt from the log of a history of saves.

The model, stricter than any file system we know: bytes of a file are sure once the file was synced; until then each
write may be there, be zeros, be torn, or be missing. A name that was made, renamed or removed is sure once its folder
was synced; until then it may have happened or not, whatever happened after it. Syncing a file does not sync its name.
"""

import random
import shutil
from dataclasses import dataclass, field

import pytest

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError

STEPS = (1, 2, 3)
FATES = ("all", "none", "names only", "last name")
"""What becomes of all that is pending, beside a mixture by chance."""


@dataclass
class File:
    sure: bytes = b""
    pending: list = field(default_factory=list)


@dataclass
class Folder:
    sure: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)


def replay(log, top):
    """The folder that holds `top`'s tree after the operations in `log`, with what is sure and what is pending."""
    ground = Folder()
    now = {top: ground}
    for name, *what in log:
        path = what[0]
        if name in ("make_folder", "create"):
            now[path] = Folder() if name == "make_folder" else File()
            now[path.parent].pending.append((path.name, now[path]))
        elif name == "write":
            now[path].pending.append(what[1])
        elif name == "sync":
            now[path].sure += b"".join(now[path].pending)
            now[path].pending.clear()
        elif name == "sync_folder":
            if path in now:
                apply(now[path].sure, now[path].pending)
                now[path].pending.clear()
        elif name == "rename":
            now[what[1]] = now.pop(path)
            now[path.parent].pending.append((path.name, what[1].name, now[what[1]]))
        elif name in ("remove_file", "remove_folder"):
            del now[path]
            now[path.parent].pending.append((path.name, None))
        else:
            assert name == "saved"
    return ground


def apply(names, changes):
    for old, *new in changes:
        if len(new) == 2:
            names.pop(old, None)
            names[new[0]] = new[1]
        elif new[0] is None:
            names.pop(old, None)
        else:
            names[old] = new[0]


def content_after(file, generator, fate):
    if fate in ("all", "last name") or not file.pending:
        return file.sure + b"".join(file.pending)
    if fate in ("none", "names only"):
        return file.sure
    data = file.sure
    for piece in file.pending:
        match generator.choice(["there", "zeros", "torn", "gone"]):
            case "there":
                data += piece
            case "zeros":
                data += bytes(len(piece))
            case "torn":
                data += piece[: generator.randrange(len(piece) + 1)]
    return data


def rebuild(folder, place, generator, fate):
    """Write a tree as it may be found after a power loss."""
    names = dict(folder.sure)
    keep = {"all": 1.0, "names only": 1.0, "last name": 1.0, "none": 0.0}.get(fate, generator.random())
    pending = folder.pending[-1:] if fate == "last name" else folder.pending
    apply(names, [change for change in pending if generator.random() < keep])
    for name, node in names.items():
        if isinstance(node, Folder):
            (place / name).mkdir()
            rebuild(node, place / name, generator, fate)
        else:
            (place / name).write_bytes(content_after(node, generator, fate))


def history(kit, disk):
    """Log of three saves, the last with a purge, and a mark after each that returned."""
    store = kit.store(disk=disk, keep_last=1)
    for step in STEPS:
        kit.save(step, store=store)
        disk.log.append(("saved", step))
    log = [tuple(part for part in operation if not isinstance(part, int)) for operation in disk.log]
    return [
        ("saved", operation[1]) if name[0] == "saved" else name for name, operation in zip(log, disk.log, strict=True)
    ]


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


class NoSync(Disk):
    """As fast as a disk that need not outlive the test."""

    def sync(self, descriptor):
        pass

    def sync_folder(self, path):
        pass


def every_prefix(log, seeds=0):
    plain = [(length, 0, fate) for length in range(len(log) + 1) for fate in FATES]
    return plain + [(length, seed, "mixed") for length in range(len(log) + 1) for seed in range(seeds)]


def sampled(log, num_states, seed=0):
    generator = random.Random(seed)
    return [(generator.randrange(len(log) + 1), generator.random(), "mixed") for _ in range(num_states)]


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
    log = history(kit, kit.RecordingDisk())
    assert len(log) > 90 and {"rename", "remove_file", "remove_folder"} <= {operation[0] for operation in log}
    assert not power_loss_violations(kit, log, every_prefix(log))


@pytest.mark.parametrize("num_states", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_after_a_power_loss_in_any_order_a_saved_checkpoint_loads(kit, num_states):
    log = history(kit, kit.RecordingDisk())
    assert not power_loss_violations(kit, log, sampled(log, num_states))


@pytest.mark.slow
def test_after_a_power_loss_at_any_operation_in_any_order(kit):
    log = history(kit, kit.RecordingDisk())
    assert not power_loss_violations(kit, log, every_prefix(log, seeds=20))


# ---- the tests above, tested: a store without one of its guards is seen


@pytest.mark.parametrize("ignored", ["sync", "sync_folder"])
def test_a_missing_sync_is_seen(kit, ignored):
    disk = kit.RecordingDisk()
    disk.ignores = {ignored}
    log = history(kit, disk)
    assert len(power_loss_violations(kit, log, every_prefix(log)[::5])) > 10


def test_a_manifest_before_its_shards_is_seen(kit):
    log = history(kit, kit.RecordingDisk())
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
