"""What one rank of a mesh holds, as a function of shapes: which layers, which parts of their parameters, which tokens, and
how many micro-batches at a time. `footprint` counts its bytes."""

from collections.abc import Mapping
from functools import lru_cache
from math import prod

from groundup.adapters.config import AdapterConfig
from groundup.model.config import ModelConfig
from groundup.parallel.cut import Spread, held_shape, shard_shape
from groundup.train.weight_shapes import Shape, adapted, num_parameters, parameter_shapes, trained_shapes
from groundup.train.zero_footprint import FP32

NF4_BYTES = 0.52
"""Of a weight in 4 bits, its scales with it."""
IN_HAND = 3
"""Matrices in fp32 that exist while one is packed or measured; torchao's packing has 130 MB more."""
END_PARTS = ("model.embed_tokens.", "model.norm.", "lm_head.")


@lru_cache
def stages_of(shape: ModelConfig, spread: Spread) -> tuple[range, ...]:
    """Layers of every stage of the pipeline, one after the other; without a pipeline, all. Raises ConfigError as `split_layers`."""
    if spread.pipeline == 1:
        return (range(shape.num_hidden_layers),)
    from groundup.parallel.pipeline import STAGES_PER_RANK, split_layers  # slow: torch's pipelining

    return tuple(split_layers(shape, spread.pipeline * STAGES_PER_RANK[spread.schedule]))


def layers_of(shape: ModelConfig, spread: Spread) -> list[int]:
    """Layers of a rank: every so many ranks one of the stages."""
    return [layer for stage in stages_of(shape, spread)[spread.place :: spread.pipeline] for layer in stage]


def is_last(spread: Spread) -> bool:
    """Whether a rank has the last stage: the norm, the head and the loss."""
    return spread.place == spread.pipeline - 1


def held_shapes(shapes: Mapping[str, Shape], shape: ModelConfig, spread: Spread) -> dict[str, Shape]:
    """Of the parameters of a model, or an adapter's, those of a rank's stages, with the shapes that it computes with."""
    layers = {str(layer) for layer in layers_of(shape, spread)}
    ends = {"model.norm.": is_last(spread), "lm_head.": is_last(spread)}
    ends["model.embed_tokens."] = spread.place == 0 or (is_last(spread) and shape.tie_word_embeddings)
    return {
        name: held_shape(name, size, spread)
        for name, size in shapes.items()
        if block_of(name) in layers or any(name.startswith(part) and here for part, here in ends.items())
    }


def numbers_at_start(shape: ModelConfig, spread: Spread, adapter: AdapterConfig | None) -> tuple[int, int]:
    """Numbers of 4 bytes that a rank has while its model gets its weights: its own part, with what an adapter adds, and in the
    host's memory what is in hand at a time: of a new model the largest tensor, whole; what is read is taken out of its file,
    but a matrix that is packed or whose rows are measured, and what is made of it.

    A start in the weight changes a base, and DeepSpeed cuts a model, that every rank has whole in its host's memory.
    """
    if spread.by_deepspeed or (adapter is not None and adapter.needs_whole_base):
        return 0, num_parameters(shape)
    whole = parameter_shapes(shape)
    packed = packed_shapes(whole, adapter)
    held = held_shapes({name: size for name, size in whole.items() if name not in packed}, shape, spread)
    own = sum(prod(shard_shape(size, spread)) for size in held.values())
    if adapter is None:
        return own, max(map(prod, whole.values()))
    # an adapter and what is packed are whole before the base has memory
    own += -(-sum(map(prod, trained_shapes(shape, adapter).values())) // spread.data_shard)
    own += int(sum(map(prod, packed.values())) * NF4_BYTES / FP32)
    measured = adapted(whole, adapter) if adapter.use_dora else {}
    return own, IN_HAND * max(map(prod, (packed | measured).values()), default=0)


def packed_shapes(shapes: Mapping[str, Shape], adapter: AdapterConfig | None) -> dict[str, Shape]:
    """Weights in 4 bits: those of the base's linear layers under qlora."""
    if adapter is None or adapter.adapter != "qlora":
        return {}
    everywhere = adapter.model_copy(update={"lora_targets": ("*",)})
    return {f"{name}.weight": size for name, size in adapted(shapes, everywhere).items()}


def block_of(name: str) -> str:
    """The number of the layer that a parameter belongs to; empty for the ends of the model."""
    return name.partition(".layers.")[2].partition(".")[0]


def gathered_numbers(held: Mapping[str, Shape], spread: Spread) -> int:
    """Numbers that a rank with shards has gathered at once while it computes: embedding, norm and head, a block and the next;
    where gradients or the optimizer alone are in shards, all."""
    if spread.data_shard == 1:
        return 0
    by_block: dict[str, int] = {}
    for name, size in held.items():
        by_block[block_of(name)] = by_block.get(block_of(name), 0) + prod(size)
    ends = by_block.pop("", 0)
    if spread.shard != "parameters":
        return ends + sum(by_block.values())
    return ends + 2 * max(by_block.values(), default=0)


def largest_block(held: Mapping[str, Shape]) -> int:
    """Numbers of the largest part that FSDP sums at once: a block, or the ends together."""
    by_block: dict[str, int] = {}
    for name, size in held.items():
        by_block[block_of(name)] = by_block.get(block_of(name), 0) + prod(size)
    return max(by_block.values(), default=0)


def local_model(shape: ModelConfig, spread: Spread) -> ModelConfig:
    """The model as a tensor rank computes it: its heads, its columns of each MLP, its ids. Experts are whole."""
    if spread.tensor == 1:
        return shape
    degree = spread.tensor
    assert shape.vocab_size != "auto", "resolve the vocabulary first"
    return shape.model_copy(
        update={
            "head_dim": shape.head_size,
            "num_attention_heads": shape.num_attention_heads // degree,
            "num_key_value_heads": shape.num_key_value_heads // degree,
            "moe_intermediate_size": shape.expert_size if shape.num_experts is not None else None,
            "intermediate_size": shape.intermediate_size // degree,
            "vocab_size": shape.vocab_size // degree,
        }
    )


def num_micro_batches(spread: Spread, batch_rows: int, rows: int) -> int:
    """Micro-batches of a rank in a step; a schedule has at least as many as it needs (`Pipeline.num_micro_batches`)."""
    wanted = max(1, -(-batch_rows // rows))
    if spread.pipeline == 1 or spread.schedule == "gpipe":
        return wanted
    multiple = spread.pipeline if spread.schedule == "interleaved" else 1
    return max(spread.pipeline, -(-wanted // multiple) * multiple)


def in_flight(spread: Spread, num_micro: int) -> float:
    """Micro-batches whose activations a rank keeps at once, in units of all of its layers.

    Of 1F1B as many as there are ranks from here to the end; of interleaved runs, so many halves (Narayanan et al.,
    arXiv:2104.04473, section 2.2).
    """
    if spread.pipeline == 1:
        return 1.0
    if spread.schedule == "gpipe":
        return float(num_micro)
    behind = spread.pipeline - 1 - spread.place
    if spread.schedule == "1f1b":
        return float(min(num_micro, behind + 1))
    return min(2 * num_micro, 2 * behind + spread.pipeline + 1) / 2
