"""Smaller shapes of the same family: width, heads and MLP of a recipe's model, shrunk together; its depth stays."""

import math

from groundup.model.config import ModelConfig
from groundup.train.weight_shapes import num_parameters

SMALLEST_WIDTH = 16
NARROW = 128
"""Width below which sizes of heads go by 4, not by 8: else there would be too few shapes."""
FACTORS_AN_OCTAVE = 16
"""Widths that are tried between a factor and its half."""
OCTAVES = 7


def shrunk(shape: ModelConfig, factor: float) -> ModelConfig:
    """The shape at `factor` of its width. The depth stays: with it a layer more or less would be a step in the law."""
    groups = shape.num_attention_heads // shape.num_key_value_heads
    fewest = groups if groups > 1 else min(2, shape.num_attention_heads)
    heads = max(fewest, round(shape.num_attention_heads * factor / groups) * groups)
    finest = 8 if factor * shape.hidden_size >= NARROW else 4
    step = finest * heads if shape.head_dim is None else finest
    hidden = max(step, round(shape.hidden_size * factor / step) * step)
    values = shape.model_dump()
    values |= {"hidden_size": hidden, "num_attention_heads": heads}
    values |= {"num_key_value_heads": heads // groups}
    for name in ("intermediate_size", "moe_intermediate_size"):
        if values[name] is not None:
            values[name] = max(8, round(values[name] * hidden / shape.hidden_size / 8) * 8)
    if shape.head_dim is not None:
        whole = shape.head_dim * shape.num_attention_heads * hidden / shape.hidden_size
        values["head_dim"] = max(8, round(whole / heads / 8) * 8)
    return ModelConfig.model_validate(values)


def shrunk_to(shape: ModelConfig, parameters: float, *, most: float = math.inf) -> ModelConfig | None:
    """The shape of the family, of those with at most so many, whose parameters are nearest to a number.

    None where there is none: the vocabulary stays, so that the family has a smallest.
    """
    factors = [2 ** (-number / FACTORS_AN_OCTAVE) for number in range(OCTAVES * FACTORS_AN_OCTAVE)]
    family = [shape, *(shrunk(shape, factor) for factor in factors if factor * shape.hidden_size >= SMALLEST_WIDTH)]
    fitting = [one for one in family if num_parameters(one) <= most]
    return min(fitting, key=lambda one: abs(math.log(num_parameters(one) / parameters)), default=None)
