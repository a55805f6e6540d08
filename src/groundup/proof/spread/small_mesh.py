"""A mesh and what it trains, made so small that this machine's CPU can run it: the same kinds, two ranks of each."""

from collections.abc import Mapping
from typing import Any

from groundup.model.config import ModelConfig
from groundup.parallel.config import DIMS, Dim, ParallelConfig
from groundup.proof.numerics.subject import with_windows
from groundup.stages.config import FinetuneConfig, PretrainConfig

MOST_RANKS = 4
HEAD, HIDDEN, INNER, VOCABULARY = 16, 64, 96, 256
ROW_LENGTH = 64
MICRO_ROWS = 2
LAYERS_OF_A_STAGE = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
CPU_MAKERS = ("sdpa", "chunked", "dense")


def small_meshes(config: ParallelConfig) -> list[dict[Dim, int]]:
    """Degrees to run: the section's own where they make few ranks, else every kind at degree 2, two kinds at a time."""
    degrees = {dim: degree for dim, degree in config.degrees.items() if degree > 1}
    if config.num_ranks <= MOST_RANKS:
        return [degrees]
    # those that share the weights first, so that what is cut twice is tried
    kinds = [
        dim for dim in ("data_shard", "tensor", "pipeline", "expert", "context", "data_replicate") if dim in degrees
    ]
    pairs = [kinds[begin : begin + 2] for begin in range(0, len(kinds), 2)]
    if len(kinds) > 1 and len(pairs[-1]) == 1:
        pairs[-1].insert(0, kinds[0])
    return [{dim: 2 for dim in DIMS if dim in pair} for pair in pairs]


def small_shape(shape: ModelConfig, degrees: Mapping[Dim, int], config: ParallelConfig) -> ModelConfig:
    """A model of the same kind that the mesh divides as it divides the large one."""
    tensor, expert = degrees.get("tensor", 1), degrees.get("expert", 1)
    groups = shape.num_attention_heads // shape.num_key_value_heads
    layers = max(2, degrees.get("pipeline", 1) * LAYERS_OF_A_STAGE[config.pipeline_schedule])
    update: dict[str, Any] = {
        "num_key_value_heads": tensor,
        "num_attention_heads": tensor * min(2, groups),
        "head_dim": HEAD,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER * tensor,
        "vocab_size": VOCABULARY * tensor,
        "num_hidden_layers": layers,
    }
    if shape.num_experts is not None and shape.num_experts_per_tok is not None:
        update |= {
            "num_experts": 2 * expert,
            "num_experts_per_tok": min(2, shape.num_experts_per_tok),
            "moe_intermediate_size": None if shape.moe_intermediate_size is None else INNER,
            "first_k_dense_replace": min(1, shape.first_k_dense_replace),
            "mlp_only_layers": tuple(layer for layer in shape.mlp_only_layers if layer < layers - 1),
            "decoder_sparse_step": min(layers, shape.decoder_sparse_step),
        }
    return with_windows(shape.model_copy(update=update), shape)


def small_section(config: PretrainConfig | FinetuneConfig, num_shares: int) -> dict[str, Any]:
    """A section of a few steps, two micro-batches a rank, with the optimizer, the precision and all else that it says."""
    precision = config.precision if config.precision in ("fp32", "bf16") else "bf16"
    attention = config.attention if config.attention in CPU_MAKERS else "sdpa"
    update: dict[str, Any] = {
        "row_length": ROW_LENGTH,
        "batch_size_tokens": ROW_LENGTH * MICRO_ROWS * 2 * num_shares,
        "micro_batch_rows": MICRO_ROWS,
        "device": "cpu",
        "precision": precision,
        "attention": attention,
        "compile": False,
        "num_threads": 1,
        "warmup": "0 steps",
        "validate_every": "1 steps",
        "checkpoint_every": "1 steps",
        "keep_every": None,
        "sample_every": None,
        "max_validation_rows": 2 * num_shares,
        "peak_flops": None,
        "on_spike": "off",
    }
    if config.lr == "auto":
        update |= {"lr": 1e-3, "muon_lr": 1e-3}
    return config.model_dump(mode="json", exclude_unset=True) | update
