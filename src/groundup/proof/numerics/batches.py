"""Proofs about the batch: micro-batches, lanes, packing, walls."""

import torch

from groundup.data.rows import RowBatch
from groundup.model.segments import Segments
from groundup.proof.numerics.figures import (
    Figure,
    Outcome,
    Skip,
    distance,
    num_unequal,
    outcome_of,
    step_outcome,
    worst,
)
from groundup.proof.numerics.subject import Subject, documents_of

EXPERTS = 1e-6
SUMS = 1e-5
"""Of sums that fp32 rounds in another order: unit roundoff 6e-8, some 100 roundings on a value's way."""


def micro_batches_add_up(subject: Subject) -> Figure:
    """Loss and gradients are the same with 8 rows at once, 4 at a time and one at a time."""
    return Figure(worst(*(_step_distance(subject, rows=rows) for rows in (4, 1))), SUMS)


def lanes_equal_one_lane(subject: Subject) -> Figure:
    """Micro-batches side by side give the loss and gradients of one after the other."""
    _needs_lanes(subject)
    return Figure(_step_distance(subject, rows=2, lanes=2), SUMS)


def lanes_repeat_their_bits(subject: Subject) -> Figure:
    """The same number of lanes gives the same bits again: no element of the gradients differs."""
    _needs_lanes(subject)
    one, again = (step_outcome(subject.engine(rows=1, lanes=2), subject.rows()) for _ in range(2))
    return Figure(num_unequal([one.losses, *one.gradients], [again.losses, *again.gradients]), 0)


def packed_equals_unpacked(subject: Subject) -> Figure:
    """Documents in one row give the losses and the summed gradients of each document alone.

    With experts: without the losses of their routers, which look at a row as a whole.
    """
    subject = subject.without_balance()
    model, batch = subject.model(), subject.rows(2)
    packed = outcome_of(model, batch)
    losses_BT = torch.zeros_like(packed.losses)
    gradients = [torch.zeros_like(gradient) for gradient in packed.gradients]
    for row, place in documents_of(batch):
        labels_BT = batch.labels_BT[row : row + 1, place]
        segments = Segments.whole_rows(1, labels_BT.shape[1], labels_BT.device)
        alone = outcome_of(
            model, RowBatch(batch.tokens_BT[row : row + 1, place], labels_BT, segments, batch.num_loss_tokens)
        )
        losses_BT[row, place] = alone.losses
        gradients[0][row, place] = alone.gradients[0]
        for total, gradient in zip(gradients[1:], alone.gradients[1:], strict=True):
            total += gradient
    return Figure(packed.distance_to(Outcome(losses_BT, gradients)), SUMS)


def documents_do_not_see_each_other(subject: Subject) -> Figure:
    """Other tokens in one document leave every other document's logits and input-embedding gradients as they were.

    With experts up to rounding: a product's last bits depend on how many tokens an expert has.
    """
    subject = subject.without_balance()
    model, batch = subject.model(), subject.rows(2)
    row, place = documents_of(batch)[1]
    others_BT = torch.ones_like(batch.tokens_BT, dtype=torch.bool)
    others_BT[row, place] = False
    changed_BT = torch.where(others_BT, batch.tokens_BT, (batch.tokens_BT + 1) % model.lm_head.weight.shape[0])
    results = []
    for tokens_BT in (batch.tokens_BT, changed_BT):
        now = RowBatch(tokens_BT, batch.labels_BT, batch.segments, batch.num_loss_tokens)
        with torch.no_grad():
            logits_BTV = model.logits(tokens_BT, batch.segments)
        results.append((logits_BTV, outcome_of(model, now).gradients[0]))
    (logits, gradients), (changed_logits, changed_gradients) = results
    assert not torch.equal(logits[~others_BT], changed_logits[~others_BT]), "the change changed nothing"
    return Figure(
        worst(
            distance([changed_logits[others_BT]], [logits[others_BT]]),
            distance([changed_gradients[others_BT]], [gradients[others_BT]]),
        ),
        EXPERTS if subject.has_experts else 0,
    )


def _needs_lanes(subject: Subject) -> None:
    if subject.device != "cpu":
        raise Skip("lanes are for CPUs")


def _step_distance(subject: Subject, *, rows: int, lanes: int = 1) -> float:
    """How far the loss and gradients of some rows at a time lie from those of all at once."""
    batch = subject.rows()
    in_parts = step_outcome(subject.engine(rows=rows, lanes=lanes), batch)
    return in_parts.distance_to(step_outcome(subject.engine(rows=len(batch)), batch))
