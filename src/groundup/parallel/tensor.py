"""Tensor parallelism (Shoeybi et al., arXiv:1909.08053): ranks share each product, its heads and columns; between the
products each has a part of the tokens (sequence parallelism, Korthikanti et al., arXiv:2205.05198)."""

from collections.abc import Mapping
from fnmatch import filter as matching
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from groundup.base.errors import ConfigError
from groundup.model.causal_lm import CausalLM
from groundup.model.loss import VocabularyShard
from groundup.model.moe import SparseMLP
from groundup.parallel.mesh import Mesh

TOKENS = Shard(1)
"""Each rank has a part of every row's tokens."""


class TokenEmbedding(RowwiseParallel):
    """Ids over the ranks; each goes on with its part of the tokens, which it has waited for: a compiler takes no promise."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: tuple[Placement, ...],
        use_local_output: bool,
        module: nn.Module,
        out_BTD: DTensor,
        mesh: DeviceMesh,
    ) -> Tensor:
        return out_BTD.redistribute(placements=output_layouts).to_local()


class GatheredNorm(SequenceParallel):
    """A norm of each rank's tokens, and behind it the tokens of all; what comes back are parts of a sum."""

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, module: nn.Module, out_BTD: DTensor, mesh: DeviceMesh) -> Tensor:
        return out_BTD.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))


class GatheredHead(ColwiseParallel):
    """A head whose ids are spread and whose logits are gathered: for `logits`, which the loss never asks for."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: tuple[Placement, ...],
        desired_input_layouts: tuple[Placement, ...],
        module: nn.Module,
        inputs: tuple[Any, ...],
        mesh: DeviceMesh,
    ) -> Tensor:
        return DTensor.from_local(inputs[0], mesh, input_layouts, grad_placements=(Partial(),))


def plan() -> dict[str, ParallelStyle]:
    """How each module is spread, by patterns of names."""
    attention = ((TOKENS, None, None, None, None), (Replicate(), None, None, None, None))
    return {
        "model.embed_tokens": TokenEmbedding(input_layouts=Replicate(), output_layouts=TOKENS),
        "model.layers.*.*_layernorm": SequenceParallel(),
        "model.layers.*.self_attn": PrepareModuleInput(input_layouts=attention[0], desired_input_layouts=attention[1]),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        # a rank's heads are a part of what the norm sees, as a rank's tokens are elsewhere
        "model.layers.*.self_attn.[qk]_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=TOKENS),
        "model.norm": GatheredNorm(),
        "lm_head": GatheredHead(output_layouts=Replicate()),
    }


def mlp_plan() -> dict[str, ParallelStyle]:
    """As `plan`, of an MLP."""
    return {
        "": PrepareModuleInput(input_layouts=TOKENS, desired_input_layouts=Replicate()),
        "gate_proj": ColwiseParallel(),
        "up_proj": ColwiseParallel(),
        "down_proj": RowwiseParallel(output_layouts=TOKENS),
    }


def sparse_plan() -> dict[str, ParallelStyle]:
    """As `plan`, of an MLP of experts: every rank has all of it, computes all tokens and goes on with its own."""
    return {
        "": PrepareModuleInputOutput(
            input_layouts=TOKENS,
            desired_input_layouts=Replicate(),
            use_local_input=True,
            output_layouts=(Replicate(), None),
            desired_output_layouts=(TOKENS, None),  # type: ignore[arg-type]
        )
    }


def shard_tensors(model: CausalLM, mesh: Mesh) -> None:
    """Spread a model, whole and the same on every rank, over the mesh's `tensor` dimension.

    Parameters become DTensors under the names they had; experts and routers stay whole. Gradients of norms are partial
    sums until they are asked for. Ranks must call the model in the same order: one micro-batch at a time.
    Raises ConfigError for dropout, whose masks would differ from rank to rank.
    """
    if not mesh.has("tensor"):
        return
    degree, along = mesh.degrees["tensor"], mesh.along("tensor")
    if model.has_dropout:
        raise ConfigError(
            "E-CONFIG-MESH",
            what=f"parallel.tensor: {degree}: each rank has other tokens and would draw another dropout mask",
            where="parallel",
            next="set dropout: 0, or spread the ranks with data_shard",
        )
    names = [name for name, _ in model.named_modules()]
    _put(model, along, {pattern: style for pattern, style in plan().items() if matching(names, pattern)})
    for layer in model.model.layers:
        mlp: nn.Module = layer.mlp  # type: ignore[assignment]
        _put(mlp, along, sparse_plan() if isinstance(mlp, SparseMLP) else mlp_plan())
    if "model.embed_tokens" in names:
        model.model.embed_tokens.register_forward_pre_hook(partial(_refuse_uneven_rows, degree))
    if "lm_head" in names:
        model.tie_weights()
        model.vocabulary_shard = _vocabulary_shard(model, mesh)


def _put(module: nn.Module, along: DeviceMesh, styles: Mapping[str, ParallelStyle]) -> None:
    # no source: every rank cuts its part out of what it holds, nothing is sent
    parallelize_module(module, along, dict(styles), src_data_rank=None)


def _vocabulary_shard(model: CausalLM, mesh: Mesh) -> VocabularyShard:
    group = mesh.group("tensor")

    def over_ranks(operation: Any, own: Tensor) -> Tensor:
        together = own.contiguous()
        dist.all_reduce(together, operation, group=group)
        return together

    weight_VD = model.lm_head.weight
    assert isinstance(weight_VD, DTensor), "the head is spread"
    return VocabularyShard(
        first_id=mesh.coordinates["tensor"] * len(weight_VD.to_local()),
        vocab_size=len(weight_VD),
        own_rows=_own_part,
        max_over_ranks=partial(over_ranks, dist.ReduceOp.MAX),
        sum_over_ranks=partial(over_ranks, dist.ReduceOp.SUM),
    )


def _own_part(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor), "the head is spread"
    return weight.to_local()


def _refuse_uneven_rows(degree: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    length = inputs[0].shape[1]
    if length % degree:
        raise ConfigError(
            "E-CONFIG-MESH",
            what=f"rows of {length} tokens cannot be shared by {degree} tensor ranks",
            where="parallel.tensor",
            next=f"give rows a length that {degree} divides",
        )
