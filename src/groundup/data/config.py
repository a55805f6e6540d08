"""The recipe's `tokens:` section."""

from typing import Literal

from pydantic import Field, PositiveInt

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
