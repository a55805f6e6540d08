"""Adapter fields of the recipe's fine-tuning sections."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from groundup.base.config import Config

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterConfig(Config):
    """Which weights a fine-tuning run trains."""

    adapter: Literal["none", "lora"] = "none"
    """none trains every weight; lora trains low-rank additions (Hu et al., arXiv:2106.09685)."""
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveFloat = 16.0
    """The addition is scaled by alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] = BLOCK_LINEARS
    """Names of the linear layers of the blocks that get an adapter."""
