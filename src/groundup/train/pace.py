"""How fast this machine trains a shape: a few steps on random tokens, timed."""

import statistics
import time

import torch

from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.model.segments import Segments
from groundup.train.config import TrainConfig
from groundup.train.engine import TorchEngine
from groundup.train.prepare import prepare
from groundup.train.resolve import apply_threads, resolve

WARM_STEPS, TIMED_STEPS = 1, 3


def seconds_a_step(shape: ModelConfig, config: TrainConfig) -> float:
    """Median seconds of an optimizer step, nothing compiled. Raises DoesNotFit where the memory does not hold it."""
    assert shape.vocab_size != "auto", "resolve the vocabulary first"
    model = CausalLM(shape)
    model.initialize(torch.Generator().manual_seed(0))
    eager = config.model_copy(update={"compile": False})
    parameters = model.num_active_parameters(min_dims=2)
    resolved = resolve(eager, rows_per_epoch=1, matrix_parameters=parameters, shape=shape)
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
    batch = RowBatch(tokens_BT, tokens_BT, Segments.whole_rows(*size), tokens_BT.numel())
    seconds = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        engine.forward_backward(batch, lambda row: row)
        engine.gradient_norm()  # waits for the device
        engine.optimizer_step(0.0)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_STEPS:])
