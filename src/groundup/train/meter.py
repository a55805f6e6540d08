"""The throughput meter: tokens a second, and the share of the machine's matrix peak that the step's arithmetic reaches.

The peak is the rate of the fastest product of the step's own shapes in the step's dtype, measured once before the first
step. It is shown and written beside the timings; nothing of it enters the bits.
"""

import time
from collections.abc import Iterable, Iterator

import torch

from groundup.adapters.config import AdapterConfig
from groundup.data.rows import RowBatch
from groundup.model.config import ModelConfig
from groundup.model.loss import CHUNK_ELEMENTS
from groundup.train.config import TrainConfig
from groundup.train.flops import attention_pairs, step_flops
from groundup.train.resolve import Resolved, nominal_seconds

WORTH_AFTER_SECONDS = 30.0
"""Nominal length of a run from which its peak is measured."""
PEAK_SECONDS = 0.6
"""Longest that measuring takes, all products together."""
PROBE_FLOPS = 4e9
"""Operations of one product at most: a fifth of a second on a slow core."""
CUDA_PROBE_FLOPS = 4e12
"""Operations between two waits on a GPU: milliseconds, beside which starting and waiting are nothing."""


class Meter:
    """Counts the arithmetic of each step as its batch goes by."""

    def __init__(self, config: TrainConfig, shape: ModelConfig, resolved: Resolved) -> None:
        self._config, self._shape, self._resolved = config, shape, resolved
        adapter = config if isinstance(config, AdapterConfig) and config.adapter != "none" else None
        self._flops = step_flops(shape, adapter)
        self._step_flops = self._seen_flops = 0
        self._seen_seconds = 0.0
        self.peak: float | None = None
        """Operations a second of one rank; None where it is not known."""

    def find_peak(self, device: str) -> None:
        """Take the peak from the recipe, or measure it where the run is long enough."""
        asked = self._config.peak_flops
        if asked != "auto":
            self.peak = asked
            return
        resolved = self._resolved
        flops = self._flops.per_token * float(resolved.total_steps * self._config.batch_size_tokens)
        if nominal_seconds(flops, resolved.device, resolved.precision) >= WORTH_AFTER_SECONDS:
            tokens = resolved.micro_batch_rows * self._config.row_length
            self.peak = matrix_peak(self._shape, tokens=tokens, dtype=resolved.dtype, device=device)
            if resolved.device == "cuda":
                torch.cuda.reset_peak_memory_stats()

    def watched(self, batches: Iterable[RowBatch]) -> Iterator[RowBatch]:
        """The same batches, counted."""
        for batch in batches:
            self._step_flops = self._flops.of(
                tokens=batch.tokens_BT.numel(),
                loss_tokens=batch.num_loss_tokens,
                pairs=attention_pairs(batch.segments.position_ids_BT) if self.peak is not None else 0,
            )
            yield batch

    def share_of(self, seconds: float) -> dict[str, float]:
        """`peak_fraction` of the step that just ended; nothing where the peak is not known."""
        if self.peak is None:
            return {}
        self._seen_flops += self._step_flops
        self._seen_seconds += seconds
        return {"peak_fraction": self._share(self._step_flops, seconds)}

    def share(self) -> dict[str, float]:
        """`peak_fraction` of all steps of this process; nothing where there is none."""
        return {"peak_fraction": self._share(self._seen_flops, self._seen_seconds)} if self._seen_seconds else {}

    def words(self) -> str:
        """For the live line."""
        return "".join(f"  {100 * share:.0f} % of peak" for share in self.share().values())

    def _share(self, flops: int, seconds: float) -> float:
        assert self.peak is not None
        return flops / seconds / (self.peak * self._resolved.num_ranks)


@torch.no_grad()
def matrix_peak(shape: ModelConfig, *, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of the fastest product that a step of this shape has."""
    hidden, inner = shape.hidden_size, shape.expert_size if shape.num_experts else shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_size
    assert shape.vocab_size != "auto", "resolve the vocabulary first"
    sizes = {(hidden, inner), (inner, hidden), (queries, hidden), (hidden, queries), (hidden, shape.vocab_size)}
    chunk = max(1, CHUNK_ELEMENTS // shape.vocab_size)  # the head's product is made in such
    return max(
        _rate(
            min(tokens, chunk) if outputs == shape.vocab_size else tokens,
            inputs,
            outputs,
            dtype,
            device,
            PEAK_SECONDS / len(sizes),
        )
        for inputs, outputs in sorted(sizes)
    )


def _rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    """Best of as many groups of products as fit into the time; the first product warms up."""
    rows, count = _probe(tokens, 2 * inputs * outputs, device)
    left = torch.full((rows, inputs), 0.5, dtype=dtype, device=device)
    right = torch.full((outputs, inputs), 0.5, dtype=dtype, device=device)
    ends, best = time.perf_counter() + seconds, float("inf")
    torch.mm(left, right.t())
    while True:
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right.t())
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= ends:
            return 2.0 * count * rows * inputs * outputs / best


def _probe(tokens: int, flops_per_row: int, device: str) -> tuple[int, int]:
    """(rows of a product, products between two waits): a CPU's are small enough for a slow core, a GPU's long enough."""
    if device == "cpu":
        return max(64, min(tokens, int(PROBE_FLOPS / flops_per_row))), 1
    return tokens, max(1, int(CUDA_PROBE_FLOPS / (tokens * flops_per_row)))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
