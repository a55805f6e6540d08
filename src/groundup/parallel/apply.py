"""What is put onto a model from outside, in one order."""

import torch

from groundup.base.errors import ConfigError
from groundup.model.causal_lm import CausalLM
from groundup.parallel.mesh import Mesh
from groundup.parallel.recompute import Recompute, recompute_blocks
from groundup.parallel.world import World

MOST_SHAPES = 128
"""Shapes of rows that one run may meet: of training and of each validation set, full and cut."""


def apply(
    model: CausalLM,
    *,
    recompute: Recompute,
    compiles: bool,
    world: World | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Pipeline, tensor, context, experts; recompute, then compile, then shard, each block in place: no name of a parameter changes.

    In this order, so that the compiler sees what is computed again, and FSDP what is compiled. Before the optimizer is
    made. `dtype` is what shards are computed in. Raises ConfigError for what a dimension of the mesh does not go with: fewer layers than stages,
    whole blocks computed again, compiled, under tensor parallelism (torch 2.13 fails on it), dropout there, an
    attention maker that context parallelism does not know.
    """
    mesh = world.mesh if world is not None else Mesh()
    # late imports: of what they bring a run on one rank needs nothing
    if world is not None and mesh.has("pipeline"):
        from groundup.parallel.pipeline import cut_into_stages

        cut_into_stages(model, mesh, world.parallel.pipeline_schedule)
    if mesh.has("tensor"):
        from groundup.parallel.tensor import shard_tensors

        shard_tensors(model, mesh)
    if mesh.has("context"):
        from groundup.parallel.context import share_tokens

        share_tokens(model, mesh)
    if mesh.has("expert"):
        from groundup.parallel.expert import share_experts

        share_experts(model, mesh)
    recompute_blocks(model, recompute)
    if compiles:
        if recompute == "block" and model.vocabulary_shard is not None:
            raise ConfigError(
                "E-CONFIG-MESH",
                what="with parallel.tensor torch cannot compile a block that is computed again as a whole",
                where="activation_checkpointing: block",
                next="set activation_checkpointing: selective, or compile: false",
            )
        # every block of a process shares one code, and past a limit its shapes would be computed uncompiled without a word
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        for block in model.model.layers:
            # each shape for itself: kernels for any shape would depend on which one came first, and so would the bits
            block.compile(dynamic=False)
    if world is not None and mesh.has("data_shard") and not mesh.zero_stage:  # DeepSpeed's engine shards by itself
        from groundup.parallel.sharding import shard_parameters

        shard_parameters(model, mesh, world.parallel, dtype=dtype)
