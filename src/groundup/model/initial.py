"""First random weights: normal, output projections scaled by 1/sqrt(2 × layers) (GPT-2), norms 1, biases 0; and heads of
the first layer that begin as previous-token heads."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from groundup.base.piece import Piece
from groundup.model.config import ModelConfig
from groundup.model.rope import model_rope_table

SCORE = 24.0
"""Of a previous-token head for its token, where the mean over a row is about 0."""
FETCHED = 0.5
"""Standard deviation of what such a head's values are, and of what its output is beside them: a quarter of what is read."""
TURNS = ((1.0, 6 / 12), (0.56, 3 / 12), (0.32, 2 / 12), (0.18, 1 / 12))
"""Radians a token of the pairs that such a head looks with, and their shares of the score: fast ones tell neighbours
apart, slower ones what is a whole turn away. Where no pair turns so (heads of 4 numbers, positions scaled by a large factor) a
head sees its place less sharply."""


@torch.no_grad()
def draw(name: str, weight: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Put a parameter's first values into it: what the name and the number of dims say."""
    std = config.initializer_range
    if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
        std /= (2 * config.num_hidden_layers) ** 0.5
    if weight.dim() >= 2:
        weight.normal_(0.0, std, generator=generator)
    elif name.endswith("bias"):
        weight.zero_()
    else:
        weight.fill_(1.0)
    if config.num_aimed_heads and ".layers.0.self_attn." in name:
        _look_back(name, weight, std, config)


def _look_back(name: str, weight: Tensor, std: float, config: ModelConfig) -> None:
    """Aim the first heads. Their biases alone do it: with a key's bias b and the query's b turned back by n positions, the score
    at a distance of d is the sum of b² cos(θ (d - n)) over the pairs of a head, most at n.

    What they fetch counts beside a token's own embedding from the first step on; with the token itself among it, that is not
    drowned.
    """
    size, heads = config.head_size, config.num_aimed_heads
    groups = -(-heads * config.num_key_value_heads // config.num_attention_heads)
    if name.endswith("q_proj.bias"):
        turns_K, sizes_K = _pairs(config)
        angles_HK = torch.tensor([1, 0, *range(2, heads)][:heads]).unsqueeze(1) * turns_K
        weight[: heads * size] = torch.cat((sizes_K * angles_HK.cos(), -sizes_K * angles_HK.sin()), dim=-1).flatten()
    elif name.endswith("k_proj.bias"):
        _, sizes_K = _pairs(config)
        weight[: groups * size] = torch.cat((sizes_K, torch.zeros_like(sizes_K))).repeat(groups)
    elif name.endswith("v_proj.weight"):
        weight[: groups * size] *= FETCHED * config.hidden_size**-0.5 / std
    elif name.endswith("o_proj.weight"):
        weight[:, : heads * size] *= FETCHED * (heads * size) ** -0.5 / std


def _pairs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Of each pair of a head, (K/2,) both: the radians that it turns by at a token, and its bias's size."""
    cos_BTK, sin_BTK = model_rope_table(torch.ones(1, 1, dtype=torch.long), config)
    cos_K, sin_K = (table_BTK[0, 0, : config.head_size // 2] for table_BTK in (cos_BTK, sin_BTK))
    turns_K = torch.atan2(sin_K, cos_K)
    scores_K = torch.zeros_like(turns_K)
    for turn, share in TURNS:
        scores_K[(turns_K / turn).log().abs().argmin()] += share * SCORE * config.head_size**0.5
    # YaRN's table lengthens a query and a key alike
    return turns_K, (scores_K / (cos_K**2 + sin_K**2)).sqrt()


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
