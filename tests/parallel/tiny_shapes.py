"""Shapes that tests of spread models share: small, and divided by 2 and 4 in every way."""

from groundup.model.config import ModelConfig

DENSE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
EXPERTS = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "router_aux_loss_coef": 0.01,
    "router_aux_loss_scope": "row",
}


def shape_of(values):
    """As a case of `doctor parallel` takes it."""
    return ModelConfig(**values).model_dump(mode="json")
