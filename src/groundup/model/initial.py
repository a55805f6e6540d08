"""First random weights: normal, output projections scaled by 1/sqrt(2 × layers) (GPT-2), norms 1, biases 0."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from groundup.base.piece import Piece
from groundup.model.config import ModelConfig


@torch.no_grad()
def draw(name: str, weight: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Put a parameter's first values into it: what the name and the number of dims say."""
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        weight.normal_(0.0, std / (2 * config.num_hidden_layers) ** 0.5, generator=generator)
    elif weight.dim() >= 2:
        weight.normal_(0.0, std, generator=generator)
    elif name.endswith("bias"):
        weight.zero_()
    else:
        weight.fill_(1.0)


class InitialWeights:
    """Pieces of a new model's parameters, with the very bits that `CausalLM.initialize` gives the whole model.

    One generator draws tensor after tensor: a rank draws each whole, keeps its piece, and stops behind its last one.
    """

    def __init__(self, model: nn.Module, config: ModelConfig, *, seed: int) -> None:
        """`model` is whole, be it on the meta device: what its parameters are called, in which order, and their shapes."""
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._config, self._seed = config, seed

    def __call__(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
        """Each of the pieces by its parameter's name, in fp32 on the CPU; the one before may be let go of."""
        generator = torch.Generator().manual_seed(self._seed)
        num_left = len(pieces)
        for name, shape in self._shapes.items():
            if num_left == 0:
                return
            whole = torch.empty(shape)
            draw(name, whole, self._config, generator)
            if name in pieces:
                num_left -= 1
                yield name, whole[pieces[name].slices]
            del whole  # before the next one is made
