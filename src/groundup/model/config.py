"""The recipe's `model:` section: the words of a Hugging Face config.json."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from groundup.base.config import Config
from groundup.model.rope_config import RopeParameters

ModelType = Literal["qwen3", "qwen2", "llama", "mistral", "qwen3_moe", "mixtral", "dots1"]
SPARSE_TYPES = ("qwen3_moe", "mixtral", "dots1")
WINDOWS_BY_LAYER = ("qwen3", "qwen2")
"""Model types whose layers may differ in their window."""
WINDOWLESS = ("llama", "dots1")


class ModelConfig(Config):
    """Shape of a decoder-only transformer of the Llama family."""

    model_type: ModelType = "qwen3"
    """qwen3 normalises queries and keys per head; qwen2 has biases on q, k and v; llama and mistral have neither. With
    experts: qwen3_moe is qwen3, mixtral is llama; dots1 is qwen3 with experts as in DeepSeek-V3: sigmoid scores, a bias
    that balances the load, experts that every token shares."""
    hidden_size: PositiveInt
    """Width: numbers that stand for a token between the layers."""
    intermediate_size: PositiveInt
    """Width inside an MLP."""
    num_hidden_layers: PositiveInt
    """Blocks, each attention and an MLP."""
    num_attention_heads: PositiveInt
    """Query heads of a layer."""
    num_key_value_heads: PositiveInt
    """Key/value heads; fewer than num_attention_heads gives grouped queries (arXiv:2305.13245)."""
    head_dim: PositiveInt | None = None
    """Size of a head; None takes hidden_size / num_attention_heads."""
    vocab_size: PositiveInt | Literal["auto"] = "auto"
    """Rows of the embedding; auto takes the tokenizer's size."""
    max_position_embeddings: PositiveInt = 2048
    """Longest text that the model is made for, in tokens."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies (Su et al., arXiv:2104.09864)."""
    rope_parameters: RopeParameters = RopeParameters()
    rms_norm_eps: PositiveFloat = 1e-6
    """What a norm adds to the mean square before the root."""
    attention_bias: bool = False
    """Biases on q, k, v and o; qwen2 has those on q, k and v whatever stands here."""
    tie_word_embeddings: bool = True
    """Whether the head's weights are the embedding's."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 × layers); values and outputs of
    `previous_token_heads` have their own."""
    previous_token_heads: PositiveInt | None = None
    """Query heads of the first layer, at most all, that begin with their eyes on a place: the first on the token before, the second
    on the token itself, others on those 2, 3, … before, by their first biases. A model learns to look up what its row
    holds already from them (induction heads, Olsson et al., arXiv:2209.11895), sooner than it would find them."""
    num_experts: PositiveInt | None = None
    """Experts of a layer, of which a token is given to num_experts_per_tok (Shazeer et al., arXiv:1701.06538)."""
    num_experts_per_tok: PositiveInt | None = None
    """Experts that a token is given to."""
    moe_intermediate_size: PositiveInt | None = None
    """MLP size of one expert; mixtral takes intermediate_size."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""
    decoder_sparse_step: PositiveInt = 1
    """qwen3_moe: every n-th layer has experts."""
    mlp_only_layers: tuple[NonNegativeInt, ...] = ()
    """qwen3_moe: layers, counted from 0, without experts."""
    first_k_dense_replace: NonNegativeInt = 0
    """dots1: so many first layers are without experts."""
    n_shared_experts: PositiveInt | None = None
    """dots1: experts that every token is given to, as one MLP of their sizes together (arXiv:2401.06066)."""
    routed_scaling_factor: PositiveFloat = 1.0
    """dots1: what the weights of a token's experts are multiplied by."""
    router_aux_loss_coef: NonNegativeFloat = 0.001
    """Weight of the load-balancing loss (Switch, arXiv:2101.03961); 0 is without. The loss itself is
    num_experts_per_tok where every expert gets the same."""
    router_aux_loss_scope: Literal["row", "batch"] = "row"
    """Over which tokens the balance is taken. row: each row by itself, so that no result depends on the micro-batch.
    batch: all rows of a micro-batch and all layers together, as `transformers` does; that depends on the micro-batch."""
    router_z_loss_coef: NonNegativeFloat = 0.0
    """Weight of the squared log-sum-exp of the router's logits (ST-MoE, arXiv:2202.08906); 0 is without."""
    router_bias_update_rate: NonNegativeFloat = 0.001
    """dots1: step by which an expert's bias follows the load of a whole batch (arXiv:2408.15664); 0 leaves it."""

    sliding_window: PositiveInt | None = None
    """Tokens that a token sees at most, itself included (Beltagy et al., arXiv:2004.05150); None: its whole document."""
    max_window_layers: NonNegativeInt = 0
    """First layers that see the whole document all the same; qwen2 and qwen3."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    """Which layers have the window, one word each, instead of max_window_layers; qwen2 and qwen3."""

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        by_layer = self.max_window_layers > 0 or self.layer_types is not None
        if self.sliding_window is None:
            if by_layer:
                raise ValueError("max_window_layers and layer_types need a sliding_window")
            return self
        if self.model_type in WINDOWLESS:
            raise ValueError(f"{self.model_type} has no sliding_window; model_type mistral is llama with one")
        if by_layer and self.model_type not in WINDOWS_BY_LAYER:
            raise ValueError(
                f"{self.model_type} has its window in every layer; leave out max_window_layers, layer_types"
            )
        if self.max_window_layers and self.layer_types is not None:
            raise ValueError("max_window_layers and layer_types say the same: give one of them")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for {self.num_hidden_layers=}")
        return self

    @model_validator(mode="after")
    def _biases_exist(self) -> Self:
        if self.attention_bias and self.model_type in ("mistral", "mixtral"):
            raise ValueError(f"{self.model_type} has no attention_bias; llama has one")
        return self

    @model_validator(mode="after")
    def _heads_can_look_back(self) -> Self:
        if self.previous_token_heads and (self.has_qk_norm or not self.has_attention_biases):
            raise ValueError(
                "previous_token_heads need biases on q and k, and no norm over them: model_type qwen2, or llama with attention_bias"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads=} must be a multiple of {self.num_key_value_heads=}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.hidden_size=} must be a multiple of {self.num_attention_heads=}, or set head_dim")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} must be even for RoPE")
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        fields = type(self).model_fields
        named = [name for name in EXPERT_FIELDS if getattr(self, name) != fields[name].default]
        if self.model_type not in SPARSE_TYPES:
            if named:
                raise ValueError(f"{', '.join(sorted(named))}: {self.model_type=} has no experts")
            return self
        if self.num_experts is None or self.num_experts_per_tok is None:
            raise ValueError(f"{self.model_type=} needs num_experts and num_experts_per_tok")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"{self.num_experts_per_tok=} is more than {self.num_experts=}")
        if self.model_type != "mixtral" and self.moe_intermediate_size is None:
            raise ValueError(f"{self.model_type=} needs moe_intermediate_size")
        if self.model_type == "dots1" and self.n_shared_experts is None:
            raise ValueError("self.model_type='dots1' needs n_shared_experts")
        foreign = [name for name in named if self.model_type not in EXPERT_FIELDS[name]]
        if foreign:
            raise ValueError(f"{', '.join(sorted(foreign))}: not of {self.model_type=}")
        if not any(self.is_sparse(layer) for layer in range(self.num_hidden_layers)):
            raise ValueError(f"{self.model_type=} with experts in no layer")
        return self

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return (
            self.model_type in SPARSE_TYPES
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
            and layer >= self.first_k_dense_replace
        )

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.model_type in ("qwen3", "qwen3_moe", "dots1")

    @property
    def has_attention_biases(self) -> bool:
        """Whether q, k and v have biases."""
        return self.model_type == "qwen2" or self.attention_bias

    @property
    def num_aimed_heads(self) -> int:
        """Query heads of the first layer that begin with their eyes on a place."""
        return min(self.previous_token_heads or 0, self.num_attention_heads)

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are chosen by sigmoid scores with a bias, as in DeepSeek-V3."""
        return self.model_type == "dots1"

    @property
    def expert_size(self) -> int:
        """MLP size of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

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

    def window_of(self, layer: int) -> int | None:
        """Tokens that one sees in a layer at most, itself included; None: all before it in its document."""
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
        return self.sliding_window if layer >= self.max_window_layers else None


EXPERT_FIELDS = {
    **dict.fromkeys(
        (
            "num_experts",
            "num_experts_per_tok",
            "router_aux_loss_coef",
            "router_aux_loss_scope",
            "router_z_loss_coef",
        ),
        SPARSE_TYPES,
    ),
    **dict.fromkeys(("moe_intermediate_size", "norm_topk_prob"), ("qwen3_moe", "dots1")),
    **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers"), ("qwen3_moe",)),
    **dict.fromkeys(
        ("first_k_dense_replace", "n_shared_experts", "routed_scaling_factor", "router_bias_update_rate"), ("dots1",)
    ),
}
"""The model types that each field about experts belongs to."""


def fields_about_experts(model_type: str) -> list[str]:
    """The fields about experts of a model type."""
    return [name for name, types in EXPERT_FIELDS.items() if model_type in types]
