"""Checkpoints whose files were damaged: found before a tensor is used, and the one before is taken."""

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from groundup.checkpoint.attempt import MANIFEST
from groundup.proof.guarantee import Guarantee, Make, Outcome, Trial, chunks, total
from groundup.proof.tiny_store import TinyStore

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]


def unseen_flips(kit: TinyStore, num_flips: int, seed: object) -> int:
    """Flip single bits anywhere in the newest of two checkpoints; how many of them that one is still used with."""
    shutil.rmtree(kit.root, ignore_errors=True)
    kit.save(1)
    folder = kit.save(2, metric=1.5)
    generator, unseen = random.Random(str(seed)), 0
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    sizes = [len(data) for data in whole.values()]
    for number in range(num_flips):
        # every file in turn, else the small ones are hardly hit
        path = list(whole)[number // 2 % len(whole)] if number % 2 else generator.choices(list(whole), sizes)[0]
        place = generator.randrange(len(whole[path]) * 8)
        data = bytearray(whole[path])
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        unseen += kit.differs(kit.store().newest(), 1)
        path.write_bytes(whole[path])
    if kit.differs(kit.store().newest(), 2):
        raise AssertionError("the checkpoint is not whole again: the trial itself is wrong")
    return unseen


class Damage:
    """What is done to `folder`, a checkpoint of step 2; `other` is one of step 1."""

    def __init__(self, kit: TinyStore, folder: Path, other: Path, chosen: random.Random) -> None:
        self.kit, self.folder, self.other, self.chosen = kit, folder, other, chosen

    def _any_file(self) -> Path:
        return self.chosen.choice(sorted(self.folder.iterdir()))

    def cut(self) -> None:
        """A file ends early."""
        path = self._any_file()
        data = path.read_bytes()
        path.write_bytes(data[: self.chosen.randrange(len(data))])

    def emptied(self) -> None:
        """A file has no bytes."""
        self._any_file().write_bytes(b"")

    def grown(self) -> None:
        """A file has bytes too many."""
        path = self._any_file()
        path.write_bytes(path.read_bytes() + self.chosen.randbytes(self.chosen.randint(1, 9)))

    def missing(self) -> None:
        """A file is not there."""
        self._any_file().unlink()

    def extra(self) -> None:
        """A file more, perhaps a second copy of a shard."""
        names = ["extra.safetensors", "MANIFEST.json.bak", ".MANIFEST.json.tmp", "model.safetensors~", "x"]
        data = self.chosen.choice([b"", (self.folder / "model.safetensors").read_bytes()])
        (self.folder / self.chosen.choice(names)).write_bytes(data)

    def extra_folder(self) -> None:
        """A folder in it."""
        (self.folder / "more").mkdir()

    def swapped_with_another_step(self) -> None:
        """A file of another step in place of its own."""
        name = self.chosen.choice(FILES)
        shutil.copyfile(self.other / name, self.folder / name)

    def swapped_within(self) -> None:
        """Two files changed places."""
        one, two = self.chosen.sample([name for name in FILES if name != MANIFEST], 2)
        data = (self.folder / one).read_bytes()
        shutil.copyfile(self.folder / two, self.folder / one)
        (self.folder / two).write_bytes(data)

    def another_step_whole(self) -> None:
        """Another step's checkpoint under this one's name."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.other, self.folder)

    def another_attempt_name(self) -> None:
        """The folder has another name."""
        names = ["attempt-0009-00000000", "attempt-old", "attempt-0001-ABCDEF00"]
        self.folder.rename(self.folder.with_name(self.chosen.choice(names)))

    def another_run(self) -> None:
        """A whole checkpoint of another run."""
        shutil.rmtree(self.folder)
        self.kit.save(2, store=self.kit.store(run_id="run-b", keep_last=100))

    def a_link(self) -> None:
        """A file is a link to its own bytes elsewhere."""
        path = self._any_file()
        path.rename(self.kit.root.parent / path.name)
        path.symlink_to(self.kit.root.parent / path.name)

    def another_kind(self) -> None:
        """A manifest that is JSON of another kind, or none."""
        values = [b"[]", b"{}", b'{"files": []}', b'{"files": {"state.json": 5}}', b"\xff", b"null", b"[" * 100_000]
        values.append(b'{"format": 1, "sha256": 1, "files": {"a": {}}}')
        (self.folder / MANIFEST).write_bytes(self.chosen.choice(values))


DAMAGES: list[Callable[[Damage], None]] = [
    *(Damage.cut, Damage.emptied, Damage.grown, Damage.missing, Damage.extra, Damage.extra_folder),
    *(Damage.swapped_with_another_step, Damage.swapped_within, Damage.another_step_whole),
    *(Damage.another_attempt_name, Damage.another_run, Damage.a_link, Damage.another_kind),
]


def unseen_damages(kit: TinyStore, numbers: range) -> list[str]:
    """Damage the newest of two checkpoints in every way in turn; the damages after which the other one was not taken."""
    aside = kit.root.parent / "whole"
    for left in (kit.root, aside):
        shutil.rmtree(left, ignore_errors=True)
    other, folder = kit.save(1), kit.save(2)
    shutil.copytree(kit.root, aside)
    unseen = []
    for number in numbers:
        do = DAMAGES[number % len(DAMAGES)]
        do(Damage(kit, folder, other, random.Random(number)))
        if kit.differs(kit.store().newest(), 1):
            unseen.append(f"{do.__name__} {number}")
        shutil.rmtree(kit.root)
        shutil.copytree(aside, kit.root)
    if kit.differs(kit.store().newest(), 2):
        raise AssertionError("the checkpoint is not whole again: the trial itself is wrong")
    return unseen


@contextmanager
def _flipping(folder: Path) -> Iterator[Make]:
    kit = TinyStore(folder / "run" / "checkpoints")

    def make(trial: Trial) -> Outcome:
        return {"tried": trial["count"], "unseen": unseen_flips(kit, trial["count"], trial["seed"])}

    yield make


@contextmanager
def _damaging(folder: Path) -> Iterator[Make]:
    kit = TinyStore(folder / "run" / "checkpoints")

    def make(trial: Trial) -> Outcome:
        begin = 1000 * trial["seed"]
        unseen = unseen_damages(kit, range(begin, begin + trial["count"]))
        return {"tried": trial["count"], "unseen": len(unseen), "which": unseen}

    yield make


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    tried, unseen = total(outcomes, "tried"), total(outcomes, "unseen")
    return [f"{tried:,}", f"{tried - unseen:,}", str(unseen)]


def _is_kept(outcomes: Sequence[Outcome]) -> bool:
    return total(outcomes, "unseen") == 0


FLIPS = Guarantee(
    name="flips",
    title="Single flipped bits in a checkpoint: found before a tensor is used, the one before is taken",
    columns=("bits flipped", "found", "not found"),
    usual_count=10_000,
    unit="single flipped bits, over every file of a checkpoint",
    plan=lambda count: chunks(count, 500),
    making=_flipping,
    figures=_figures,
    is_kept=_is_kept,
)
DAMAGED = Guarantee(
    name="damages",
    title="Truncated, swapped, missing, foreign, duplicate and linked files of a checkpoint: found, the one before is taken",
    columns=("checkpoints damaged", "found", "not found"),
    usual_count=1_000,
    unit="damaged checkpoints, thirteen ways in turn",
    plan=lambda count: chunks(count, 50),
    making=_damaging,
    figures=_figures,
    is_kept=_is_kept,
)
