"""What is put onto a model from outside, in one order."""

from groundup.model.causal_lm import CausalLM
from groundup.parallel.recompute import Recompute, recompute_blocks


def apply(model: CausalLM, *, recompute: Recompute, compiles: bool) -> None:
    """Recompute, then compile, each block in place: no name of a parameter changes.

    In this order, so that the compiler sees what is computed again. Before the optimizer is made.
    """
    recompute_blocks(model, recompute)
    if compiles:
        for block in model.model.layers:
            # each shape for itself: kernels for any shape would depend on which one came first, and so would the bits
            block.compile(dynamic=False)
