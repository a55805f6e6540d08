"""Bytes that one rank of a mesh hands to each kind of message in an optimizer step, by formula.

`parallel/traffic.py` counts the same on running ranks, and says which share of a message's bytes a rank sends.
"""

from collections import Counter
from collections.abc import Mapping
from math import prod

from groundup.model.config import ModelConfig
from groundup.parallel.config import Dim
from groundup.parallel.cut import Spread, shard_dim, shard_shape, tensor_dim
from groundup.parallel.mesh import TOKEN_DIMS
from groundup.train.footprint import FP32, Training
from groundup.train.spread_footprint import block_of, held_shapes, is_last, layers_of, local_model, stages_of
from groundup.train.weight_shapes import Shape, Sizes, parameter_shapes, trained_shapes

Payload = Counter[tuple[str, str]]
LOSS_NUMBERS = 3
"""Numbers a supervised token that ranks with a share of the vocabulary agree on: the largest logit, the label's, the sum."""


def step_payload(shape: ModelConfig, training: Training) -> Payload:
    """Bytes by dimension and kind of message, of the rank at `training.spread.place`, each token supervised and each expert
    given as many. What a step tells in a few numbers (losses, norms, loads) is left out."""
    spread = training.spread
    found: Payload = Counter()
    held = held_shapes(parameter_shapes(shape), shape, spread)
    trained = held_shapes(trained_shapes(shape, training.adapter), shape, spread)
    _weights(found, held, trained, training)
    if spread.tensor > 1:
        _tensor(found, shape, training, trained)
    if spread.context > 1:
        _context(found, shape, training)
    if spread.expert > 1:
        _expert(found, shape, training)
    if spread.pipeline > 1:
        _pipeline(found, shape, training)
    return found


def _weights(found: Payload, held: Mapping[str, Shape], trained: Mapping[str, Shape], training: Training) -> None:
    """Weights gathered for each pass, gradients summed once a step, in fp32."""
    spread = training.spread
    if spread.data_shard > 1:
        for name, size in held.items():
            times = 2 if spread.shard == "parameters" and block_of(name) else 1
            item = FP32 if name.endswith("mlp.gate.weight") else training.item
            found["data_shard", "all_gather"] += training.num_micro_batches * times * item * _padded(size, spread)
        for size in trained.values():
            found["data_shard", "reduce_scatter"] += FP32 * _padded(size, spread)
    for name, size in trained.items():
        own = FP32 * prod(shard_shape(size, spread))
        for dim in _summed_over(name, spread):
            found[dim, "all_reduce"] += own


def _padded(size: Shape, spread: Spread) -> int:
    """Numbers of a parameter whose shards are all as large as the largest."""
    dim = shard_dim(size, spread.data_shard)
    return spread.data_shard * -(-size[dim] // spread.data_shard) * prod(size[:dim] + size[dim + 1 :])


def _summed_over(name: str, spread: Spread) -> list[Dim]:
    """Dimensions over which a gradient is summed whole: those whose ranks see other tokens, but shards' own."""
    done = {"data_shard", *(["expert"] if ".mlp.experts." in name else [])}
    return [dim for dim in TOKEN_DIMS if spread.degrees[dim] > 1 and dim not in done]


def _tensor(found: Payload, shape: ModelConfig, training: Training, trained: Mapping[str, Shape]) -> None:
    """Each token gathered before the products that share it, and summed behind them to the rank that goes on with it."""
    spread, item = training.spread, training.item
    tokens = training.num_micro_batches * training.tokens
    passes = tokens * shape.hidden_size * item
    again = 1 if training.activation_checkpointing != "none" else 0
    for layer in layers_of(shape, spread):
        if shape.is_sparse(layer):  # every rank computes all experts: what comes out is not summed
            found["tensor", "all_gather"] += passes * (2 + 2 * again + 2)
            found["tensor", "reduce_scatter"] += passes * (1 + again + 1)
        else:
            found["tensor", "all_gather"] += passes * (2 + 2 * again + 2)
            found["tensor", "reduce_scatter"] += passes * (2 + 2 * again + 2)
    if spread.place == 0:
        found["tensor", "reduce_scatter"] += passes
        found["tensor", "all_gather"] += passes
    if is_last(spread):
        found["tensor", "all_gather"] += passes
        found["tensor", "reduce_scatter"] += passes
        found["tensor", "all_reduce"] += tokens * LOSS_NUMBERS * FP32
    for name, size in trained.items():
        if "norm" in name and tensor_dim(name) is None:
            found["tensor", "all_reduce"] += FP32 * prod(size)


def _context(found: Payload, shape: ModelConfig, training: Training) -> None:
    """Keys and values of whole rows, gathered in each layer; their gradients summed to the rank they came from, in fp32."""
    keys = 2 * Sizes(local_model(shape, training.spread)).keys
    numbers = training.num_micro_batches * training.rows * training.row_length * keys
    num_layers = len(layers_of(shape, training.spread))
    again = 1 if training.activation_checkpointing != "none" else 0
    found["context", "all_gather"] += num_layers * (1 + again) * numbers * training.item
    found["context", "reduce_scatter"] += num_layers * numbers * FP32


def _expert(found: Payload, shape: ModelConfig, training: Training) -> None:
    """Every token to each of its experts and back, forward and backward."""
    assert shape.num_experts_per_tok is not None, "experts are shared"
    layers = sum(shape.is_sparse(layer) for layer in layers_of(shape, training.spread))
    rows = training.num_micro_batches * training.tokens * shape.num_experts_per_tok
    again = 1 if training.activation_checkpointing != "none" else 0
    found["expert", "all_to_all"] += layers * (4 + 2 * again) * rows * shape.hidden_size * training.item


def _pipeline(found: Payload, shape: ModelConfig, training: Training) -> None:
    """Hidden states to the next stage, their gradients to the one before; a head tied to the embedding, between the ends."""
    spread = training.spread
    num_stages = len(stages_of(shape, spread))
    own = range(spread.place, num_stages, spread.pipeline)
    messages = sum((stage < num_stages - 1) + (stage > 0) for stage in own)
    one = training.num_micro_batches * training.own_tokens * shape.hidden_size * training.item
    found["pipeline", "send"] += messages * one
    if shape.tie_word_embeddings and spread.place in (0, spread.pipeline - 1) and training.adapter is None:
        vocab = shard_shape((Sizes(local_model(shape, spread)).vocab, shape.hidden_size), spread)
        found["pipeline", "send"] += FP32 * prod(vocab)
