"""The recipe's `eval:` section."""

from typing import Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from groundup.base.config import Config


class EvalConfig(Config):
    """How models are measured."""

    window: PositiveInt = 512
    """Tokens a prediction can look back on at most, and the length of a forward pass."""
    stride: PositiveInt = 256
    """Tokens between two windows; each token is counted once, in the first window that reaches it."""
    prime_bytes: NonNegativeInt = 4 << 20
    """Training text that xz may read before the held-out text, for the primed figure."""
    num_questions: PositiveInt = 50
    """Held-out questions that are answered."""
    max_answer_tokens: PositiveInt = 128
    """An answer that is longer counts as one that does not stop."""
    answer_temperature: NonNegativeFloat = 0.0
    """Temperature of the answers; 0 takes the likeliest token."""

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride > self.window:
            raise ValueError(f"{self.stride=} must not exceed {self.window=}: tokens would be left out")
        return self
