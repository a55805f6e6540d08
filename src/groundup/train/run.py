"""One training run from its first step or last checkpoint to its end: the same for pretraining, SFT and LoRA."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.base.errors import Preempted
from groundup.base.failpoints import reach
from groundup.base.log import Log
from groundup.base.machine import peak_memory_bytes
from groundup.base.seeding import derive_seed
from groundup.checkpoint.store import Checkpoint, newest_checkpoint, retain, save_checkpoint
from groundup.data.loader import prefetched_batches
from groundup.data.rows import RowSource
from groundup.model.causal_lm import CausalLM
from groundup.optim.schedules import lr_multiplier
from groundup.parallel.checks import refuse_divergence
from groundup.parallel.world import World
from groundup.train.config import TrainConfig
from groundup.train.duration import in_steps
from groundup.train.engine import TorchEngine
from groundup.train.guard import Guard
from groundup.train.loop import StepResult, training_steps
from groundup.train.records import JsonLines, NoLines
from groundup.train.resolve import Resolved, apply_threads, resolve_once
from groundup.train.validation import validation_figures


@dataclass(frozen=True)
class TrainingJob:
    """Everything a run needs from its stage."""

    name: str
    config: TrainConfig
    seed: int
    model: CausalLM
    source: RowSource
    validation: Mapping[str, RowSource]
    folder: Path
    log: Log
    name_documents: Callable[[int], str]
    """Documents of a step's batch, in words, for the guard."""
    sample: Callable[[CausalLM, str], str]
    """Continues a prompt."""
    token_bytes: NDArray[np.integer[Any]] | None = None
    """Bytes each id stands for; None where that is not defined."""
    world: World = field(default_factory=World)
    """The ranks that run this job together; rank 0 alone writes, looks and samples."""
    compare_every: int = 100
    """Steps from one comparison of the ranks' weights to the next."""


@dataclass
class TrainingState:
    """All that changes in a run beside weights and optimizer; saved whole, nothing else is remembered."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    skipped_steps: int = 0
    elapsed_seconds: float = 0.0
    metrics_bytes: int = 0
    num_ranks: int = 1
    is_exact: bool = True
    """Whether an unbroken run gives the same bits: not if the number of ranks changed on the way."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The end of a run."""

    weights: dict[str, Tensor]
    """Trained tensors by name, fp32."""
    resolved: Resolved
    figures: dict[str, Any] = field(default_factory=dict)


