"""What is put onto a model from outside, in one order."""

import torch

from groundup.base.errors import ConfigError
from groundup.model.causal_lm import CausalLM
from groundup.parallel.recompute import Recompute, recompute_blocks

MOST_SHAPES = 128
"""Shapes of rows that one run may meet: of training and of each validation set, full and cut."""


def apply(model: CausalLM, *, recompute: Recompute, compiles: bool) -> None:
    """Recompute, then compile, each block in place: no name of a parameter changes.

    In this order, so that the compiler sees what is computed again. Before the optimizer is made. Raises ConfigError for
    whole blocks computed again, compiled, under tensor parallelism: torch 2.13 fails on it.
    """
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
