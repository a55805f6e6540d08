"""Power losses in a history of saves: a checkpoint that was said to be saved loads, to the last bit."""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from groundup.base.errors import CheckpointError
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial, chunks, total
from groundup.proof.power_loss import CrashState, every_prefix, rebuild, replay, sampled
from groundup.proof.recording_disk import NoSync, Operation, RecordingDisk
from groundup.proof.tiny_store import TinyStore

STEPS = (1, 2, 3)
CHUNK = 200
AFTER = 9
"""A step that is saved where the disk was found, to see that the run can go on."""


def history(kit: TinyStore, disk: RecordingDisk) -> list[Operation]:
    """Log of three saves, the last two with a purge, and a mark after each that returned."""
    store = kit.store(disk=disk, keep_last=1)
    for step in STEPS:
        kit.save(step, store=store)
        disk.log.append(("saved", step))
    shutil.rmtree(kit.root.parent)
    return disk.log


def lost_states(kit: TinyStore, log: Sequence[Operation], states: Sequence[CrashState]) -> list[object]:
    """States in which something is lost that was said to be saved, or is not as it was; errors in words before them."""
    lost: list[object] = []
    top = kit.root.parent.parent
    place = top / "after"
    for number, (length, seed, fate) in enumerate(states):
        place.mkdir()
        rebuild(replay(log[:length], top), place, random.Random(f"{length} {seed}"), fate)
        saved = max((operation[1] for operation in log[:length] if operation[0] == "saved"), default=0)
        root = place / kit.root.relative_to(top)
        try:
            found = kit.store(root).newest()
            is_right = saved == 0 if found is None else found.step >= saved and not kit.differs(found, found.step)
            if number % 5 == 0:
                kit.save(AFTER, store=kit.store(root, keep_last=1, disk=NoSync()))
                is_right = is_right and not kit.differs(kit.store(root).newest(), AFTER)
        except CheckpointError as error:
            is_right = False
            lost.append(error.line())
        if not is_right:
            lost.append((length, seed, fate))
        shutil.rmtree(place)
    return lost


@contextmanager
def _crashing(folder: Path) -> Iterator[Make]:
    kit = TinyStore(folder / "run" / "checkpoints")
    log = history(kit, RecordingDisk())
    whole = every_prefix(log)

    def make(trial: Trial) -> Outcome:
        begin = CHUNK * trial["seed"]
        # first each operation with each plain fate, then mixtures by chance
        states = whole[begin : begin + trial["count"]]
        states += sampled(log, trial["count"] - len(states), seed=trial["seed"])
        lost = lost_states(kit, log, states)
        return {"tried": len(states), "lost": len(lost), "which": [str(state) for state in lost[:20]]}

    yield make


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{total(outcomes, 'tried'):,}", str(total(outcomes, "lost"))]


CRASHES = Guarantee(
    name="crashes",
    title="Power loss: unsynced writes and names dropped and reordered at every operation; a saved checkpoint loads",
    columns=("crash states", "not recovered"),
    usual_count=5_000,
    unit="states a disk may be found in after a power loss",
    plan=lambda count: chunks(count, CHUNK),
    making=_crashing,
    figures=_figures,
    is_kept=lambda outcomes: total(outcomes, "lost") == 0,
)
