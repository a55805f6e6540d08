"""A look at held-out rows during training."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.data.rows import RowBatch, RowSource, read_batch
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import IGNORE_INDEX, LossSums


@torch.no_grad()
def validation_figures(
    model: CausalLM,
    source: RowSource,
    *,
    max_rows: int,
    micro_batch_rows: int,
    device: str,
    token_bytes: NDArray[np.integer] | None,
    poll: Callable[[], None] = lambda: None,
    losses: Callable[[RowBatch], LossSums] | None = None,
) -> dict[str, float]:
    """loss (nats a token) and perplexity over the first rows; bits_per_byte where the bytes of each id are known;
    repeat_loss and repeat_share of the tokens that could be looked up in their row (`repeats_BT`), and first_loss, what the same
    pairs cost where they stand for the first time, as often as they come again; where there are any.

    `losses` computes a batch where the model does not stand whole on one rank. `poll`, called before each
    micro-batch, raises to stop. Bits per byte count only tokens that stand for bytes: an end-of-text is none.
    """
    was_training = model.training
    model.eval()
    num_rows = min(max_rows, source.rows_per_epoch)
    loss_sum = byte_loss_sum = 0.0
    repeat_sum = first_sum = 0.0
    num_repeats = 0
    num_tokens = num_bytes = 0
    for begin in range(0, num_rows, micro_batch_rows):
        try:
            poll()
        except BaseException:
            model.train(was_training)
            raise
        batch = read_batch(source, begin, min(micro_batch_rows, num_rows - begin)).to(device)
        if losses is None:
            sums = model(batch.tokens_BT, batch.segments, batch.labels_BT)
        else:
            sums = losses(batch)
        loss_sum += float(sums.nll_sum)
        num_tokens += sums.num_tokens
        to_come_BT, is_repeat_BT = repeats_BT(batch)
        nats_BT = sums.per_token_BT.cpu().double().numpy()
        first_sum += float((nats_BT * to_come_BT).sum())
        repeat_sum += float(nats_BT[is_repeat_BT].sum())
        num_repeats += int(is_repeat_BT.sum())
        if token_bytes is not None:
            labels = batch.labels_BT.cpu().numpy()
            sizes = np.where(labels == IGNORE_INDEX, 0, token_bytes[np.maximum(labels, 0)])
            byte_loss_sum += float(nats_BT[sizes > 0].sum())
            num_bytes += int(sizes.sum())
    model.train(was_training)
    if num_tokens == 0:
        return {}
    loss = loss_sum / num_tokens
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if num_bytes:
        figures["bits_per_byte"] = byte_loss_sum / math.log(2) / num_bytes
    if num_repeats:
        figures |= {"repeat_loss": repeat_sum / num_repeats, "first_loss": first_sum / num_repeats}
        figures["repeat_share"] = num_repeats / num_tokens
    return figures


def repeats_BT(batch: RowBatch) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(to come, again), of supervised tokens by the pair with the token before them, in their document and row: where a pair
    stands first, how often it comes again; and whether it has stood before.

    A model that looks back has it for nothing when it comes again. The gap between both tells whether it has learned to,
    whatever such pairs are like (an induction head, Olsson et al. 2022, arXiv:2209.11895).
    """
    tokens_BT, labels_BT, starts_BT = (
        tensor.cpu().numpy() for tensor in (batch.tokens_BT, batch.labels_BT, batch.segments.starts_BT)
    )
    num_rows, row_length = tokens_BT.shape
    is_supervised_BT = labels_BT != IGNORE_INDEX
    no_label = 1 + int(max(tokens_BT.max(), labels_BT.max()))
    wanted_BT = np.where(is_supervised_BT, labels_BT, no_label)
    documents_BT = np.arange(num_rows)[:, None] * row_length + starts_BT
    pairs = ((documents_BT * (no_label + 1) + tokens_BT) * (no_label + 1) + wanted_BT).ravel()
    _, places, counts = np.unique(pairs, return_index=True, return_counts=True)
    to_come, is_again = np.zeros(pairs.size, dtype=np.int64), np.ones(pairs.size, dtype=np.bool_)
    to_come[places] = counts - 1
    is_again[places] = False
    return to_come.reshape(tokens_BT.shape) * is_supervised_BT, is_again.reshape(tokens_BT.shape) & is_supervised_BT


def look_at_all(model: CausalLM, sources: Mapping[str, RowSource], **options: Any) -> dict[str, dict[str, float]]:
    """`validation_figures` of each source; one without supervised tokens has none and is left out."""
    looks = {name: validation_figures(model, source, **options) for name, source in sources.items()}
    return {name: figures for name, figures in looks.items() if figures}


def weighted_loss(looks: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> float:
    """One loss of several validation sets; a set without a weight weighs 1."""
    weight_of = {name: weights.get(name, 1.0) for name in looks}
    return sum(weight_of[name] * figures["loss"] for name, figures in looks.items()) / sum(weight_of.values())
