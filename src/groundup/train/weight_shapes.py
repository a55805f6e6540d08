"""Shapes of a model's parameters by their names, and of those that are trained, from its configuration alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from groundup.adapters.config import AdapterConfig
from groundup.adapters.targets import is_meant
from groundup.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """A model's shape in numbers."""

    shape: ModelConfig

    @cached_property
    def queries(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_size

    @cached_property
    def keys(self) -> int:
        return self.shape.num_key_value_heads * self.shape.head_size

    @cached_property
    def vocab(self) -> int:
        assert self.shape.vocab_size != "auto", "resolve the vocabulary first"
        return self.shape.vocab_size


def parameter_shapes(shape: ModelConfig) -> dict[str, Shape]:
    """Every parameter's shape by its name, as `CausalLM.named_parameters` has them."""
    hidden, vocab = shape.hidden_size, Sizes(shape).vocab
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(shape.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in block_shapes(shape, layer).items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if shape.tie_word_embeddings else shapes | {"lm_head.weight": (vocab, hidden)}


def num_parameters(shape: ModelConfig) -> int:
    """All of a model's, a tied head once."""
    return sum(map(prod, parameter_shapes(shape).values()))


def block_shapes(shape: ModelConfig, layer: int) -> dict[str, Shape]:
    """Those of one layer, by their names in it."""
    sizes, hidden = Sizes(shape), shape.hidden_size
    shapes: dict[str, Shape] = {}
    outputs = {"q_proj": sizes.queries, "k_proj": sizes.keys, "v_proj": sizes.keys}
    for name, size in outputs.items():
        shapes[f"self_attn.{name}.weight"] = (size, hidden)
        if shape.has_attention_biases:
            shapes[f"self_attn.{name}.bias"] = (size,)
    shapes["self_attn.o_proj.weight"] = (hidden, sizes.queries)
    if shape.attention_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if shape.has_qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (shape.head_size,) for name in "qk"}
    shapes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if not shape.is_sparse(layer):
        return shapes | _mlp_shapes("mlp", hidden, shape.intermediate_size)
    assert shape.num_experts is not None
    shapes["mlp.gate.weight"] = (shape.num_experts, hidden)
    if shape.has_router_bias:
        shapes["mlp.gate.e_score_correction_bias"] = (shape.num_experts,)
    shapes["mlp.experts.gate_up_proj"] = (shape.num_experts, 2 * shape.expert_size, hidden)
    shapes["mlp.experts.down_proj"] = (shape.num_experts, hidden, shape.expert_size)
    if shape.n_shared_experts is not None:
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, shape.n_shared_experts * shape.expert_size)
    return shapes


def _mlp_shapes(name: str, hidden: int, inner: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (hidden, inner)}


def adapted(shapes: Mapping[str, Shape], adapter: AdapterConfig) -> dict[str, Shape]:
    """Shapes of the linear layers that an adapter is put onto, by their names."""
    linears = {name.removesuffix(".weight"): size for name, size in shapes.items() if ".layers." in name}
    linears = {name: size for name, size in linears.items() if name.endswith("_proj") and len(size) == 2}
    return {
        name: size for name, size in linears.items() if any(is_meant(name, pattern) for pattern in adapter.lora_targets)
    }


def trained_shapes(shape: ModelConfig, adapter: AdapterConfig | None) -> dict[str, Shape]:
    """Shapes of what is trained, by name."""
    shapes = parameter_shapes(shape)
    if adapter is None:
        return {name: size for name, size in shapes.items() if not name.endswith("e_score_correction_bias")}
    trained: dict[str, Shape] = {}
    for name, (outputs, inputs) in adapted(shapes, adapter).items():
        trained[f"{name}.lora_A.default.weight"] = (adapter.lora_rank, inputs)
        trained[f"{name}.lora_B.default.weight"] = (outputs, adapter.lora_rank)
        if adapter.use_dora:
            trained[f"{name}.lora_magnitude_vector.default.weight"] = (outputs,)
    return trained