class _StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a wish to stop after the step; a second SIGINT stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class TrainingRun:
    """A job at work: engine, state, records. `run` takes it to its end."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.config = job, job.config
        matrix_parameters = sum(p.numel() for p in job.model.parameters() if p.dim() >= 2)
        has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in job.model.modules())
        self.world = job.world
        self.resolved = self._resolve(matrix_parameters, has_dropout)
        apply_threads(self.resolved)
        job.model.use_attention(self.resolved.attention)
        job.model.train()
        self.engine = TorchEngine(
            job.model,
            job.config,
            dtype=self.resolved.dtype,
            device=self._device,
            micro_batch_rows=self.resolved.micro_batch_rows,
            num_lanes=self.resolved.num_lanes,
            world=self.world,
        )
        if self.resolved.compile:
            for block in job.model.model.layers:
                block.compile()
        self.state = TrainingState(num_ranks=self.world.size)
        self.checkpoints = job.folder / "checkpoints"
        found = self._find_checkpoint()
        if found is not None:
            self.state = TrainingState(**found.state)
            self.engine.load_state_dict({name: found.tensors(name) for name in ("model", "optimizer")})
        self.is_resumed = found is not None
        self.metrics = self._records("metrics.jsonl", keep_bytes=self.state.metrics_bytes)
        self.timing = self._records("timing.jsonl")
        self.events = self._records("events.jsonl")
        self._saved_step = self.state.step if found is not None else -1

    @property
    def _device(self) -> str:
        is_one_of_many = self.resolved.device == "cuda" and self.world.size > 1
        return f"cuda:{self.world.local_rank}" if is_one_of_many else self.resolved.device

    def _resolve(self, matrix_parameters: int, has_dropout: bool) -> Resolved:
        """Rank 0 resolves for all: no rank's machine may decide otherwise."""
        resolved = None
        if self.world.is_first:
            resolved = resolve_once(
                self.job.folder,
                self.config,
                rows_per_epoch=self.job.source.rows_per_epoch,
                matrix_parameters=matrix_parameters,
                has_dropout=has_dropout,
                world=self.world,
            )
        return Resolved(**self.world.broadcast(resolved and asdict(resolved)))

    def _find_checkpoint(self) -> Checkpoint | None:
        """Rank 0 looks for the newest that is whole; all load that one."""
        found = newest_checkpoint(self.checkpoints, self.job.log) if self.world.is_first else None
        if self.world.size == 1:
            return found
        values = self.world.broadcast(found and [found.step, str(found.folder), dict(found.state)])
        return Checkpoint(values[0], Path(values[1]), values[2]) if values else None

    def _records(self, name: str, *, keep_bytes: int | None = None) -> JsonLines:
        return JsonLines(self.job.folder / name, keep_bytes=keep_bytes) if self.world.is_first else NoLines()

    def _note_world(self) -> None:
        before = self.state.num_ranks
        if before == self.world.size or self.state.step == self.resolved.total_steps:
            return
        self.state.num_ranks, self.state.is_exact = self.world.size, False
        detail = f"{before} → {self.world.size} ranks: the order of the data stays, the last bits do not"
        self.events.write({"step": self.state.step, "kind": "world", "detail": detail})
        self.job.log.say(f"  {detail}")

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
        total = self.resolved.total_steps
        intervals = {
            name: self._steps_of(getattr(self.config, name))
            for name in ("validate_every", "sample_every", "log_every", "checkpoint_every")
        }
        if self.is_resumed:
            self.events.write({"step": self.state.step, "kind": "resume", "detail": "from its last checkpoint"})
            self.job.log.say(f"  goes on from step {self.state.step} of {total}")
            self._note_world()
        refuse_divergence(self.world, self.state.step, self.engine.masters)
        self.world.report(self.state.step)
        batches = prefetched_batches(
            self.job.source, batch_rows=self.resolved.batch_rows, first_step=self.state.step, last_step=total
        )
        steps = training_steps(
            self.engine,
            batches,
            lambda step: lr_multiplier(step, self.config, total),
            Guard(self.job.log, self.job.name_documents),
            start_step=self.state.step,
            seed_of=lambda step, row: derive_seed(self.job.seed, self.job.name, "dropout", step, row),
        )
        began, before = time.monotonic(), self.state.elapsed_seconds
        first_step, validation_text = self.state.step, ""
        with _StopRequest() as stop, self.job.log.progress() as line:
            for result in steps:
                self._count(result)
                self.world.report(result.step)
                self.state.elapsed_seconds = before + time.monotonic() - began
                is_last = result.step == total
                is_saved = is_last or _is_due(result.step, intervals["checkpoint_every"])
                if is_saved or _is_due(result.step, self.job.compare_every):
                    refuse_divergence(self.world, result.step, self.engine.masters)
                looks = self._validate() if is_last or _is_due(result.step, intervals["validate_every"]) else None
                self._record(result, looks)
                if looks:
                    validation_text = "".join(f"  val {figures['loss']:.3f}" for figures in looks.values())
                if is_last or _is_due(result.step, intervals["sample_every"]):
                    self._sample()
                if _is_due(result.step, intervals["checkpoint_every"]):
                    self._save()
                rate = (result.step - first_step) * self.config.batch_size_tokens / (time.monotonic() - began)
                left = (total - result.step) * self.config.batch_size_tokens / rate
                text = (
                    f"{self.job.name}  step {result.step}/{total}  loss {result.sums.loss:.3f}{validation_text}  "
                    f"{rate:,.0f} tokens/s  {int(left) // 60}:{int(left) % 60:02d} left"
                )
                line.update(text)
                if _is_due(result.step, intervals["log_every"]):
                    self.job.log.say(f"  {text}")
                # every rank ends after the same step, whichever was told first
                if self.world.any(bool(stop.name)) and not is_last:
                    self._save()
                    self.world.barrier()
                    raise Preempted(
                        "E-PREEMPTED",
                        what=f"stopped by {stop.name or 'a signal to another rank'} after step {result.step} of {total}; everything is saved",
                        next="run the same command again to go on",
                    )
        self._save()
        return TrainingOutcome(self.engine.state_dict()["model"], self.resolved, self._figures())

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step = result.step
        state.rows = result.step * self.resolved.batch_rows
        state.tokens = result.step * self.config.batch_size_tokens
        state.loss_tokens += result.sums.num_loss_tokens
        state.skipped_steps += int(result.is_skipped)

    def _record(self, result: StepResult, looks: dict[str, dict[str, float]] | None) -> None:
        state = self.state
        values: dict[str, Any] = {
            "step": result.step,
            "tokens": state.tokens,
            "rows": state.rows,
            "epoch": state.rows / self.job.source.rows_per_epoch,
            "loss": None if result.is_skipped else result.sums.loss,
            "num_loss_tokens": result.sums.num_loss_tokens,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "skipped_steps": state.skipped_steps,
        }
        if looks:
            values["val"] = looks
        self.metrics.write(values)
        seconds = result.data_seconds + result.forward_backward_seconds + result.optimizer_seconds
        self.timing.write(
            {
                "step": result.step,
                "elapsed_seconds": state.elapsed_seconds,
                "tokens_per_second": self.config.batch_size_tokens / seconds,
                "peak_memory_bytes": peak_memory_bytes(),
                "data_seconds": result.data_seconds,
                "forward_backward_seconds": result.forward_backward_seconds,
                "optimizer_seconds": result.optimizer_seconds,
            }
        )

    def _validate(self) -> dict[str, dict[str, float]]:
        if not self.world.is_first:
            return {}
        reach("run.validate")
        looks = {
            name: validation_figures(
                self.job.model,
                source,
                max_rows=self.config.max_validation_rows,
                micro_batch_rows=self.resolved.micro_batch_rows,
                device=self._device,
                token_bytes=self.job.token_bytes,
            )
            for name, source in self.job.validation.items()
        }
        return {name: figures for name, figures in looks.items() if figures}

    def _sample(self) -> None:
        for prompt in self.config.sample_prompts if self.world.is_first else ():
            text = self.job.sample(self.job.model, prompt)
            self.events.write({"step": self.state.step, "kind": "sample", "detail": {"prompt": prompt, "text": text}})
            self.job.log.say(f"  sample at step {self.state.step}: {prompt!r} → {text[:100]!r}")

    def _save(self) -> None:
        if self._saved_step == self.state.step or not self.world.is_first:
            return
        self.state.metrics_bytes = self.metrics.num_bytes()
        save_checkpoint(self.checkpoints, self.state.step, self.engine.state_dict(), vars(self.state))
        retain(self.checkpoints, self.config.keep_checkpoints)
        self._saved_step = self.state.step

    def _figures(self) -> dict[str, Any]:
        state = self.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "epochs": state.rows / self.job.source.rows_per_epoch,
            "num_loss_tokens": state.loss_tokens,
            "skipped_steps": state.skipped_steps,
            "ranks": self.world.size,
            "exact": state.is_exact,
            "seconds": state.elapsed_seconds,
            "tokens_per_second": state.tokens / max(state.elapsed_seconds, 1e-9),
            "precision": self.resolved.precision,
            "compiled": self.resolved.compile,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
