"""Checkpoints that all ranks write together, each what it owns; the first one commits when every file is read back."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groundup.base.errors import CheckpointError
from groundup.checkpoint.attempt import reason_of
from groundup.checkpoint.manifest import FileRecord
from groundup.checkpoint.pieces import Part, describe, merge
from groundup.checkpoint.store import CheckpointStore
from groundup.checkpoint.writer import AttemptWriter
from groundup.parallel.world import World


class SpreadStore:
    """Saves of all ranks into one store. Every method but the writing itself is collective."""

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self._store, self._world = store, world
        self._at_work: _Write | None = None

    def save(self, state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Part]], *, wait: bool) -> None:
        """Take a snapshot of what this rank owns; it is written in a thread, and counts once `poll` or `finish` commits it.

        Raises CheckpointError on every rank where one has values that are not finite, and with `wait` where a disk refuses.
        """
        self.finish()
        file_of = {group: f"{group}-{self._world.rank:05d}" for group, own in parts.items() if own}
        layout = merge(self._world.gather(describe({group: parts[group] for group in file_of}, file_of)))
        tensors = {
            file: {name: part.tensor.detach().to("cpu", copy=not wait) for name, part in parts[group].items()}
            for group, file in file_of.items()
        }
        texts = {"state": state, "layout": layout} if self._world.is_first else {}
        writer = self._together(lambda: self._store.writer(state["step"], tensors, texts, metric=state["look_loss"]))
        folder = self._together(lambda: str(writer.make_folder()) if self._world.is_first else "", writer)
        self._at_work = _Write(writer, Path(self._world.broadcast(folder)))
        if wait:
            self.finish()

    def poll(self) -> None:
        """Commit the write at work if every rank is through with it."""
        if self._at_work is not None and not self._world.any(self._at_work.is_running):
            self.finish()

    def finish(self) -> None:
        """Wait for the write at work and commit it. Raises CheckpointError, and nothing is left, where a rank could not write."""
        write, self._at_work = self._at_work, None
        if write is None:
            return
        files = self._together(write.files, write.writer)
        records = {name: record for own in self._world.gather(_as_values(files)) for name, record in own.items()}
        if not self._world.is_first:
            self._together(lambda: None, write.writer)
            return
        self._together(
            lambda: write.writer.commit(write.folder, {name: FileRecord(**record) for name, record in records.items()}),
            write.writer,
        )
        self._store.purge(write.folder)
        self._store.finish()  # which tells of what could not be removed

    def _together(self, act: Callable[[], Any], writer: AttemptWriter | None = None) -> Any:
        """What `act` gives, if it succeeds on every rank; else each takes back what it wrote, and all fail."""
        value, fault = None, ""
        try:
            value = act()
        except (OSError, ValueError) as error:
            fault = reason_of(error)
        except CheckpointError as error:
            fault = error.what
        faults = self._world.gather(fault)
        if any(faults):
            if writer is not None:
                writer.undo()
            rank = next(rank for rank, fault in enumerate(faults) if fault)
            raise CheckpointError(
                "E-CKPT-RANK",
                what=f"rank {rank} cannot save: {faults[rank]}",
                where=self._store.root,
                next="the checkpoints before are kept; put it right and run the same command again",
            )
        return value


class _Write:
    """One rank's files of a checkpoint, written and read back in a thread."""

    def __init__(self, writer: AttemptWriter, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self._files: dict[str, FileRecord] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def files(self) -> dict[str, FileRecord]:
        """Once all are written. Raises what writing raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._files

    def _run(self) -> None:
        try:
            self._files = self.writer.write_files(self.folder)
            self.writer.check_files(self.folder, self._files)
        except BaseException as error:
            self._failure = error


def _as_values(files: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in files.items()}
