"""The recipe's `tokens:` section."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from groundup.base.config import COSMETIC, Config


class TokensConfig(Config):
    """How the corpus becomes token files."""

    path: str | None = Field(None, json_schema_extra=COSMETIC)  # the hash of its files stands for it
    """An existing `tokens/` folder, its tokenizer in `../tokenizer`; None makes tokens from the corpus."""
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    """Share of the documents held out, chosen by the hash of their text."""
    max_shard_tokens: PositiveInt = 1 << 28
    """Tokens in one file at most."""
    num_workers: PositiveInt | Literal["auto"] = Field("auto", json_schema_extra=COSMETIC)
    """Processes that tokenize."""


class SourceConfig(Config):
    """One source of a mixture: a `tokens/` folder, or the documents of one entry of `corpus.source` in it."""

    weight: PositiveFloat
    """Its share of the tokens, relative to the other weights."""
    tokens: str | None = Field(None, json_schema_extra=COSMETIC)  # the hash of its files stands for it
    """The `tokens/` folder of another run, made with the same tokenizer; None takes the run's own."""
    source: str | None = None
    """Only documents of this source: the name of the file or folder that `corpus.source` named. None takes all."""
