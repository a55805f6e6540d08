"""Muon: momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(update_NMK: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each of N matrices, by five quintic Newton-Schulz steps.

    Computed in bf16 on a GPU, in fp32 elsewhere (most CPUs multiply bf16 slower).
    """
    a, b, c = NEWTON_SCHULZ
    x_NMK = update_NMK.to(torch.bfloat16) if update_NMK.is_cuda else update_NMK.float()
    is_tall = x_NMK.shape[1] > x_NMK.shape[2]
    if is_tall:
        x_NMK = x_NMK.mT
    x_NMK = x_NMK / x_NMK.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram_NMM = x_NMK @ x_NMK.mT
        x_NMK = torch.baddbmm(x_NMK, torch.baddbmm(gram_NMM, gram_NMM, gram_NMM, beta=b, alpha=c), x_NMK, beta=a)
    return (x_NMK.mT if is_tall else x_NMK).to(update_NMK.dtype)


class Matrices:
    """How the whole of a matrix is had from a parameter that may be a rank's part of one; here each is whole."""

    def shape(self, parameter: Tensor) -> torch.Size:
        """Shape of the whole."""
        return parameter.shape

    def whole(self, parameter: Tensor, update: Tensor) -> Tensor:
        """The whole update, of this rank's part of it."""
        return update

    def part(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a whole."""
        return whole


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for 2-D matrices and stacks of them; equal shapes are orthogonalised in one batch.

    The learning rate is multiplied by sqrt(max(1, rows / columns)), as in the original. A batch is given to
    `map_parts` in `num_parts` parts: what several threads share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        num_parts: int = 1,
        map_parts: Callable[[Callable[[Tensor], Tensor], Iterable[Tensor]], Iterable[Tensor]] = map,
        matrices: Matrices | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._num_parts = num_parts
        self._map_parts = map_parts
        self._matrices = matrices or Matrices()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[self._matrices.shape(parameter)].append(parameter)
            for shape, parameters in by_shape.items():
                updates = [
                    self._matrices.whole(parameter, self._momentum_update(parameter, group["momentum"]))
                    for parameter in parameters
                ]
                matrices_NMK = torch.stack(updates).view(-1, *shape[-2:])
                scale = -group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                parts = list(self._map_parts(orthogonalize, matrices_NMK.chunk(self._num_parts)))
                directions = torch.cat(parts).view(len(parameters), *shape)
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(self._matrices.part(parameter, direction), alpha=scale)

    def _momentum_update(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        buffer: Tensor = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
