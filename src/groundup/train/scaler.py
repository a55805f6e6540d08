"""The loss scale of fp16: gradients below its smallest number are lifted into its range, and divided back in fp32."""

from collections.abc import Mapping

import torch
from torch import Tensor

from groundup.base.errors import NumericsError

FIRST_SCALE = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000
"""Steps without overflow after which a larger scale is tried."""
MIN_SCALE = 1.0
"""A smaller scale would push gradients out of fp16's range at its lower end instead."""
MAX_SCALE = 2.0**32


class LossScaler:
    """A scale that halves at an overflow and doubles after many steps without one (Micikevicius et al., arXiv:1710.03740).

    Powers of two only: scaling and its undoing are exact.
    """

    def __init__(self) -> None:
        self.scale = FIRST_SCALE
        self.good_steps = 0

    def grow(self) -> None:
        """After a step that was applied."""
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(MAX_SCALE, self.scale * GROWTH), 0

    def back_off(self) -> None:
        """After a step whose gradients left the range."""
        self.scale, self.good_steps = self.scale * BACKOFF, 0

    def refuse_overflow_at_minimum(self) -> None:
        """Raise NumericsError for an overflow that no smaller scale can mend."""
        if self.scale <= MIN_SCALE:
            raise NumericsError(
                "E-LOSS-SCALE",
                what=f"gradients overflow fp16 although the loss scale has come down to {self.scale:g}",
                next="the weights are as before that step and saved; use `precision: bf16`, or lower the learning rate",
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Scale and steps since it changed."""
        return {
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "good_steps": torch.tensor(self.good_steps, dtype=torch.int64),
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.scale, self.good_steps = float(tensors["scale"]), int(tensors["good_steps"])
