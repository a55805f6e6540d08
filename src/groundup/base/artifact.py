"""Artifacts: what a stage writes is either whole and committed under its fixed name, or not there at all.

A stage works in `.attempts/STAGE`; when it is done its files are hashed and synced, a manifest is written, and the
folder is renamed to its place. A finished stage whose key (numerics of the config, hashes of the inputs, code
version) stands is skipped; one whose key changed is moved to `.old/STAGE` until the new one is committed. Every name
is on the disk before anything relies on it: at a power loss too, the old stage or the new one is there.
"""

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from groundup.base.config import flatten
from groundup.base.disk import Disk
from groundup.base.errors import ConfigError, DataError
from groundup.base.failpoints import reach
from groundup.base.files import json_bytes, read_json, sha256_of, write_json

MANIFEST = "MANIFEST.json"
SUMMARY = "summary.json"
ATTEMPT = "ATTEMPT.json"
OUTSIDE_MANIFEST = {MANIFEST, SUMMARY, ATTEMPT, "eval.json"}
CHECKPOINTS = "checkpoints"
"""Folder of a training stage whose files have manifests of their own."""


@dataclass(frozen=True)
class StageKey:
    """What decides whether a finished stage still stands."""

    stage: str
    code_version: int
    config: Mapping[str, Any]
    """Numerics of the recipe's sections the stage reads."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hash of each input: an artifact's output hash, or a source file's SHA-256."""

    def flat(self) -> dict[str, Any]:
        """Dotted names and values of everything in the key."""
        values = flatten(json.loads(json.dumps(dict(self.config))))
        values["code_version"] = self.code_version
        values.update({f"input {name}": value for name, value in self.inputs.items()})
        return values


@dataclass(frozen=True)
class Manifest:
    """The record of a committed artifact: its key, and size and SHA-256 of each file."""

    stage: str
    code_version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def key(self) -> StageKey:
        return StageKey(self.stage, self.code_version, self.config, self.inputs)

    def output_hash(self, prefix: str = "") -> str:
        """Hash over names and contents of the files under `prefix`: artifacts with equal files have equal hashes."""
        chosen = sorted((name, entry["sha256"]) for name, entry in self.files.items() if name.startswith(prefix))
        lines = "".join(f"{name}\0{sha256}\n" for name, sha256 in chosen)
        return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a committed artifact, None where there is none."""
    path = folder / MANIFEST
    return Manifest(**read_json(path)) if path.exists() else None


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its SHA-256. Raises DataError that names the first one that differs."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError("E-ARTIFACT-MISSING", what=f"{name} is missing", where=folder, next=_redo(folder))
        if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            raise DataError(
                "E-SHARD-HASH",
                what=f"{name} is not what was written (SHA-256 differs)",
                where=folder,
                next=_redo(folder),
            )


def _redo(folder: Path) -> str:
    return f"remove {folder} and run the same command again: it is made anew"


def differences(old: StageKey, new: StageKey) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with (old, new); a name that is absent counts as None."""
    before, after = old.flat(), new.flat()
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


@dataclass(frozen=True)
class ChangePolicy:
    """What to do with an unfinished stage whose key changed."""

    allow_change: Sequence[str] = ()
    """Dotted names that may differ; the stage goes on from where it was."""
    restart: bool = False
    """Begin the stage again."""


def _is_allowed(name: str, policy: ChangePolicy) -> bool:
    return name in policy.allow_change or name.split(".")[-1] in policy.allow_change


@dataclass(frozen=True)
class Attempt:
    """A stage at work: the folder it writes into, and whether something of an earlier try stands there."""

    key: StageKey
    folder: Path
    target: Path
    is_continued: bool


def _refuse_changes(attempt: Attempt, before: StageKey, policy: ChangePolicy) -> None:
    """Raise ConfigError for what differs from the key the attempt went by last, where that was not allowed."""
    changes = differences(before, attempt.key)
    refused = {name: values for name, values in changes.items() if not _is_allowed(name, policy)}
    if refused:
        listing = ", ".join(f"{name}: {old!r} → {new!r}" for name, (old, new) in refused.items())
        raise ConfigError(
            "E-STAGE-CHANGED",
            what=f"{attempt.key.stage} is unfinished and its settings changed: {listing}",
            where=attempt.folder,
            next=f"go on with `--allow-change {next(iter(refused))}`, or begin again with `--restart`",
        )


_locks_held: list[IO[str]] = []


