"""The recipe's `tokenizer:` section."""

from typing import Literal

from pydantic import Field, PositiveInt

from groundup.base.config import Config


class TokenizerConfig(Config):
    """A byte-level BPE trained on the corpus, or an existing tokenizer directory."""

    path: str | None = None
    """An existing HF tokenizer directory; None trains one."""
    vocab_size: int = Field(4096, ge=259)
    """Ids in the trained vocabulary, the 256 bytes and the control tokens included."""
    pre_tokenizer: Literal["gpt-2", "qwen2", "llama-bpe"] = "gpt-2"
    """Which pattern cuts text into words before merging; all three are known to llama.cpp."""
    max_training_bytes: PositiveInt = 64 << 20
    """Text the merges are counted on, chosen by the documents' hash."""
