"""The checkpoints of a run: safetensors and JSON in an attempt folder each, committed by renaming a manifest.

`checkpoints/step-000500/attempt-0001-ID/` holds `*.safetensors`, `state.json` and `MANIFEST.json` with the size and
SHA-256 of each file. What has no valid manifest does not count; a committed folder is never written into again;
nothing old is removed before the new one was read back. Order is by step and attempt, never by time.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.disk import Disk
from groundup.base.errors import CheckpointError, DoesNotFit
from groundup.base.failpoints import reach
from groundup.base.log import Log
from groundup.checkpoint.attempt import Attempt, Checkpoint, find_attempts, reason_of, verified_state
from groundup.checkpoint.manifest import Manifest
from groundup.checkpoint.shard import NAMES, is_finite
from groundup.checkpoint.writer import AttemptWriter, Snapshot, remove_attempt, remove_empty_steps


class CheckpointStore:
    """The checkpoints of one run: written by one thread, read back before they count, verified before they are used."""

    def __init__(
        self,
        root: Path,
        *,
        run_id: str,
        log: Log,
        keep_last: int = 2,
        keep_every: int | None = None,
        is_strict: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self.root, self.run_id, self.log, self.is_strict = root, run_id, log, is_strict
        self.keep_last, self.keep_every = keep_last, keep_every
        self.disk = disk or Disk()
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._purge_fault = ""
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._damaged: set[Path] = set()

    def preflight(self, num_bytes: int, num_checkpoints: int) -> None:
        """Raise DoesNotFit if the disk has no room for so many checkpoints of `num_bytes`, or for one more than stand."""
        there = sum(file.bytes for _, manifest in self._whole() for file in manifest.files.values())
        needed = max(num_bytes, num_bytes * num_checkpoints - there)
        free = self.disk.free_bytes(self.root)
        if needed > free:
            raise DoesNotFit(
                "E-DISK-PREFLIGHT",
                what=f"checkpoints need {needed:,} bytes more ({num_checkpoints} of {num_bytes:,}, {there:,} there) "
                f"and the disk {self.disk.name(self.root)} has {free:,} free",
                where=self.root,
                next="free disk space, keep fewer checkpoints, or write to another disk",
            )

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        metric: float | None = None,
        wait: bool = False,
    ) -> float:
        """Take a snapshot now and write it in a thread; returns the seconds the caller was held up.

        A write still at work is waited for; if it failed, that is a warning and the run goes on. With `wait`, the
        checkpoint is committed and read back on return. `metric`: lower is better. Raises CheckpointError for values
        that are not finite, and with `wait` for a disk that refuses.
        """
        began = time.monotonic()
        self._join()
        self._warn_of_failure()
        live = _checked_snapshot(step, tensors, {"state": state}, metric)
        if wait:
            self._write(live)
            self._warn_of_purge()
        elif (snapshot := self._copied(live)) is not None:
            self._thread = threading.Thread(target=self._write_in_thread, args=(snapshot,), daemon=True)
            self._thread.start()
        else:
            self._write_in_thread(live)
        return time.monotonic() - began

    def writer(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, Mapping[str, Any]],
        *,
        metric: float | None = None,
    ) -> AttemptWriter:
        """For a save that several ranks make together: the writer of this one's files, tensors and JSON by name.

        Raises CheckpointError for values that are not finite.
        """
        return AttemptWriter(self.root, self.run_id, _checked_snapshot(step, tensors, texts, metric), self.disk)

    def finish(self) -> None:
        """Wait for the write at work. Raises CheckpointError if it failed."""
        self._join()
        self._buffers.clear()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure[1]

    def newest(
        self, *, before: int | None = None, fault_of: Callable[[Mapping[str, Any]], str | None] = lambda state: None
    ) -> Checkpoint | None:
        """The newest checkpoint (of a step below `before`) whose every byte is as written; None where there is none.

        A damaged or foreign one, or one in whose state `fault_of` finds something, is named and passed over. Raises
        CheckpointError if there are some and none can be used; a strict store for the first that cannot.
        """
        self._join()
        candidates = [
            attempt
            for attempt in find_attempts(self.root, self.run_id, self.disk)
            if attempt.is_committed and (before is None or attempt.step < before)
        ]
        for attempt in reversed(candidates):
            try:
                if attempt.manifest is None or attempt.fault is not None:
                    raise ValueError(attempt.fault)
                state = verified_state(attempt.folder, self.run_id, attempt.manifest, self.disk)
                if fault := fault_of(state):
                    raise ValueError(fault)
            except (OSError, ValueError) as error:
                self._damaged.add(attempt.folder)
                if self.is_strict:
                    raise CheckpointError(
                        "E-CKPT-CORRUPT",
                        what=f"step {attempt.step} cannot be used: {reason_of(error)}",
                        where=attempt.folder,
                        next="without `--strict` the same command goes on from the checkpoint before",
                    ) from None
                self.log.warn(
                    "W-CKPT-CORRUPT", f"step {attempt.step} is passed over: {reason_of(error)} at {attempt.folder}"
                )
            else:
                return Checkpoint(attempt.step, attempt.folder, state, attempt.manifest.files, self.disk)
        if candidates:
            raise CheckpointError(
                "E-CKPT-NONE-LOADABLE",
                what=f"{len(candidates)} checkpoints found, 0 loadable; not beginning at step 0 over them",
                where=self.root,
                next="restore one, or begin again with `--restart`",
            )
        return None

    def drop_after(self, step: int) -> None:
        """Remove the run's checkpoints of later steps: a run that was rewound to `step` leaves them behind."""
        self._join()
        self._remove(attempt for attempt in self._removable() if attempt.step > step)

    def steps(self) -> list[int]:
        """Steps of the run's committed checkpoints, in order, as far as names and sizes tell."""
        self._join()
        return sorted({attempt.step for attempt, _ in self._whole()})

    def _copied(self, live: Snapshot) -> Snapshot | None:
        """Clones in the memory of the snapshot before; None, with a warning, where there is not enough of it."""
        buffers: dict[tuple[str, str], Tensor] = {}
        try:
            for name, group in live.tensors.items():
                for key, tensor in group.items():
                    buffer = self._buffers.pop((name, key), None)
                    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                        buffer = _empty_like(tensor)
                    buffers[name, key] = buffer.copy_(tensor.detach())
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            self._buffers.clear()
            self.log.warn(
                "W-SAVE-MEMORY",
                f"no memory for a copy of {live.num_bytes:,} bytes; step {live.step} is written at once",
            )
            return None
        self._buffers = buffers
        copies = {name: {key: buffers[name, key] for key in group} for name, group in live.tensors.items()}
        return Snapshot(live.step, copies, live.texts, live.metric)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._warn_of_purge()

    def _warn_of_purge(self) -> None:
        if self._purge_fault:
            self.log.warn("W-PURGE", f"old checkpoints are left: {self._purge_fault} at {self.root}")
        self._purge_fault = ""

    def _warn_of_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            return
        step, error = failure
        if not isinstance(error, CheckpointError):  # a bug of ours, not the disk's doing
            raise error
        self.log.warn("W-SAVE-FAILED", f"step {step} is not saved: {error.what}")

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # told by the next `save` or `finish`
            self._failure = snapshot.step, error

    def _write(self, snapshot: Snapshot) -> None:
        """Write, commit and verify, then purge. Raises CheckpointError when the disk refuses."""
        writer = AttemptWriter(self.root, self.run_id, snapshot, self.disk)
        try:
            folder = writer.write()
        except (OSError, ValueError) as error:
            self._damaged |= writer.undo()
            raise self._refused(snapshot, error) from None
        except BaseException:
            writer.undo()
            raise
        self.purge(folder)

    def _refused(self, snapshot: Snapshot, error: OSError | ValueError) -> CheckpointError:
        kept = max((attempt.step for attempt, _ in self._whole()), default=None)
        try:
            free = f"{self.disk.free_bytes(self.root):,}"
        except OSError:
            free = "unknown"
        return CheckpointError(
            "E-DISK",
            what=f"cannot save step {snapshot.step}: {reason_of(error)} on the disk {self.disk.name(self.root)} "
            f"({snapshot.num_bytes:,} bytes wanted, {free} free); "
            + ("no earlier checkpoint is there" if kept is None else f"step {kept} is kept"),
            where=self.root,
            next="free disk space and run the same command again",
        )

    def _whole(self) -> list[tuple[Attempt, Manifest]]:
        """Attempts that look whole, and were not found damaged, by step and attempt."""
        return [
            (attempt, attempt.manifest)
            for attempt in find_attempts(self.root, self.run_id, self.disk)
            if attempt.manifest is not None and attempt.fault is None and attempt.folder not in self._damaged
        ]

    def _kept(self, newest: Path) -> set[Path]:
        """Folders to keep: the one just saved, the last ones, the best, and every so many steps."""
        by_step = {attempt.step: (attempt.folder, manifest.metric) for attempt, manifest in self._whole()}
        steps = sorted(by_step)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        measured = [(metric, -step) for step, (_, metric) in by_step.items() if metric is not None]
        if measured:
            kept.add(-min(measured)[1])
        return {by_step[step][0] for step in kept} | {newest}

    def purge(self, newest: Path) -> None:
        """Remove what need not be kept: older checkpoints of this run, and attempts that were never committed.

        What the disk does not let us remove is a warning of the next save.
        """
        try:
            kept = self._kept(newest)
            self._remove(attempt for attempt in self._removable() if attempt.folder not in kept)
        except OSError as error:
            self._purge_fault = reason_of(error)

    def _removable(self) -> Iterator[Attempt]:
        """Attempts that a save of this run made, never another's."""
        for attempt in find_attempts(self.root, self.run_id, self.disk):
            is_foreign = attempt.is_committed and (attempt.manifest is None or attempt.manifest.run_id != self.run_id)
            if attempt.is_ours and not is_foreign:
                yield attempt

    def _remove(self, attempts: Iterable[Attempt]) -> None:
        for attempt in attempts:
            reach("ckpt.before_purge")
            remove_attempt(attempt.folder, self.disk)
        if self.root.exists():
            remove_empty_steps(self.root, self.disk)


def _checked_snapshot(
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, Mapping[str, Any]],
    metric: float | None,
) -> Snapshot:
    """The caller's own tensors, fit to be saved. Raises CheckpointError for a dtype or a value that is not."""
    for name, group in tensors.items():
        for key, tensor in group.items():
            if tensor.dtype not in NAMES:
                raise CheckpointError("E-CKPT-FORMAT", what=f"{name}: {key} has {tensor.dtype=}")
            if not is_finite(tensor):
                raise _not_finite(step, f"{name}: {key} holds")
    if metric is not None and not math.isfinite(metric):
        raise _not_finite(step, f"{metric=} holds")
    encoded = {}
    for name, values in texts.items():
        try:
            text = json.dumps(dict(values), indent=2, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise _not_finite(step, f"the {name} holds") from None
        encoded[f"{name}.json"] = f"{text}\n".encode()
    return Snapshot(step, tensors, encoded, None if metric is None else float(metric))


def _not_finite(step: int, who: str) -> CheckpointError:
    return CheckpointError(
        "E-CKPT-NONFINITE",
        what=f"step {step} is not saved: {who} values that are not finite",
        next="the checkpoints before are kept; go on from one with a lower learning rate",
    )


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
