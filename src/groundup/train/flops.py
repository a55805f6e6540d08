"""Arithmetic of a training step as a function of shapes: what the model asks for, not what is computed again to save memory.

A trained weight costs 6 operations a token (2 forward, 2 for its input's gradient, 2 for its own), a frozen one 4.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from groundup.adapters.config import AdapterConfig
from groundup.model.config import ModelConfig
from groundup.train.weight_shapes import parameter_shapes, trained_shapes

TRAINED, FROZEN = 6, 4
PAIR = 12
"""Operations a query, key and number of a head: two products forward, four backward."""


@dataclass(frozen=True)
class StepFlops:
    """Operations by what they are counted in."""

    per_token: int
    """In the blocks' matrices; of the experts, those that a token is given to."""
    per_loss_token: int
    """In the head: only supervised tokens reach it."""
    per_pair: int
    """In attention, of all layers, for each pair of a query and a key that it sees."""

    def of(self, *, tokens: int, loss_tokens: int, pairs: int) -> int:
        """Those of a step."""
        return self.per_token * tokens + self.per_loss_token * loss_tokens + self.per_pair * pairs


def step_flops(shape: ModelConfig, adapter: AdapterConfig | None = None) -> StepFlops:
    """What training a model of this shape costs; with an adapter the model's own weights are frozen."""
    shapes = parameter_shapes(shape)
    own = FROZEN if adapter is not None else TRAINED
    per_token = own * sum(_active(name, size, shape) for name, size in shapes.items())
    if adapter is not None:
        per_token += TRAINED * sum(prod(size) for size in trained_shapes(shape, adapter).values() if len(size) > 1)
    head = prod(shapes["model.embed_tokens.weight"])
    heads = shape.num_attention_heads * shape.head_size
    return StepFlops(per_token, own * head, PAIR * heads * shape.num_hidden_layers)


def _active(name: str, size: tuple[int, ...], shape: ModelConfig) -> int:
    """Parameters of a block's matrix that one token is multiplied with."""
    if ".layers." not in name or len(size) < 2:
        return 0
    if len(size) == 3:
        assert shape.num_experts_per_tok is not None
        return prod(size[1:]) * shape.num_experts_per_tok
    return prod(size)


def attention_pairs(position_ids_BT: Tensor) -> int:
    """Pairs of a query and a key in its own document, up to itself: half the square of each document's length."""
    return int(position_ids_BT.sum()) + position_ids_BT.numel()
