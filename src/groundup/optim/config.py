"""Optimizer and schedule fields of the recipe's training sections."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from groundup.base.config import Config
from groundup.base.duration import parse

_SHARE = re.compile(r"\s*([0-9]+\.?[0-9]*)\s*%\s*")


def parse_warmup(text: str) -> tuple[float, str]:
    """(number, unit) of a share such as `2 %`, or of a length, which may be 0. Raises ValueError."""
    share = _SHARE.fullmatch(text)
    if share is None:
        return parse(text, may_be_zero=True)
    if not 0 <= float(share.group(1)) <= 100:
        raise ValueError("a share is between 0 % and 100 %")
    return float(share.group(1)), "%"


def _check_warmup(value: Any) -> Any:
    if isinstance(value, str):
        parse_warmup(value)
        return value
    raise ValueError("a warmup is a share such as '2 %', or a length such as '200 steps' or '1e6 tokens'")


Warmup = Annotated[str, BeforeValidator(_check_warmup)]
"""A text such as `2 %`, `200 steps` or `1e6 tokens`."""
Share = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Config):
    """How gradients become steps."""

    optimizer: Literal["muon", "adamw", "adamw_8bit", "adafactor", "sgd"] = "muon"
    """muon takes the hidden matrices and leaves the rest (embeddings, head, routers, norms, biases) to AdamW. The others
    take all: adamw, adamw_8bit with a quarter of its state, adafactor with next to none, sgd to teach with."""
    adamw_8bit_maker: Literal["auto", "torchao", "bitsandbytes"] = "auto"
    """Whose 8-bit AdamW; auto takes bitsandbytes where it is installed."""
    lr: PositiveFloat | Literal["auto"] = 3e-3
    """Peak learning rate; under muon, that of AdamW's parameters. adafactor's is relative to the size of each tensor.
    auto takes 0.036 × sqrt(batch tokens / parameters), under muon a third of muon_lr."""
    muon_lr: PositiveFloat | Literal["auto"] = 0.02
    """Peak learning rate of Muon's matrices; auto takes 0.0154 × sqrt(batch tokens) / parameters^(1/4)."""
    embedding_lr: PositiveFloat | None = None
    """Peak learning rate of embeddings and head; None takes lr."""
    vector_lr: PositiveFloat | None = None
    """Peak learning rate of norms and biases; None takes lr."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Shares of the running means of gradient and squared gradient that AdamW keeps at each step."""
    eps: PositiveFloat = 1e-8
    """What AdamW adds to the root of the squared gradient's mean."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices: a step shrinks them by lr × weight_decay. sgd adds it to the gradient instead."""
    decay_embeddings: bool = False
    """Whether embeddings and head decay too."""
    decay_vectors: bool = False
    """Whether norms and biases decay too."""
    muon_weight_decay: NonNegativeFloat | Literal["auto"] = 0.0
    """Decay of Muon's matrices: a step shrinks them by muon_lr × muon_weight_decay. auto, for a new model, takes
    4 / (muon_lr × steps of the run), of 40 at least."""
    muon_momentum: Share = 0.95
    """Share of the running mean of gradients that Muon keeps at each step."""
    sgd_momentum: Share = 0.9
    """Share of the running sum of gradients that sgd keeps at each step; 0 keeps none."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after warmup. wsd (warmup, stable, decay) stays at the peak and decays at the end: a
    longer duration continues the stable part. inverse_sqrt falls with the root of the steps, whatever the duration."""
    warmup: Warmup = "2 %"
    """Linear warmup: a share of the run such as `2 %`, or a length such as `200 steps` or `1e6 tokens`."""
    lr_floor: float = Field(0.1, ge=0, le=1)
    """The last step's share of the peak learning rate; inverse_sqrt never falls below it, constant has none."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the run in which wsd decays."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """How wsd decays; sqrt is 1 - sqrt(progress) (arXiv:2405.18392)."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger norm are scaled down to it; None never clips."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a moving average of the weights, such as 0.999 of itself at each step: validation, samples and the final model
    use the average; training goes on with the weights. None keeps none."""

    @model_validator(mode="after")
    def _has_a_law(self) -> Self:
        if self.lr == "auto" and self.optimizer in ("adafactor", "sgd"):
            raise ValueError(f"lr: auto knows muon, adamw and adamw_8bit; give a number for {self.optimizer}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _take_warmup_steps(cls, values: Any) -> Any:
        """`warmup_steps`, as the field was called when it knew steps alone, is a warmup of so many steps."""
        if not isinstance(values, dict) or "warmup_steps" not in values or "warmup" in values:
            return values
        steps = values["warmup_steps"]
        rest = {name: value for name, value in values.items() if name != "warmup_steps"}
        return rest | {"warmup": "2 %" if steps == "auto" else f"{steps} steps"}
