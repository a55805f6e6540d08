"""Adapter fields of the recipe's fine-tuning sections."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from groundup.base.config import Config

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LoraStart = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16"]


class AdapterConfig(Config):
    """Which weights a fine-tuning run trains."""

    adapter: Literal["none", "lora", "qlora"] = "none"
    """none trains every weight; lora trains low-rank additions (Hu et al., arXiv:2106.09685); qlora does so on a base
    frozen in 4 bits (Dettmers et al., arXiv:2305.14314)."""
    lora_rank: PositiveInt = 8
    """Rank of the additions: columns of one factor, rows of the other."""
    lora_alpha: PositiveFloat = 16.0
    """The addition is scaled by alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is set to 0 in training."""
    lora_targets: tuple[str, ...] = ("*",)
    """Linear layers of the blocks that get an adapter: last parts of their names (q_proj) or patterns over whole names
    (model.layers.1?.mlp.*); a head or a router never does."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn as fast (Kalajdzievski, arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn the length of each row of a weight apart from its direction (Liu et al., arXiv:2402.09353)."""
    init_lora_weights: LoraStart = "default"
    """How the addition begins: at zero (default, gaussian), orthogonal, or as the largest part of the weight itself
    (pissa, Meng et al., arXiv:2404.02948; niter: a fast approximation)."""
    nf4_maker: Literal["torchao", "bitsandbytes"] = "torchao"
    """Who packs the frozen weights of qlora into 4 bits."""
    train_tokens: tuple[str, ...] = ()
    """Tokens whose embeddings are trained with the adapter; one that the tokenizer lacks gets a free row of the
    embedding."""

    @property
    def is_pissa(self) -> bool:
        """Whether the addition begins as a part of the weight."""
        return self.init_lora_weights.startswith("pissa")

    @property
    def needs_whole_base(self) -> bool:
        """Whether the base's own values are others under the adapter: a start in the weight is taken out of it."""
        return self.init_lora_weights not in ("default", "gaussian")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        variants = {
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "init_lora_weights": self.init_lora_weights != "default",
            "train_tokens": bool(self.train_tokens),
        }
        asked = [name for name, is_on in variants.items() if is_on]
        if self.adapter == "none" and asked:
            raise ValueError(f"{asked[0]} needs an adapter: set adapter to lora or qlora, or leave it out")
        if self.use_dora and self.is_pissa:
            raise ValueError(
                "DoRA with a PiSSA start cannot be saved as an adapter that other tools load: use one of the two"
            )
        if self.adapter == "qlora" and self.is_pissa:
            raise ValueError(
                "PiSSA moves a part of the weight into the adapter and the 4-bit rest no longer fits it: use "
                "init_lora_weights default with qlora, or pissa with adapter lora"
            )
        if self.adapter == "qlora" and self.use_dora and self.nf4_maker == "torchao":
            raise ValueError(
                "DoRA does not run on NF4 of torchao: use nf4_maker bitsandbytes, or use_dora with adapter lora"
            )
        return self
