"""One training run from its first step or last checkpoint to its end: the same for pretraining, SFT and LoRA."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from groundup.base.duration import in_steps
from groundup.base.errors import CheckpointError, ConfigError, NumericsError, Preempted
from groundup.base.log import Progress
from groundup.base.seeding import derive_seed
from groundup.base.signals import StopRequest, stop_request
from groundup.checkpoint.store import CheckpointStore
from groundup.data.loader import prefetched_batches
from groundup.optim.schedules import lr_multiplier
from groundup.parallel.checks import refuse_divergence
from groundup.train.changes import changes_since, environment_of
from groundup.train.engine import StepAbandoned
from groundup.train.engines import engine_of, refuse_split
from groundup.train.figures import final_figures, progress_line, ranks_in_words, scaling_figures, step_timing
from groundup.train.guard import Guard
from groundup.train.job import TrainingJob, TrainingOutcome
from groundup.train.looks import Looks
from groundup.train.loop import RewindWanted, StepResult, training_steps
from groundup.train.meter import Meter
from groundup.train.out_of_memory import does_not_fit, is_out_of_memory, layout_words
from groundup.train.prepare import prepare
from groundup.train.records import JsonLines, NoLines
from groundup.train.resolve import Resolved, apply_threads, resolve_once, shrink_for_good, write_resolved
from groundup.train.saving import checkpoint_bytes, find_checkpoint, most_checkpoints, owned_parts, saved_tensors
from groundup.train.spread_saving import SpreadStore
from groundup.train.state import TrainingState
from groundup.train.stragglers import StragglerWatch
from groundup.train.validation import weighted_loss


class TrainingRun:
    """A job at work: engine, state, records. `run` takes it to its end."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.config = job, job.config
        self.world = job.world
        job.model.use_dropout(self.config.dropout)
        refuse_split(self.world.mesh, job.model.config, self.config)
        self.resolved = self._resolve()
        self.config = self.resolved.settle(job.config)
        apply_threads(self.resolved)
        prepare(job.model, self.config, self.resolved, device=self._device, world=self.world, weights=job.weights)
        self.engine = engine_of(self.world)(
            job.model,
            self.config,
            dtype=self.resolved.dtype,
            device=self._device,
            micro_batch_rows=self.resolved.micro_batch_rows,
            num_lanes=self.resolved.num_lanes,
            world=self.world,
        )
        self.state = TrainingState(num_ranks=self.world.size, mesh=self.world.mesh.describe())
        self._intervals = {
            name: self._steps_of(getattr(self.config, name))
            for name in ("validate_every", "sample_every", "log_every", "checkpoint_every", "keep_every")
        }
        self.store = CheckpointStore(
            job.folder / "checkpoints",
            run_id=job.run_id,
            log=job.log,
            keep_last=self.config.keep_checkpoints,
            keep_every=self._intervals["keep_every"] or None,
            is_strict=job.is_strict,
        )
        self.spread_store = SpreadStore(self.store, self.world)
        self.is_resumed = self._load()
        if self.resolved.shrunk_from is not None:
            self.state.is_exact = False
        if job.is_exact:
            self._refuse_inexact()
        num_bytes = checkpoint_bytes(self.engine)
        if self.world.is_first and self.state.step < self.resolved.total_steps:
            self.store.preflight(num_bytes, self._most_checkpoints())
        self.looks = Looks(job, self.config, self.engine, self._record_sample)
        self.meter = Meter(self.config, job.model.config, self.resolved)
        self.metrics = self._records("metrics.jsonl", keep=self.state.metrics_bytes)
        self.timing = self._records("timing.jsonl")
        self.events = self._records("events.jsonl")
        self._saved_step = self.state.step if self.is_resumed else -1
        self._saving_seconds = 0.0
        self.stragglers = StragglerWatch(self.world, job.log, lambda step, words: self._event(step, "straggler", words))
        self._state_is_whole = threading.Lock()
        self._saving = threading.RLock()

    def _load(self) -> bool:
        """Take up the newest checkpoint; False where there is none."""
        found = find_checkpoint(self.store, self.world, self.job.folder / "metrics.jsonl")
        if found is None:
            return False
        self.state = TrainingState(**found.state)
        self.engine.load_state_dict(saved_tensors(found, self.engine))
        return True

    @property
    def _device(self) -> str:
        is_one_of_many = self.resolved.device == "cuda" and self.world.size > 1
        return f"cuda:{self.world.local_rank}" if is_one_of_many else self.resolved.device

    def _resolve(self) -> Resolved:
        """Rank 0 resolves for all: no rank's machine may decide otherwise."""
        resolved, model = None, self.job.model
        if self.world.is_first:
            resolved = resolve_once(
                self.job.folder,
                self.config,
                rows_per_epoch=self.job.source.rows_per_epoch,
                matrix_parameters=model.num_active_parameters(min_dims=2),
                has_dropout=model.has_dropout,
                world=self.world,
                shape=model.config,
            )
        return Resolved(**self.world.broadcast(resolved and asdict(resolved)))

    def _records(self, name: str, *, keep: int | None = None) -> JsonLines:
        return JsonLines(self.job.folder / name, keep_bytes=keep) if self.world.is_first else NoLines()

    def _note_world(self) -> None:
        spread = self._respread()
        if not spread or self.state.step == self.resolved.total_steps:
            return
        self.state.num_ranks, self.state.mesh, self.state.is_exact = self.world.size, self.world.mesh.describe(), False
        detail = f"{spread}: the order of the data stays, the last bits do not"
        self._event(self.state.step, "world", detail)
        self._saved_step = -1
        self._save(wait=True)
        self.job.log.say(f"  {detail}")

    def _respread(self) -> str:
        """How the ranks shared the model before and share it now; empty where that is the same."""
        before = ranks_in_words(self.state.num_ranks, self.state.mesh)
        now = ranks_in_words(self.world.size, self.world.mesh.describe())
        return f"{before} → {now}" if before != now else ""

    def _steps_of(self, duration: str | None) -> int:
        """Interval in steps; 0 for never."""
        if duration is None:
            return 0
        return in_steps(
            duration,
            batch_rows=self.resolved.batch_rows,
            row_length=self.config.row_length,
            rows_per_epoch=self.job.source.rows_per_epoch,
        )

    def run(self) -> TrainingOutcome:
        """Train to the end. Raises Preempted after saving when a signal asks to stop."""
        if self.state.step > self.resolved.total_steps:
            raise ConfigError(
                "E-CONFIG-DURATION",
                what=f"{self.job.name} is at step {self.state.step} already, the duration asks for "
                f"{self.resolved.total_steps}",
                next="give a longer duration, or begin again with `--restart`",
            )
        self._note_changes()
        if self.world.is_first:
            write_resolved(self.job.folder, self.resolved, self.job.config)
        if self.is_resumed:
            self._event(self.state.step, "resume", "from its last checkpoint")
            self.job.log.say(f"  goes on from step {self.state.step} of {self.resolved.total_steps}")
            self._note_world()
        elif self._may_rewind:
            self._save(wait=True)  # where a rewind before the first checkpoint goes
        refuse_divergence(self.world, self.state.step, self.engine.weights)
        if self.state.step < self.resolved.total_steps:
            self.meter.find_peak(self._device)
        self.world.report(self.state.step)
        with stop_request() as stop, stop.polled(lambda: self._rescue(stop)), self.job.log.progress() as line:
            is_done = False
            while not is_done:
                try:
                    self._train(stop, line)
                    is_done = True
                except StepAbandoned:
                    self._stop_for(stop)
                except RewindWanted as wanted:
                    self._rewind(wanted.step)
                except NumericsError:
                    self._save(wait=True)
                    self.world.barrier()
                    raise
                except Exception as error:
                    with suppress(CheckpointError):  # the write at work comes to its end before an error ends the run
                        self.store.finish()
                    if is_out_of_memory(error):
                        raise does_not_fit(f"step {self.state.step + 1}") from None
                    raise
            self._save(wait=True)
        figures = final_figures(
            self.state,
            self.resolved,
            self.meter,
            rows_per_epoch=self.job.source.rows_per_epoch,
            num_ranks=self.world.size,
            loss_scale=self.engine.loss_scale,
        )
        return TrainingOutcome(self.engine.each_final_weight, self.resolved, figures)

    def _most_checkpoints(self) -> int:
        return most_checkpoints(
            total_steps=self.resolved.total_steps,
            checkpoint_every=self._intervals["checkpoint_every"],
            keep_last=self.config.keep_checkpoints,
            keep_every=self._intervals["keep_every"],
            first_step=self._may_rewind,
            measures=bool(self.job.validation),
        )

    @property
    def _may_rewind(self) -> bool:
        return "rewind" in (self.config.on_nonfinite, self.config.on_spike)

    @property
    def _here(self) -> dict[str, str]:
        """What beside the recipe decides the bits."""
        return environment_of(self.resolved.device)

    def _changes(self) -> list[str]:
        return changes_since(self.state, self._here, self.job.key)

    def _refuse_inexact(self) -> None:
        """Raise ConfigError, before anything is written, where the run could not end in an unbroken one's bits."""
        reasons = self._changes()
        if self.is_resumed and (spread := self._respread()):
            reasons.append(spread)
        if not self.state.is_exact:
            reasons.append("it is marked `exact: false` already, events.jsonl says why")
        if reasons:
            raise ConfigError(
                "E-NOT-EXACT",
                what=f"{self.job.name} cannot end in the bits of an unbroken run: {', '.join(reasons)}",
                where=self.job.folder,
                next="go on where and as it began, or without `--exact`",
            )

    def _note_changes(self) -> None:
        """A resumed run whose settings or machine are not those it began with goes on and is marked."""
        changed = self.world.broadcast(self._changes())
        self.state.environment, self.state.key = self._here, dict(self.job.key)
        if self.is_resumed and changed:
            self.state.is_exact = False
            self._event(self.state.step, "change", ", ".join(changed))
            self._saved_step = -1  # the mark is saved before anything else happens
            self._save(wait=True)
            self.job.log.warn("W-CHANGED", f"goes on otherwise than it began: {', '.join(changed)}")

    def _train(self, stop: StopRequest, line: Progress) -> None:
        """Take steps until the last. Raises StepAbandoned where a signal asked to stop."""
        total, rows, first = self.resolved.total_steps, self.resolved.batch_rows, self.state.step
        batches = prefetched_batches(
            self.job.source, batch_rows=rows, first_step=first, last_step=total, device=self._device
        )
        steps = training_steps(
            self.engine,
            self.meter.watched(batches),
            lambda step: lr_multiplier(step, self.config, total_steps=total, warmup_steps=self.resolved.warmup_steps),
            Guard(self.config, self.state, self.job.log, self.job.name_documents, self._event),
            start_step=self.state.step,
            seed_of=lambda step, row: derive_seed(self.job.seed, self.job.name, "dropout", step, row),
            should_stop=self._should_stop(stop),
            finish=self._count,
            update=self._state_is_whole,
        )
        self._began, self._elapsed_before = time.monotonic(), self.state.elapsed_seconds
        first_step, validation_text = self.state.step, ""
        if self.state.unwritten is not None and self._look(stop) and self._is_due("checkpoint_every"):
            # stopped between a step and its look: its checkpoint does not know yet how good it is
            self._saved_step = -1
            self._save()
        for result in steps:
            self.world.report(result.step)
            self.spread_store.poll()
            self._note_shrunk(result.step)
            is_saved = result.step == total or self._is_due("checkpoint_every")
            if is_saved or result.step % self.job.compare_every == 0:
                refuse_divergence(self.world, result.step, self.engine.weights)
            looks = self._look(stop)
            self._end_for_audit()
            self._record_timing(result)
            self.stragglers.note(result.step, result.sums.busy_seconds)
            if looks:
                validation_text = "".join(f"  val {figures['loss']:.3f}" for figures in looks.values())
            if self._is_due("sample_every"):
                self.looks.sample(stop.is_asked)
            if self._is_due("checkpoint_every") and result.step < total:
                self._save()
            rate = (result.step - first_step) * self.config.batch_size_tokens / (time.monotonic() - self._began)
            left = (total - result.step) * self.config.batch_size_tokens / rate
            every = self._intervals["checkpoint_every"]
            text = progress_line(self.job.name, result, total, validation_text, rate, left, self.meter, every)
            line.update(text)
            if self._is_due("log_every", at_end=False):
                self.job.log.say(f"  {text}")
            # every rank ends after the same step, whichever was told first
            if self.world.any(stop.is_asked()) and result.step < total:
                raise StepAbandoned

    def _end_for_audit(self) -> None:
        """All ranks end where rank 0's audit finds a reason."""
        if self.job.audit is None or not self._is_due("validate_every"):
            return
        fault = self.job.audit_fault() if self.world.is_first else None
        if self.world.any(fault is not None):
            raise fault or NumericsError("E-AUDIT", what="the first rank's audit ends the run")

    def _should_stop(self, stop: StopRequest) -> Callable[[], bool]:
        """Asked inside a step: one rank alone must not leave it, the others would wait for it."""
        return stop.is_asked if self.world.size == 1 else lambda: False

    def _poll(self, stop: StopRequest) -> None:
        if self._should_stop(stop)():
            raise StepAbandoned

    def _is_due(self, interval: str, *, at_end: bool = True) -> bool:
        every, step = self._intervals[interval], self.state.step
        return (at_end and step == self.resolved.total_steps) or (every > 0 and step % every == 0)

    def _stop_for(self, stop: StopRequest) -> None:
        self._save(wait=True)
        self.world.barrier()
        raise Preempted(
            "E-PREEMPTED",
            what=f"stopped by {stop.name or 'a signal to another rank'} after step {self.state.step} of "
            f"{self.resolved.total_steps}; everything is saved",
            next="run the same command again to go on",
        )

    def _rescue(self, stop: StopRequest) -> str:
        """Save from another thread while the main one computes: weights and state change only under the lock.

        A save that is under way already is waited for; so does a rank that leaves saving to the first.
        """
        if not self.world.is_first:
            stop.wait_until_over()
            return "the first rank saves"
        if self.engine.meets_others:
            return "the last save stands"
        if not self._state_is_whole.acquire(timeout=1.0):
            return "the last save stands"
        with self._saving:
            self._save(wait=True)
        return f"everything is saved after step {self.state.step} of {self.resolved.total_steps}"

    def _rewind(self, step: int) -> None:
        """Go back to the last checkpoint and leave out the batches up to `step`, counted from 0."""
        with self._state_is_whole:
            before = self.state
            passed_over = {*before.passed_over, *range(max(0, step + 1 - self.config.spike_batches), step + 1)}
            if not self._load():
                raise CheckpointError(
                    "E-CKPT-NONE",
                    what="the guard asks for a rewind and no checkpoint stands",
                    where=self.job.folder,
                    next="set `checkpoint_every`",
                )
            self.world.barrier()  # all have read it
            if self.world.is_first:
                self.store.drop_after(self.state.step)
            self.state.rewinds, self.state.passed_over = before.rewinds + 1, sorted(passed_over)
            self.state.is_exact, self.state.num_ranks, self.state.mesh = before.is_exact, before.num_ranks, before.mesh
            self.state.environment, self.state.key = before.environment, before.key
            self.metrics.cut(self.state.metrics_bytes)
        self._event(step + 1, "rewind", f"to step {self.state.step}, without the batches {sorted(passed_over)}")
        self._saved_step = -1
        self._save(wait=True)  # what is passed over is known from now on

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step = result.step
        state.rows = result.step * self.resolved.batch_rows
        state.tokens = result.step * self.config.batch_size_tokens
        state.loss_tokens += result.sums.num_loss_tokens
        state.skipped_steps += int(result.is_skipped)
        state.overflow_steps += int(result.has_overflow)
        state.is_exact &= self._is_as_resolved
        state.elapsed_seconds = self._elapsed_before + time.monotonic() - self._began
        state.look_loss = None
        loss, grad_norm = (None, None) if result.is_skipped else (result.sums.loss, result.grad_norm)
        state.unwritten = {
            "step": state.step,
            "tokens": state.tokens,
            "rows": state.rows,
            "epoch": state.rows / self.job.source.rows_per_epoch,
            "loss": loss,
            "num_loss_tokens": result.sums.num_loss_tokens,
            "grad_norm": grad_norm,
            "lr": result.lr,
            "skipped_steps": state.skipped_steps,
            **scaling_figures(state, result.sums.loss_scale),
            **({} if result.is_skipped else result.sums.figures()),
        }

    def _look(self, stop: StopRequest) -> dict[str, dict[str, float]] | None:
        """Look at the validation rows where that is due, and write the step's line of metrics."""
        poll = partial(self._poll, stop)
        looks = self.looks.validate(poll) if self._is_due("validate_every") else None
        audit = self.looks.audit(poll) if looks else None
        with self._state_is_whole:
            values = self.state.unwritten
            assert values is not None
            if looks:
                values["val"] = looks
                self.state.look_loss = weighted_loss(looks, self.job.validation_weights)
            if audit:
                values["audit"] = audit
            self.metrics.write(values)
            self.state.unwritten = None
        return looks

    def _record_timing(self, result: StepResult) -> None:
        self.timing.write(
            step_timing(
                result,
                self.meter,
                batch_size_tokens=self.config.batch_size_tokens,
                elapsed_seconds=self.state.elapsed_seconds,
                save_seconds=self._saving_seconds,
                device=self.resolved.device,
            )
        )
        self._saving_seconds = 0.0

    @property
    def _is_as_resolved(self) -> bool:
        """Whether memory sufficed for the micro-batches that were planned."""
        planned = self.resolved.micro_batch_rows, self.resolved.num_lanes
        return (self.engine.micro_batch_rows, self.engine.num_lanes) == planned

    def _note_shrunk(self, step: int) -> None:
        """Memory ran out in this step, which was computed again in smaller micro-batches: every later one is too."""
        rows, lanes = self.engine.micro_batch_rows, self.engine.num_lanes
        if self._is_as_resolved:
            return
        words = f"out of memory with {layout_words(self.resolved.micro_batch_rows, self.resolved.num_lanes)}"
        self.resolved = shrink_for_good(
            self.job.folder, self.resolved, self.job.config, micro_batch_rows=rows, num_lanes=lanes
        )
        detail = f"{words}: {layout_words(rows, lanes)} from here on, the same batch"
        self._event(step, "oom", detail)
        self.job.log.warn("W-OOM", f"step {step}: {detail}; the run is marked exact: false")

    def _event(self, step: int, kind: str, detail: Any) -> None:
        self.events.write({"step": step, "kind": kind, "detail": detail})

    def _record_sample(self, prompt: str, text: str) -> None:
        self._event(self.state.step, "sample", {"prompt": prompt, "text": text})
        self.job.log.say(f"  sample at step {self.state.step}: {prompt!r} → {text[:100]!r}")

    def _save(self, *, wait: bool = False) -> None:
        """Rank 0 saves this step once, or all ranks together; without `wait` it is written while the next steps compute."""
        if self.engine.meets_others:
            self._save_together(wait=wait)
            return
        if not self.world.is_first:
            return
        with self._saving:
            began = time.perf_counter()
            if wait and self._saved_step == self.state.step:
                try:
                    self.store.finish()
                except CheckpointError:  # what failed in the background is tried again
                    self._saved_step = -1
            if self._saved_step != self.state.step:
                self.state.metrics_bytes = self.metrics.num_bytes()
                self.store.save(
                    self.state.step,
                    self.engine.state_dict(),
                    asdict(self.state),
                    metric=self.state.look_loss,
                    wait=wait,
                )
                self._saved_step = self.state.step
                self._event(self.state.step, "save", f"held up for {time.perf_counter() - began:.3f} s")
            self._saving_seconds += time.perf_counter() - began

    def _save_together(self, *, wait: bool) -> None:
        began = time.perf_counter()
        if self._saved_step != self.state.step:
            self.state.metrics_bytes = self.metrics.num_bytes()
            self._saved_step = self.state.step
            self.spread_store.save(asdict(self.state), owned_parts(self.engine), wait=wait)
            self._event(self.state.step, "save", f"held up for {time.perf_counter() - began:.3f} s")
        elif wait:
            self.spread_store.finish()
        self._saving_seconds += time.perf_counter() - began
