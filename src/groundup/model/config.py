"""The recipe's `model:` section: the words of a Hugging Face config.json."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from groundup.base.config import Config
from groundup.model.rope_config import RopeParameters


class ModelConfig(Config):
    """Shape of a decoder-only transformer of the Llama family."""

    model_type: Literal["qwen3", "qwen2", "llama"] = "qwen3"
    """qwen3 normalises queries and keys per head; qwen2 has biases on q, k and v; llama has neither."""
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    """Key/value heads; fewer than num_attention_heads gives grouped queries (arXiv:2305.13245)."""
    head_dim: PositiveInt | None = None
    """Size of a head; None takes hidden_size / num_attention_heads."""
    vocab_size: PositiveInt | Literal["auto"] = "auto"
    """Rows of the embedding; auto takes the tokenizer's size."""
    max_position_embeddings: PositiveInt = 2048
    rope_theta: PositiveFloat = 10_000.0
    rope_parameters: RopeParameters = RopeParameters()
    rms_norm_eps: PositiveFloat = 1e-6
    attention_bias: bool = False
    """Biases on q, k, v and o; qwen2 has those on q, k and v whatever stands here."""
    tie_word_embeddings: bool = True
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 × layers)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads=} must be a multiple of {self.num_key_value_heads=}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size=} must be a multiple of {self.num_attention_heads=}, or set head_dim")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} must be even for RoPE")
        return self

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def longest_text(self) -> int:
        """Tokens that a text may have: dynamic scaling reaches `factor` times beyond the positions of the training."""
        rope = self.rope_parameters
        growth = rope.factor if rope.rope_type == "dynamic" and rope.factor else 1.0
        return int(self.max_position_embeddings * growth)
