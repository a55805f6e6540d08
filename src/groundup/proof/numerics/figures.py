"""What a proof gives back, and how far two computations lie apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groundup.data.rows import RowBatch
from groundup.model.causal_lm import CausalLM
from groundup.train.engine import TorchEngine

NEGLIGIBLE = 0.01
"""Of the largest tensor's norm: a gradient that should vanish is all rounding, and is measured against this."""


@dataclass(frozen=True)
class Figure:
    """What was measured, and the most it may be."""

    value: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.value <= self.tolerance  # a NaN does not


class Skip(Exception):
    """The proof cannot be made on this machine; says why."""


@dataclass(frozen=True)
class Outcome:
    """What a forward and backward pass gave."""

    losses: Tensor
    """Of tokens, or their sum."""
    gradients: Sequence[Tensor]

    def distance_to(self, reference: "Outcome") -> float:
        """The larger of the distance of the losses and that of the gradients."""
        return worst(
            distance([self.losses], [reference.losses]),
            distance(self.gradients, reference.gradients),
        )


def distance(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest ‖ours - reference‖ / ‖reference‖ of some tensors of one kind, in fp64; NaN where a value is one."""
    norms = [_norm(tensor) for tensor in reference]
    floor = NEGLIGIBLE * worst(*norms)
    return worst(
        *(
            _norm(one.double() - other.double()) / max(norm, floor)
            for one, other, norm in zip(ours, reference, norms, strict=True)
        )
    )


def worst(*values: float) -> float:
    """The largest; NaN where there is one."""
    return float(np.max(values))


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def num_unequal(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Elements that are not the same, of all tensors."""
    return float(sum(int((one != other).sum()) for one, other in zip(ours, reference, strict=True)))


def outcome_of(model: CausalLM, batch: RowBatch) -> Outcome:
    """Losses of the tokens (B, T); gradients of the objective for the input's embeddings (B, T, D), then every weight."""
    embedded: list[Tensor] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, __, x_BTD: embedded.append(x_BTD))
    try:
        sums = model(batch.tokens_BT, batch.segments, batch.labels_BT)
    finally:
        hook.remove()
    inputs = [*embedded, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(sums.loss_sum / max(1, batch.num_loss_tokens), inputs, materialize_grads=True)
    return Outcome(sums.per_token_BT, gradients)


def step_outcome(engine: TorchEngine, batch: RowBatch) -> Outcome:
    """Sums of the objective's terms and gradients of an engine's step, in the order of its weights."""
    sums = engine.forward_backward(batch, lambda row: row)
    masters = engine.masters.values()
    gradients = [torch.zeros_like(master) if master.grad is None else master.grad.clone() for master in masters]
    return Outcome(torch.stack([sums.nll_sum, *sums.extras.values()]), gradients)
