"""Power loss: every state a disk may be found in after one, rebuilt from the log of a history of saves.

The model, stricter than any file system we know: bytes of a file are sure once the file was synced; until then each
write may be there, be zeros, be torn, or be missing. A name that was made, renamed or removed is sure once its folder
was synced; until then it may have happened or not, whatever happened after it. Syncing a file does not sync its name.
A rename from one folder into another is one change of both, and sure once both were synced.
"""

import errno
import os
import random
from contextlib import contextmanager
from dataclasses import dataclass, field

from groundup.base.disk import Disk

FATES = ("all", "none", "names only", "last name")
"""What becomes of all that is pending, beside a mixture by chance."""


class RecordingDisk(Disk):
    """Logs every operation that changes something; from number `fail_at` on, refuses it once or for good."""

    def __init__(self):
        self.log, self.names = [], {}
        self.fail_at, self.for_good, self.error, self.refuses_removal = None, False, errno.ENOSPC, False
        self.ignores = set()
        """Operations that say they are done and are not."""

    @contextmanager
    def _record(self, name, *what, descriptor=None):
        number = len(self.log)
        is_refused = self.fail_at is not None and (number >= self.fail_at if self.for_good else number == self.fail_at)
        self.log.append((name, *what))
        if is_refused and (self.refuses_removal or number == self.fail_at or not name.startswith("remove")):
            if name == "write":
                os.write(descriptor, what[1][: len(what[1]) // 2])
            raise OSError(self.error, os.strerror(self.error))
        yield
        if name in self.ignores:
            self.log.pop()

    def make_folder(self, path):
        with self._record("make_folder", path):
            super().make_folder(path)

    def create(self, path):
        with self._record("create", path):
            descriptor = super().create(path)
            self.names[descriptor] = path
            return descriptor

    def append_to(self, path):
        with self._record("touch" if path.exists() else "create", path):
            descriptor = super().append_to(path)
            self.names[descriptor] = path
            return descriptor

    def write(self, descriptor, data):
        with self._record("write", self.names[descriptor], bytes(data), descriptor=descriptor):
            super().write(descriptor, data)

    def cut(self, descriptor, num_bytes):
        with self._record("cut", self.names[descriptor], num_bytes):
            super().cut(descriptor, num_bytes)

    def sync(self, descriptor):
        with self._record("sync", self.names[descriptor]):
            pass

    def sync_file(self, path):
        with self._record("sync", path):
            pass

    def sync_folder(self, path):
        with self._record("sync_folder", path):
            pass

    def rename(self, old, new):
        with self._record("rename", old, new):
            super().rename(old, new)

    def remove_file(self, path):
        with self._record("remove_file", path):
            super().remove_file(path)

    def remove_folder(self, path):
        with self._record("remove_folder", path):
            super().remove_folder(path)


@dataclass(eq=False)
class File:
    sure: bytes = b""
    pending: list = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    sure: dict = field(default_factory=dict)
    pending: list = field(default_factory=list)
    """(name, file or folder, whether it is there from now on, the change this is a part of)."""


class Change:
    """A change of one folder, or, as a rename between two, of both."""

    def __init__(self, *folders):
        self.folders, self.unsynced = folders, {id(folder) for folder in folders}

    def is_last(self):
        return any(folder.pending and folder.pending[-1][-1] is self for folder in self.folders)


def change(*parts):
    """Put (folder, name, node, is_there) off until their folders are synced."""
    one = Change(*(folder for folder, *_ in parts))
    for folder, *part in parts:
        folder.pending.append((*part, one))


def replay(log, top):
    """The folder that holds `top`'s tree after the operations in `log`, with what is sure and what is pending."""
    ground = Folder()
    now = {top: ground}
    for name, *what in log:
        path = what[0]
        if name in ("make_folder", "create"):
            now[path] = Folder() if name == "make_folder" else File()
            change((now[path.parent], path.name, now[path], True))
        elif name in ("write", "cut"):
            now[path].pending.append(what[1])
        elif name == "sync":
            now[path].sure = contents(now[path].sure, now[path].pending)
            now[path].pending.clear()
        elif name == "sync_folder":
            if path in now:
                make_sure(now[path])
        elif name == "rename":
            new = what[1]
            change((now[new.parent], new.name, now[path], True), (now[path.parent], path.name, now[path], False))
            for old in [place for place in now if place.is_relative_to(path)]:
                now[new / old.relative_to(path)] = now.pop(old)
        elif name in ("remove_file", "remove_folder"):
            change((now[path.parent], path.name, now.pop(path), False))
        else:
            assert name in ("saved", "touch")
    return ground


def make_sure(folder):
    """Sync a folder: its changes are sure, but for renames whose other folder was not synced yet."""
    for one in dict.fromkeys(part[-1] for part in folder.pending):
        one.unsynced.discard(id(folder))
        if not one.unsynced:
            for changed in dict.fromkeys(one.folders):
                for part in [part for part in changed.pending if part[-1] is one]:
                    apply(changed.sure, part)
                    changed.pending.remove(part)


def apply(names, part):
    name, node, is_there, _ = part
    if is_there:
        names[name] = node
    elif names.get(name) is node:
        del names[name]


def contents(data, pieces):
    for piece in pieces:
        data = data[:piece] if isinstance(piece, int) else data + piece
    return data


def content_after(file, generator, fate):
    if fate in ("all", "last name") or not file.pending:
        return contents(file.sure, file.pending)
    if fate in ("none", "names only"):
        return file.sure
    data = file.sure
    for piece in file.pending:
        match generator.choice(["there", "zeros", "torn", "gone"]):
            case "there":
                data = contents(data, [piece])
            case "zeros" if not isinstance(piece, int):
                data += bytes(len(piece))
            case "torn" if not isinstance(piece, int):
                data += piece[: generator.randrange(len(piece) + 1)]
    return data


def rebuild(folder, place, generator, fate, happened=None):
    """Write a tree as it may be found after a power loss."""
    happened = {} if happened is None else happened
    names = dict(folder.sure)
    keep = {"all": 1.0, "names only": 1.0, "none": 0.0}.get(fate, generator.random())
    for part in folder.pending:
        one = part[-1]
        if happened.setdefault(one, one.is_last() if fate == "last name" else generator.random() < keep):
            apply(names, part)
    for name, node in names.items():
        if isinstance(node, Folder):
            (place / name).mkdir()
            rebuild(node, place / name, generator, fate, happened)
        else:
            (place / name).write_bytes(content_after(node, generator, fate))


class NoSync(Disk):
    """As fast as a disk that need not outlive the test."""

    def sync(self, descriptor):
        pass

    def sync_file(self, path):
        pass

    def sync_folder(self, path):
        pass


def every_prefix(log, seeds=0):
    plain = [(length, 0, fate) for length in range(len(log) + 1) for fate in FATES]
    return plain + [(length, seed, "mixed") for length in range(len(log) + 1) for seed in range(seeds)]


def sampled(log, num_states, seed=0):
    generator = random.Random(seed)
    return [(generator.randrange(len(log) + 1), generator.random(), "mixed") for _ in range(num_states)]
