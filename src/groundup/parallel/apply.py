"""What is put onto a model from outside, in one order."""

import torch

from groundup.model.causal_lm import CausalLM
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
    """Recompute, then compile, then shard, each block in place: no name of a parameter changes.

    In this order, so that the compiler sees what is computed again, and FSDP what is compiled. Before the optimizer is
    made. `dtype` is what shards are computed in.
    """
    recompute_blocks(model, recompute)
    if compiles:
        # every block of a process shares one code, and past a limit its shapes would be computed uncompiled without a word
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        for block in model.model.layers:
            # each shape for itself: kernels for any shape would depend on which one came first, and so would the bits
            block.compile(dynamic=False)
    if world is not None and world.mesh.has("data_shard"):
        from groundup.parallel.sharding import shard_parameters

        shard_parameters(model, world.mesh, world.parallel, dtype=dtype)
