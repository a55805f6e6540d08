"""Power loss: every state a disk may be found in after one, rebuilt from the log of a history of saves.

The model, stricter than any file system we know: bytes of a file are sure once the file was synced; until then each
write may be there, be zeros, be torn, or be missing. A name that was made, renamed or removed is sure once its folder
was synced; until then it may have happened or not, whatever happened after it. Syncing a file does not sync its name.
A rename from one folder into another is one change of both, and sure once both were synced.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.proof.recording_disk import Operation

FATES = ("all", "none", "names only", "last name")
"""What becomes of all that is pending, beside a mixture by chance."""
CrashState = tuple[int, float, str]
"""How much of the log happened, a seed, and the fate of what was pending then."""


@dataclass(eq=False)
class File:
    """Bytes that are sure, and pieces written, or lengths cut to, that are not."""

    sure: bytes = b""
    pending: list[bytes | int] = field(default_factory=list)


class Change:
    """A change of one folder, or, as a rename between two, of both."""

    def __init__(self, *folders: "Folder") -> None:
        self.folders, self.unsynced = folders, {id(folder) for folder in folders}

    def is_last(self) -> bool:
        """Whether it is the newest change of one of its folders."""
        return any(folder.pending and folder.pending[-1].change is self for folder in self.folders)


@dataclass(frozen=True, eq=False)
class Part:
    """What a change does to one folder: a name stands for a node from now on, or no longer does."""

    name: str
    node: "File | Folder"
    is_there: bool
    change: Change

    def apply(self, names: "dict[str, File | Folder]") -> None:
        """Do it."""
        if self.is_there:
            names[self.name] = self.node
        elif names.get(self.name) is self.node:
            del names[self.name]


@dataclass(eq=False)
class Folder:
    """Names that are sure, and changes of names that are not."""

    sure: "dict[str, File | Folder]" = field(default_factory=dict)
    pending: list[Part] = field(default_factory=list)


def replay(log: Sequence[Operation], top: Path) -> Folder:
    """The folder that holds `top`'s tree after the operations in `log`, with what is sure and what is pending."""
    ground = Folder()
    now: dict[Path, Any] = {top: ground}
    for name, *what in log:
        path = what[0]
        if name in ("make_folder", "create"):
            now[path] = Folder() if name == "make_folder" else File()
            _put_off((now[path.parent], path.name, now[path], True))
        elif name in ("write", "cut"):
            now[path].pending.append(what[1])
        elif name == "sync":
            now[path].sure = _contents(now[path].sure, now[path].pending)
            now[path].pending.clear()
        elif name == "sync_folder":
            if path in now:
                _make_sure(now[path])
        elif name == "rename":
            new = what[1]
            _put_off((now[new.parent], new.name, now[path], True), (now[path.parent], path.name, now[path], False))
            for old in [place for place in now if place.is_relative_to(path)]:
                now[new / old.relative_to(path)] = now.pop(old)
        elif name in ("remove_file", "remove_folder"):
            _put_off((now[path.parent], path.name, now.pop(path), False))
        elif name not in ("saved", "touch"):
            raise ValueError(f"unknown operation {name!r}")
    return ground


def _put_off(*parts: tuple[Folder, str, File | Folder, bool]) -> None:
    """A change that waits until its folders are synced."""
    change = Change(*(folder for folder, *_ in parts))
    for folder, name, node, is_there in parts:
        folder.pending.append(Part(name, node, is_there, change))


def _make_sure(folder: Folder) -> None:
    """Sync a folder: its changes are sure, but for renames whose other folder was not synced yet."""
    for change in dict.fromkeys(part.change for part in folder.pending):
        change.unsynced.discard(id(folder))
        if not change.unsynced:
            for changed in dict.fromkeys(change.folders):
                for part in [part for part in changed.pending if part.change is change]:
                    part.apply(changed.sure)
                    changed.pending.remove(part)


def _contents(data: bytes, pieces: Sequence[bytes | int]) -> bytes:
    for piece in pieces:
        data = data[:piece] if isinstance(piece, int) else data + piece
    return data


def _content_after(file: File, generator: random.Random, fate: str) -> bytes:
    if fate in ("all", "last name") or not file.pending:
        return _contents(file.sure, file.pending)
    if fate in ("none", "names only"):
        return file.sure
    data = file.sure
    for piece in file.pending:
        becomes = generator.choice(["there", "zeros", "torn", "gone"])
        if becomes == "there":
            data = _contents(data, [piece])
        elif becomes == "zeros" and not isinstance(piece, int):
            data += bytes(len(piece))
        elif becomes == "torn" and not isinstance(piece, int):
            data += piece[: generator.randrange(len(piece) + 1)]
    return data


def rebuild(
    folder: Folder, place: Path, generator: random.Random, fate: str, happened: dict[Change, bool] | None = None
) -> None:
    """Write a tree as it may be found after a power loss."""
    happened = {} if happened is None else happened
    names = dict(folder.sure)
    keep = {"all": 1.0, "names only": 1.0, "none": 0.0}.get(fate, generator.random())
    for part in folder.pending:
        change = part.change
        if happened.setdefault(change, change.is_last() if fate == "last name" else generator.random() < keep):
            part.apply(names)
    for name, node in names.items():
        if isinstance(node, Folder):
            (place / name).mkdir()
            rebuild(node, place / name, generator, fate, happened)
        else:
            (place / name).write_bytes(_content_after(node, generator, fate))


def every_prefix(log: Sequence[Operation], seeds: int = 0) -> list[CrashState]:
    """Each length of the log with each plain fate, and with so many mixtures."""
    return list(_every_prefix(len(log), seeds))


def _every_prefix(num_operations: int, seeds: int) -> Iterator[CrashState]:
    for length in range(num_operations + 1):
        yield from ((length, 0, fate) for fate in FATES)
    for length in range(num_operations + 1):
        yield from ((length, seed, "mixed") for seed in range(seeds))


def sampled(log: Sequence[Operation], num_states: int, seed: int = 0) -> list[CrashState]:
    """States by chance: anywhere in the log, any mixture."""
    generator = random.Random(seed)
    return [(generator.randrange(len(log) + 1), generator.random(), "mixed") for _ in range(num_states)]
