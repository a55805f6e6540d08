"""How tokens are drawn."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from groundup.base.config import Config


class SamplingConfig(Config):
    """How a token is drawn; temperature 0 takes the likeliest."""

    temperature: NonNegativeFloat = 0.8
    """What logits are divided by: below 1 the likely tokens gain."""
    top_k: NonNegativeInt = 0
    """Draw from the k likeliest tokens; 0 takes all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum (Holtzman et al., arXiv:1904.09751)."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draw from tokens at least this likely relative to the likeliest (Nguyen et al., arXiv:2407.01082)."""
    max_new_tokens: PositiveInt = 256
    """Longest continuation."""
    seed: int = 0
    """The same seed draws the same tokens."""
