"""Optimizer and schedule fields of the recipe's training sections."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from groundup.base.config import Config


class OptimConfig(Config):
    """How gradients become steps."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon takes the hidden matrices and leaves the rest to AdamW; adamw takes all."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of AdamW's parameters."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; embeddings, norms and biases get none. A step shrinks them by lr × weight_decay."""
    muon_weight_decay: NonNegativeFloat = 0.0
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warmup."""
    warmup_steps: NonNegativeInt | Literal["auto"] = "auto"
    """Steps of linear warmup; auto takes 2 % of all steps."""
    lr_floor: float = Field(0.1, ge=0, le=1)
    """The last step's share of the peak learning rate."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger norm are scaled down to it; None never clips."""
