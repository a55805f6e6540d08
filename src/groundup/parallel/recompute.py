"""Activation checkpointing: what the backward pass needs is computed again instead of kept (Chen et al., arXiv:1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from groundup.model.causal_lm import CausalLM

Recompute = Literal["none", "block", "selective"]


def _kept_operators() -> list[Any]:
    """Products and attention: most of a block's arithmetic, little of its memory.

    Not `bmm`: it makes the scores of `dense` and `chunked`, which outweigh everything else of a block.
    """
    import torch.nn.attention.varlen

    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
    ]


def _selective_contexts() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_kept_operators())  # type: ignore[no-untyped-call]
    return contexts


def recompute_blocks(model: CausalLM, kind: Recompute) -> None:
    """Let every block keep its input alone (`block`), or the results of its products and attention too (`selective`).

    Gradients keep their bits: what is computed again is the same, dropout included. The block calls the checkpoint, not
    the other way round, so that no name of a parameter changes.
    """
    for block in model.model.layers:
        # setting a generator's state back is work, and lanes share one: only where something is drawn
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
        block.run = _run_of(kind, draws)  # type: ignore[assignment]


def _run_of(kind: Recompute, draws: bool) -> Callable[..., Any] | None:
    if kind == "none":
        return None
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)
    return run if kind == "block" else partial(run, context_fn=_selective_contexts)
