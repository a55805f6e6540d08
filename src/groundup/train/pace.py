"""What this machine does with a shape, measured: the time of a few real steps on random tokens, and the memory that the
stack takes for itself."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import inject_lora
from groundup.adapters.quantised import quantise_linears
from groundup.base.machine import resident_bytes
from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.segments import Segments
from groundup.train.config import TrainConfig
from groundup.train.engine import TorchEngine
from groundup.train.prepare import prepare
from groundup.train.resolve import apply_threads, resolve

WARM_STEPS, TIMED_STEPS = 1, 3
TIMED_SECONDS, MOST_TIMED_STEPS = 2.0, 60
"""Short steps are timed for so long, so that one that another process held up does not decide."""
SMALLEST = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": None},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": None, "max_window_layers": 0},
    **{"sliding_window": None},
}
"""What becomes of a shape whose process holds little but the stack itself."""


@dataclass(frozen=True)
class Pace:
    """Medians."""

    step_seconds: float
    """Of an optimizer step."""
    look_seconds: float
    """Of a forward pass over one row, as a look at held-out rows takes it."""


def seconds_a_step(shape: ModelConfig, config: TrainConfig) -> float:
    """Median seconds of an optimizer step, nothing compiled. Raises DoesNotFit where the memory does not hold it."""
    return measure_pace(shape, config).step_seconds


def measure_pace(shape: ModelConfig, config: TrainConfig, *, clock: Callable[[], float] = time.perf_counter) -> Pace:
    """Train a few steps from random weights, with the section's adapter where it has one; nothing is compiled.

    Raises DoesNotFit where the memory does not hold it.
    """
    engine, batch = _ready(shape, config)
    seconds: list[float] = []
    while len(seconds) < WARM_STEPS + TIMED_STEPS or (
        sum(seconds[WARM_STEPS:]) < TIMED_SECONDS and len(seconds) < MOST_TIMED_STEPS
    ):
        began = clock()
        _step(engine, batch)
        seconds.append(clock() - began)
    rows = batch.slice(0, engine.micro_batch_rows).to(engine.device)
    looks: list[float] = []
    engine.model.eval()
    for _ in range(WARM_STEPS + TIMED_STEPS):
        began = clock()
        with torch.no_grad():
            float(engine.model(rows.tokens_BT, rows.segments, rows.labels_BT).nll_sum)  # waits for the device
        looks.append((clock() - began) / len(rows))
    return Pace(statistics.median(seconds[WARM_STEPS:]), statistics.median(looks[WARM_STEPS:]))


def stack_bytes(shape: ModelConfig, config: TrainConfig) -> int:
    """Resident bytes of this process once it has trained the smallest model of a kind as the section says.

    Much of a stack is loaded by the first step alone.
    """
    smallest = shape.model_copy(update=SMALLEST)
    few = config.model_copy(update={"batch_size_tokens": 2 * config.row_length, "micro_batch_rows": 1})
    engine, batch = _ready(smallest, few)
    _step(engine, batch)
    return resident_bytes()


def _ready(shape: ModelConfig, config: TrainConfig) -> tuple[TorchEngine, RowBatch]:
    """An engine and a batch of random tokens, every one supervised."""
    assert shape.vocab_size != "auto", "resolve the vocabulary first"
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    adapter = config if isinstance(config, AdapterConfig) and config.adapter != "none" else None
    if adapter is not None:
        if adapter.adapter == "qlora":
            quantise_linears(model, adapter.nf4_maker)
        inject_lora(model, adapter, seed=0)
    model.use_dropout(config.dropout)
    eager = config.model_copy(update={"compile": False})
    parameters = model.num_active_parameters(min_dims=2)
    resolved = resolve(
        eager, rows_per_epoch=1, matrix_parameters=parameters, has_dropout=model.has_dropout, shape=shape
    )
    settled = resolved.settle(eager)
    apply_threads(resolved)
    prepare(model, settled, resolved)
    engine = TorchEngine(
        model,
        settled,
        dtype=resolved.dtype,
        device=resolved.device,
        micro_batch_rows=resolved.micro_batch_rows,
        num_lanes=resolved.num_lanes,
    )
    size = (resolved.batch_rows, config.row_length)
    tokens_BT = torch.randint(0, shape.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return engine, RowBatch(tokens_BT, tokens_BT, Segments.whole_rows(*size), tokens_BT.numel())


def _step(engine: TorchEngine, batch: RowBatch) -> None:
    engine.forward_backward(batch, lambda row: row)
    engine.gradient_norm()  # waits for the device
    engine.optimizer_step(0.0)
