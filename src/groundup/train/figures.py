"""Figures of a run at work and at its end."""

from typing import Any

import torch

from groundup.base.machine import peak_memory_bytes
from groundup.train.loop import StepResult
from groundup.train.meter import Meter
from groundup.train.resolve import Resolved
from groundup.train.state import TrainingState


def scaling_figures(state: TrainingState, loss_scale: float | None) -> dict[str, Any]:
    """What fp16's scaler did; nothing in other dtypes."""
    return {} if loss_scale is None else {"loss_scale": loss_scale, "overflow_steps": state.overflow_steps}


def memory_figures(device: str) -> dict[str, int]:
    """Largest size of the process so far, and what it held of a CUDA device."""
    figures = {"peak_memory_bytes": peak_memory_bytes()}
    return figures | {"peak_cuda_memory_bytes": torch.cuda.max_memory_reserved()} if device == "cuda" else figures


def step_timing(
    result: StepResult,
    meter: Meter,
    *,
    batch_size_tokens: int,
    elapsed_seconds: float,
    save_seconds: float,
    device: str,
) -> dict[str, Any]:
    """A line of timing.jsonl."""
    seconds = result.data_seconds + result.forward_backward_seconds + result.optimizer_seconds
    return {
        "step": result.step,
        "elapsed_seconds": elapsed_seconds,
        "tokens_per_second": batch_size_tokens / seconds,
        **meter.share_of(seconds),
        **memory_figures(device),
        "data_seconds": result.data_seconds,
        "forward_backward_seconds": result.forward_backward_seconds,
        "optimizer_seconds": result.optimizer_seconds,
        "save_seconds": save_seconds,
    }


def progress_line(
    name: str, result: StepResult, total: int, looks: str, rate: float, left: float, meter: Meter, save_every: int
) -> str:
    """What stands in the live line: `rate` in tokens a second, `left` in seconds, `save_every` in steps, 0 for never."""
    lr = f"  lr {next(iter(result.lr.values())):.2g}" if result.lr else ""  # a step that was passed over has none
    save = min(total, result.step - result.step % save_every + save_every) if save_every else total
    return (
        f"{name}  step {result.step}/{total}  loss {result.sums.loss:.3f}{looks}{lr}  {rate:,.0f} tokens/s{meter.words()}  "
        f"{int(left) // 60}:{int(left) % 60:02d} left  saves at {save}"
    )


def final_figures(
    state: TrainingState,
    resolved: Resolved,
    meter: Meter,
    *,
    rows_per_epoch: int,
    num_ranks: int,
    loss_scale: float | None,
) -> dict[str, Any]:
    """What a run's summary says about its training."""
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": state.rows / rows_per_epoch,
        "num_loss_tokens": state.loss_tokens,
        "skipped_steps": state.skipped_steps,
        "rewinds": state.rewinds,
        "ranks": num_ranks,
        "exact": state.is_exact,
        "seconds": state.elapsed_seconds,
        "tokens_per_second": state.tokens / max(state.elapsed_seconds, 1e-9),
        **meter.share(),
        "precision": resolved.precision,
        "compiled": resolved.compile,
        **scaling_figures(state, loss_scale),
        **memory_figures(resolved.device),
    }


def ranks_in_words(num_ranks: int, mesh: str) -> str:
    """So many ranks, and how they share the model where they do."""
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''}{f' ({mesh})' if mesh else ''}"
