"""An exponential moving average of the weights, and a model that computes with it for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NUM_UPDATES = "num_updates"
"""Name of the count among the saved tensors; no parameter has a name without a dot."""


class WeightAverage:
    """Averages of weights in fp32, by name (Polyak & Juditsky 1992).

    After n updates an average keeps min(decay, (1 + n) / (10 + n)) of itself, so that in a short run, too, the first
    random weights are soon forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.tensors = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Move every average towards its weight."""
        kept = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.tensors.values()), [weights[name] for name in self.tensors], 1 - kept)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averages and their count as named tensors."""
        return self.tensors | {NUM_UPDATES: torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
        self.num_updates = int(tensors[NUM_UPDATES])

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Begin anew from weights: those of a run that kept no averages so far."""
        fresh = WeightAverage(weights, self.decay).tensors
        self.load_state_dict(fresh | {NUM_UPDATES: torch.tensor(0)})


@contextmanager
def computing_with(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model's parameters of these names are others, in its own dtype.

    Its own are put aside, not written to: another thread may save them at any time.
    """
    own = dict(model.named_parameters())
    others = {
        id(own[name]): nn.Parameter(weight.to(own[name].dtype), requires_grad=False) for name, weight in weights.items()
    }
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in others
    ]
    try:
        for module, name, parameter in places:
            setattr(module, name, others[id(parameter)])
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)
