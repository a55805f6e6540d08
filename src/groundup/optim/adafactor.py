"""Adafactor: the second moment of a matrix as a row and a column (Shazeer & Stern, arXiv:1804.04235)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DECAY = -0.8
"""Exponent of the step in 1 - beta2."""
SMALLEST = torch.finfo(torch.float32).eps
LEAST_SCALE = 1e-3
"""What the root mean square of a tensor counts as at least: one that begins at zero moves too."""


def root_mean_square(x: Tensor) -> Tensor:
    """Of each matrix of a stack, of a whole vector; the dims stay, with size 1."""
    dims = tuple(range(-min(2, x.dim()), 0))
    return x.square().mean(dims, keepdim=True).sqrt()


class Adafactor(torch.optim.Optimizer):
    """Adafactor without momentum, for vectors, matrices and stacks of matrices.

    The rate is relative: an update is `lr` times the root mean square of the tensor it changes, and never more than
    1/sqrt(step) of it. The decay is decoupled. Nothing is read from the device.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            if gradient.dim() >= 2:
                state["row_var"] = gradient.new_zeros((*gradient.shape[:-1], 1))
                state["col_var"] = gradient.new_zeros((*gradient.shape[:-2], 1, gradient.shape[-1]))
            else:
                state["variance"] = torch.zeros_like(gradient)
        state["step"] += 1
        step = float(state["step"])
        size = root_mean_square(parameter).clamp(min=LEAST_SCALE) * min(lr, step**-0.5)
        parameter.mul_(1 - lr * weight_decay)
        squared = gradient.square()
        if gradient.dim() >= 2:
            row_var = state["row_var"].lerp_(squared.mean(-1, keepdim=True), step**DECAY)
            col_var = state["col_var"].lerp_(squared.mean(-2, keepdim=True), step**DECAY)
            variance = row_var @ col_var / row_var.mean(-2, keepdim=True).clamp(min=SMALLEST)
        else:
            variance = state["variance"].lerp_(squared, step**DECAY)
        update = gradient * variance.clamp(min=SMALLEST**2).rsqrt()
        parameter.sub_(update * (size / root_mean_square(update).clamp(min=1.0)))
