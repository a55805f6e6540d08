"""FSDP2: weights, gradients and optimizer in shards; a block's weights are whole only while it computes (ZeRO,
arXiv:1910.02054; Zhao et al., arXiv:2304.11277)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from groundup.model.causal_lm import CausalLM
from groundup.model.moe import Router
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import shard_dim
from groundup.parallel.mesh import Mesh


def shard_parameters(model: CausalLM, mesh: Mesh, config: ParallelConfig, *, dtype: torch.dtype) -> None:
    """Shard every block, then what is left, over `data_shard`; `data_replicate` holds copies of the shards (HSDP).

    Computes in `dtype` from shards in fp32; gradients are summed, never averaged, in fp32. Routers compute in fp32.
    """
    dims = mesh.along("data_replicate", "data_shard") if mesh.has("data_replicate") else mesh.along("data_shard")

    # no gradient moves them; they stay whole
    kept = {*model.balance_biases().values(), *_indivisible(model, mesh.degrees["data_shard"])}

    def shard(module: nn.Module, dtype: torch.dtype) -> None:
        fully_shard(
            module,
            mesh=dims,
            ignored_params=kept,
            reshard_after_forward=config.shard == "parameters" and module is not model,
            shard_placement_fn=partial(_placement, mesh.degrees["data_shard"]),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        )

    for block in model.model.layers:
        if dtype != torch.float32:
            for module in block.modules():
                if isinstance(module, Router):
                    shard(module, torch.float32)
        shard(block, dtype)
    shard(model, dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor of 1 by NCCL's scaled sum, which gloo lacks


def _placement(num_shards: int, parameter: nn.Parameter) -> Shard:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(shard_dim(tuple(local.shape), num_shards))


def _indivisible(model: nn.Module, num_shards: int) -> Iterator[nn.Parameter]:
    """4-bit matrices too small to be cut: their scales are kept in blocks, and a shard holds whole ones."""
    for parameter in model.parameters():
        factors = getattr(parameter, "quantization_factor", None)
        if factors is not None and factors.numel() % num_shards:
            yield parameter


def sums_now(model: nn.Module, is_last: bool) -> None:
    """Whether this micro-batch's backward sums gradients over the ranks, those of the ones before with it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def unsharded(model: nn.Module, config: ParallelConfig) -> Iterator[None]:
    """Inside, every rank holds the weights whole, and modules can be called in any order. Collective."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(config.shard == "parameters" and module is not model, recurse=False)
