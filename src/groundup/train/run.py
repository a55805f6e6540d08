"""One training run from its first step or last checkpoint to its end: the same for pretraining, SFT and LoRA."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.base.errors import CheckpointError, Preempted
from groundup.base.log import Log
from groundup.base.machine import peak_memory_bytes
from groundup.base.seeding import derive_seed
from groundup.checkpoint.store import CheckpointStore
from groundup.data.loader import prefetched_batches
from groundup.data.rows import RowSource
from groundup.model.causal_lm import CausalLM
from groundup.optim.schedules import lr_multiplier
from groundup.train.config import TrainConfig
from groundup.train.duration import in_steps
from groundup.train.engine import TorchEngine
from groundup.train.guard import Guard
from groundup.train.loop import StepResult, training_steps
from groundup.train.records import JsonLines
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
        self.resolved = resolve_once(
            job.folder,
            job.config,
            rows_per_epoch=job.source.rows_per_epoch,
            matrix_parameters=matrix_parameters,
            has_dropout=has_dropout,
        )
        apply_threads(self.resolved)
        job.model.use_attention(self.resolved.attention)
        job.model.train()
        self.engine = TorchEngine(
            job.model,
            job.config,
            dtype=self.resolved.dtype,
            device=self.resolved.device,
            micro_batch_rows=self.resolved.micro_batch_rows,
            num_lanes=self.resolved.num_lanes,
        )
        if self.resolved.compile:
            for block in job.model.model.layers:
                block.compile()
        self.state = TrainingState()
        self.store = CheckpointStore(
            job.folder / "checkpoints",
            run_id=job.name,
            log=job.log,
            keep_last=job.config.keep_checkpoints,
        )
        # weights and, at most, two moments of each
        self.store.preflight(3 * sum(tensor.nbytes for tensor in self.engine.state_dict()["model"].values()))
        found = self.store.newest()
        if found is not None:
            self.state = TrainingState(**found.state)
            self.engine.load_state_dict({name: found.tensors(name) for name in ("model", "optimizer")})
        self.is_resumed = found is not None
        self.metrics = JsonLines(job.folder / "metrics.jsonl", keep_bytes=self.state.metrics_bytes)
        self.timing = JsonLines(job.folder / "timing.jsonl")
        self.events = JsonLines(job.folder / "events.jsonl")
        self._saved_step = self.state.step if found is not None else -1

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
        with _StopRequest() as stop, self.job.log.progress() as line, self._unbroken_write():
            for result in steps:
                self._count(result)
                self.state.elapsed_seconds = before + time.monotonic() - began
                is_last = result.step == total
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
                if stop.name and not is_last:
                    self._save(wait=True)
                    raise Preempted(
                        "E-PREEMPTED",
                        what=f"stopped by {stop.name} after step {result.step} of {total}; everything is saved",
                        next="run the same command again to go on",
                    )
        self._save(wait=True)
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
        looks = {
            name: validation_figures(
                self.job.model,
                source,
                max_rows=self.config.max_validation_rows,
                micro_batch_rows=self.resolved.micro_batch_rows,
                device=self.resolved.device,
                token_bytes=self.job.token_bytes,
            )
            for name, source in self.job.validation.items()
        }
        return {name: figures for name, figures in looks.items() if figures}

    def _sample(self) -> None:
        for prompt in self.config.sample_prompts:
            text = self.job.sample(self.job.model, prompt)
            self.events.write({"step": self.state.step, "kind": "sample", "detail": {"prompt": prompt, "text": text}})
            self.job.log.say(f"  sample at step {self.state.step}: {prompt!r} → {text[:100]!r}")

    def _save(self, *, wait: bool = False) -> None:
        if self._saved_step != self.state.step:
            self.state.metrics_bytes = self.metrics.num_bytes()
            self.store.save(self.state.step, self.engine.state_dict(), vars(self.state), wait=wait)
            self._saved_step = self.state.step
        elif wait:
            self.store.finish()

    @contextmanager
    def _unbroken_write(self) -> Iterator[None]:
        """Let the write at work come to its end before an error ends the run."""
        try:
            yield
        except Exception:
            with suppress(CheckpointError):
                self.store.finish()
            raise

    def _figures(self) -> dict[str, Any]:
        state = self.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "epochs": state.rows / self.job.source.rows_per_epoch,
            "num_loss_tokens": state.loss_tokens,
            "skipped_steps": state.skipped_steps,
            "seconds": state.elapsed_seconds,
            "tokens_per_second": state.tokens / max(state.elapsed_seconds, 1e-9),
            "precision": self.resolved.precision,
            "compiled": self.resolved.compile,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