def _let_go_of_locks() -> None:
    for file in _locks_held:
        file.close()


# a forked worker that outlives its killed parent would keep the run locked
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_locks)


class RunFolder:
    """A run's folder: begins, skips, commits and recovers the stages in it."""

    SENTINEL = ".groundup-run"

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        self.path, self.disk = path, disk or Disk()
        if path.exists() and not path.is_dir():
            raise ConfigError(
                "E-OUT-FOREIGN", what="the run's folder is a file", where=path, next="choose another name"
            )
        # one look: another rank may be making the folder now, its sentinel first
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if names and self.SENTINEL not in names:
            raise ConfigError(
                "E-OUT-FOREIGN",
                what="the folder is not empty and not a run of groundup",
                where=path,
                next="choose another name or remove the folder",
            )
        self.disk.make_folders(path)
        with suppress(FileExistsError):
            self.disk.write_new(path / self.SENTINEL, uuid.uuid4().hex.encode())
            self.disk.sync_folder(path)

    @property
    def run_id(self) -> str:
        """Made with the folder, never changed: checkpoints carry it."""
        return (self.path / self.SENTINEL).read_text()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the lock of a dead process is free. Raises DataError if another holds it."""
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise DataError(
                    "E-LOCKED",
                    what=f"another process works on this run ({file.read().strip()})",
                    where=self.path,
                    next="wait for it or choose another run",
                ) from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} host {os.uname().nodename}")
            file.flush()
            _locks_held.append(file)
            try:
                self._recover()
                yield
            finally:
                _locks_held.remove(file)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage's files are now: committed, or else at work."""
        committed = self.path / stage
        return committed if committed.exists() else self.path / ".attempts" / stage

    def committed(self, folder: str) -> Manifest:
        """Manifest of a committed artifact that another stage needs. Raises DataError if it is not there."""
        manifest = read_manifest(self.path / folder)
        if manifest is None:
            raise DataError(
                "E-STAGE-NONE",
                what=f"{folder}/ is not there yet",
                where=self.path,
                next="run the stages before this one first (`groundup run RECIPE` runs all of them)",
            )
        return manifest

    def begin(
        self, key: StageKey, policy: ChangePolicy, *, folder: str | None = None, resumable: bool = False
    ) -> Attempt | None:
        """An attempt to work in, or None if the finished stage stands.

        A resumable stage that was left unfinished goes on in its folder; if its key changed since its first
        checkpoint, ConfigError is raised unless the policy allows it. Other stages begin again. A finished stage that
        was moved aside for a setting with which nothing was saved is taken back.
        """
        target = self.path / (folder or key.stage)
        attempt = Attempt(key, self.path / ".attempts" / key.stage, target, is_continued=False)
        has_checkpoints = any((attempt.folder / CHECKPOINTS).glob(f"*/*/{MANIFEST}"))
        old = self.path / ".old" / key.stage
        aside = read_manifest(old)
        if aside is not None and not differences(aside.key, key) and not target.exists() and not has_checkpoints:
            self.disk.move(old, target)
            self._remove_old(key.stage)
        manifest = read_manifest(target)
        if manifest is not None and not policy.restart and not differences(manifest.key, key):
            for name, entry in manifest.files.items():
                if not (target / name).is_file() or (target / name).stat().st_size != entry["bytes"]:
                    raise DataError(
                        "E-ARTIFACT-MISSING",
                        what=f"{name} is missing or has another size",
                        where=target,
                        next=_redo(target),
                    )
            self._clear(attempt.folder)
            return None
        if manifest is not None and resumable and not policy.restart and self._may_go_on(manifest, key, policy, target):
            return self._reopen(attempt)
        if attempt.folder.exists():
            if resumable and not policy.restart and (attempt.folder / ATTEMPT).exists():
                before = StageKey(**read_json(attempt.folder / ATTEMPT))
                if has_checkpoints or not differences(before, key):
                    _refuse_changes(attempt, before, policy)
                    self._note_key(attempt)
                    return replace(attempt, is_continued=True)
            self._remove(attempt.folder)
        if target.exists():
            if old.exists():
                self._remove(old)
            self.disk.make_folders(old.parent)
            self.disk.move(target, old)
        self.disk.make_folders(attempt.folder)
        self._note_key(attempt)
        return attempt

    def _note_key(self, attempt: Attempt, folder: Path | None = None) -> None:
        self.disk.put((folder or attempt.folder) / ATTEMPT, json_bytes(asdict(attempt.key)))

    def _may_go_on(self, manifest: Manifest, key: StageKey, policy: ChangePolicy, target: Path) -> bool:
        """Whether a finished stage's changes were all allowed, and it has checkpoints to go on from."""
        changed = differences(manifest.key, key)
        return all(_is_allowed(name, policy) for name in changed) and any(
            (target / CHECKPOINTS).glob(f"*/*/{MANIFEST}")
        )

    def _reopen(self, attempt: Attempt) -> Attempt:
        """A finished stage goes on from its last checkpoint, such as with a longer duration."""
        self._clear(attempt.folder)
        self.disk.make_folders(attempt.folder.parent)
        # in this order: cut anywhere, it is a finished stage or one that goes on
        self._note_key(attempt, attempt.target)
        self.disk.move(attempt.target, attempt.folder)
        self.disk.remove_file(attempt.folder / MANIFEST)
        self.disk.sync_folder(attempt.folder)
        return replace(attempt, is_continued=True)

    def commit(self, attempt: Attempt) -> Manifest:
        """Hash and sync everything in the attempt, write its manifest, and give it its fixed name."""
        files: dict[str, dict[str, Any]] = {}
        folders = {attempt.folder}
        for path in sorted(attempt.folder.rglob("*")):
            name = path.relative_to(attempt.folder).as_posix()
            if path.is_dir():
                folders.add(path)
            elif path.name.startswith(".") and path.suffix == ".tmp":  # what a killed `atomic_write` left
                self.disk.remove_file(path)
            else:
                self.disk.sync_file(path)
                if name not in OUTSIDE_MANIFEST and not name.startswith(f"{CHECKPOINTS}/"):
                    files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in folders:
            self.disk.sync_folder(path)
        key = attempt.key
        manifest = Manifest(key.stage, key.code_version, dict(key.config), dict(key.inputs), files)
        record = asdict(manifest) | {"files": files}
        reach("artifact.before_manifest")
        self.disk.put(attempt.folder / MANIFEST, json_bytes(record))
        reach("artifact.before_rename")
        self._put_in_place(attempt.folder, attempt.target)
        reach("artifact.after_rename")
        self._remove_old(key.stage)
        return manifest

    def _put_in_place(self, folder: Path, target: Path) -> None:
        if target.exists():  # only what `begin` of this process left there, or a half-done rename of an older one
            self._remove(target)
        if (folder / ATTEMPT).exists():
            self.disk.remove_file(folder / ATTEMPT)
        self.disk.move(folder, target)
        self._clear(folder)

    def _remove(self, folder: Path) -> None:
        """Remove a stage's folder; cut in two, what is left counts neither as finished nor as one to go on with."""
        marks = [folder / name for name in (MANIFEST, ATTEMPT) if (folder / name).exists()]
        for path in marks:
            self.disk.remove_file(path)
        if marks:
            self.disk.sync_folder(folder)
        self.disk.remove_tree(folder)

    def _clear(self, folder: Path) -> None:
        """Remove a stage's folder, and the one around it where it was the last."""
        if folder.exists():
            self._remove(folder)
        if folder.parent.exists() and not any(folder.parent.iterdir()):
            self.disk.remove_folder(folder.parent)

    def _remove_old(self, stage: str) -> None:
        self._clear(self.path / ".old" / stage)

    def _recover(self) -> None:
        """Mend what was cut: the run's id, a commit between its manifest and its rename, what a commit replaced."""
        if not re.fullmatch("[0-9a-f]{32}", self.run_id):  # a power loss while the folder was made: it held nothing
            self.disk.put(self.path / self.SENTINEL, uuid.uuid4().hex.encode())
        for folder in sorted((self.path / ".attempts").glob("*")):
            manifest = read_manifest(folder)
            target = self._place_of(folder.name)
            if manifest is not None and not target.exists() and target.parent.exists():
                self._put_in_place(folder, target)
        for old in sorted((self.path / ".old").glob("*")):
            if (self._place_of(old.name) / MANIFEST).exists():
                self._remove_old(old.name)

    def _place_of(self, stage: str) -> Path:
        return self.path / ("lora/model" if stage == "merge" else stage)


def write_summary(folder: Path, figures: Mapping[str, Any]) -> None:
    """Add figures to a stage's summary.json; the file is replaced atomically, a second run gives the same file."""
    path = folder / SUMMARY
    before = read_json(path) if path.exists() else {}
    write_json(path, before | dict(figures))
