"""How evenly a router spreads its tokens: losses that even it out, and the load that is counted.

All is taken over the tokens that count: those of documents with something to learn in the row, so not padding. A row's
balance weighs as much as it has supervised tokens. So rows, micro-batches and ranks add up like the main loss, and
a row without supervised tokens, which a run may pass over, weighs nothing.

Where only a part of each row is at hand, its counts are added up over the rows by a `RowSum`; probabilities are not, as
the losses are linear in them: those of the parts add up to that of the whole, gradients too.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.loss import IGNORE_INDEX
from groundup.model.moe import Routing
from groundup.model.segments import Segments

LOAD_BALANCE, ROUTER_Z = "load_balance", "router_z"
RowSum = Callable[[Tensor], Tensor]
"""Of counts of a part of each row: those of the whole rows."""


def rows_are_whole(counts: Tensor) -> Tensor:
    """The sum over whole rows where they are at hand."""
    return counts


def counted_tokens(labels_BT: Tensor, segments: Segments, add_up: RowSum = rows_are_whole) -> Tensor:
    """1 at the tokens (B, T) of documents with a supervised token in the row, 0 elsewhere; fp32."""
    is_supervised_BT, starts_BT = (labels_BT != IGNORE_INDEX).float(), segments.of_queries(segments.starts_BT)
    by_start_BT = torch.zeros_like(segments.starts_BT, dtype=torch.float32)
    by_start_BT = add_up(by_start_BT.scatter_add_(1, starts_BT, is_supervised_BT))
    return (by_start_BT.gather(1, starts_BT) > 0).float()


def _given(routing: Routing, counted_BT: Tensor) -> Tensor:
    """1 where a counted token (B, T) was given to an expert (E)."""
    given_BTE = torch.zeros_like(routing.logits_BTE, requires_grad=False)
    return given_BTE.scatter_(-1, routing.chosen_BTA, 1.0) * counted_BT.unsqueeze(-1)


def probabilities(logits_BTE: Tensor, config: ModelConfig) -> Tensor:
    """Share of each expert in a token's scores; sums to 1 over the experts."""
    if config.has_router_bias:
        scores_BTE = logits_BTE.sigmoid()
        return scores_BTE / scores_BTE.sum(-1, keepdim=True)
    return logits_BTE.softmax(-1)


def expert_load(routings: Sequence[Routing], counted_BT: Tensor) -> Tensor:
    """Counted tokens that each expert of each layer was given, (L, E); detached."""
    with torch.no_grad():
        return torch.stack([_given(routing, counted_BT).sum((0, 1)) for routing in routings])


def load_balance(
    routings: Sequence[Routing],
    counted_BT: Tensor,
    weight_B: Tensor,
    config: ModelConfig,
    add_up: RowSum = rows_are_whole,
) -> Tensor:
    """Load-balancing loss of all rows: E × sum over experts of (share of tokens × mean probability), times the row's
    weight, summed. The mean over layers; with the scope `batch`, shares and means over all rows and layers together.
    """
    if config.router_aux_loss_scope == "batch":
        num_counted = (add_up(counted_BT.sum()) * len(routings)).clamp(min=1)
        share_E = add_up(expert_load(routings, counted_BT).sum(0)) / num_counted
        logits_LBTE = torch.stack([routing.logits_BTE for routing in routings])
        mean_E = (probabilities(logits_LBTE, config) * counted_BT.unsqueeze(-1)).sum((0, 1, 2)) / num_counted
        return len(mean_E) * (share_E * mean_E).sum() * weight_B.sum()
    num_counted_B1 = add_up(counted_BT.sum(1, keepdim=True)).clamp(min=1)
    given_LBE = add_up(torch.stack([_given(routing, counted_BT).sum(1) for routing in routings]))
    total = weight_B.new_zeros(())
    for routing, given_BE in zip(routings, given_LBE, strict=True):
        share_BE = given_BE / num_counted_B1
        mean_BE = (probabilities(routing.logits_BTE, config) * counted_BT.unsqueeze(-1)).sum(1) / num_counted_B1
        total = total + ((share_BE * mean_BE).sum(1) * share_BE.shape[1] * weight_B).sum()
    return total / len(routings)


def router_z(
    routings: Sequence[Routing], counted_BT: Tensor, weight_B: Tensor, add_up: RowSum = rows_are_whole
) -> Tensor:
    """Squared log-sum-exp of the router's logits: its mean over the row's tokens and over layers, times the row's
    weight, summed."""
    num_counted_B = add_up(counted_BT.sum(1)).clamp(min=1)
    total = weight_B.new_zeros(())
    for routing in routings:
        squares_BT = routing.logits_BTE.logsumexp(-1).square() * counted_BT
        total = total + (squares_BT.sum(1) / num_counted_B * weight_B).sum()
    return total / len(routings)
