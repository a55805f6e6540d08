"""Perplexity and bits per byte of a text, window and stride stated."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from groundup.model.causal_lm import CausalLM
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments

TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class TextMeasure:
    """Sums over all texts; the end-of-text before a text is context, never counted."""

    nats: float
    num_tokens: int
    num_bytes: int
    num_texts: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.nats / self.num_tokens))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


Window = tuple[Sequence[int], int]
"""Ids of one forward pass and the number of its first predictions that an earlier window has counted."""


def windows_of(ids: Sequence[int], window: int, stride: int) -> Iterator[Window]:
    """Windows over ids that begin with an end-of-text: every id after the first is predicted in exactly one of them."""
    begin = counted = 0
    while counted < len(ids) - 1:
        end = min(begin + window, len(ids) - 1)
        yield ids[begin : end + 1], counted - begin
        counted = end
        begin += stride


@torch.no_grad()
def measure_texts(
    model: CausalLM, texts: Iterable[tuple[Sequence[int], int]], *, window: int, stride: int
) -> TextMeasure:
    """Negative log-likelihood of texts, each given as (ids with a leading end-of-text, UTF-8 bytes)."""
    model.eval()
    device = model.lm_head.weight.device
    nats, num_tokens, num_bytes, num_texts = 0.0, 0, 0, 0
    pending: list[Window] = []

    def flush() -> None:
        nonlocal nats, num_tokens
        longest = max(len(ids) for ids, _ in pending) - 1
        tokens_BT = torch.zeros(len(pending), longest, dtype=torch.int64)
        labels_BT = torch.full((len(pending), longest), IGNORE_INDEX)
        for row, (ids, seen) in enumerate(pending):
            whole = torch.tensor(ids, dtype=torch.int64)
            tokens_BT[row, : len(ids) - 1] = whole[:-1]
            labels_BT[row, seen : len(ids) - 1] = whole[seen + 1 :]
        sums = model(tokens_BT.to(device), Segments.whole_rows(len(pending), longest, device), labels_BT.to(device))
        nats += float(sums.nll_sum)
        num_tokens += sums.num_tokens
        pending.clear()

    for ids, size in texts:
        num_bytes += size
        num_texts += 1
        for piece in windows_of(ids, window, stride):
            pending.append(piece)
            if len(pending) * window >= TOKENS_A_BATCH:
                flush()
    if pending:
        flush()
    return TextMeasure(nats, num_tokens, num_bytes, num_texts)
