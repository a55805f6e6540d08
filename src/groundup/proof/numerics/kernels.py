"""Proofs about how a product is computed: attention makers, compiled blocks, loss in chunks, bf16."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.base.machine import has_compiler
from groundup.model.expert_product import can_group
from groundup.model.loss import CHUNK_ELEMENTS, linear_cross_entropy
from groundup.model.makers import CHUNK, CUDA_MAKERS, AttentionMaker
from groundup.model.moe import ExpertMaker, Experts
from groundup.parallel.apply import apply
from groundup.parallel.recompute import Recompute, recompute_blocks
from groundup.proof.numerics.figures import (
    Figure,
    Outcome,
    Skip,
    distance,
    num_unequal,
    outcome_of,
    step_outcome,
    worst,
)
from groundup.proof.numerics.subject import Subject

FP32 = 1e-5
DROPOUT = 0.1
WINDOW = 5
"""Shorter than most documents of the rows, so that keys are left out."""
BF16_ROUNDOFF = 2.0**-8
ROUNDINGS_PER_BLOCK = 30
"""Results in bf16 that a value passes through in a block, there and back."""


def attention_equals_dense(subject: Subject, maker: AttentionMaker) -> Figure:
    """A maker gives the losses and gradients of the product with all scores, inside the walls of a row, in the layers'
    own windows and in a short one.

    A maker that has no fp32 is compared in bf16, all weights together.
    """
    if maker in CUDA_MAKERS and subject.device == "cpu":
        raise Skip("a CPU cannot train with it")
    model, batch = subject.model(), subject.rows(2, CHUNK * 5 // 4)
    dtype = torch.bfloat16 if maker == "varlen" else torch.float32
    model.to(dtype)
    figures = []
    for window in ("own", WINDOW):
        if isinstance(window, int):
            for layer in model.model.layers:
                layer.self_attn.window = window  # type: ignore[union-attr]
        results = []
        for name in (maker, "dense"):
            model.use_attention(name)
            results.append(outcome_of(model, batch))
        ours, reference = results
        if dtype == torch.float32:
            figures.append(ours.distance_to(reference))
        else:
            figures.append(distance([_together(ours.gradients)], [_together(reference.gradients)]))
    return Figure(worst(*figures), FP32 if dtype == torch.float32 else _of_bf16(subject))


def grouped_experts_equal_looped(subject: Subject) -> Figure:
    """The experts' grouped product gives the losses and gradients of one product after the other."""
    if not subject.has_experts:
        raise Skip("no experts")
    model, batch = subject.model(), subject.rows(2)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    if not all(can_group(weight, weight) for expert in experts for weight in expert.parameters()):
        raise Skip(f"torch groups no products of this shape in fp32 on {subject.device}")
    results = []
    makers: tuple[ExpertMaker, ...] = ("grouped", "looped")
    for maker in makers:
        for expert in experts:
            expert.maker = maker
        results.append(outcome_of(model, batch))
    return Figure(results[0].distance_to(results[1]), FP32)


def compiled_equals_eager(subject: Subject) -> Figure:
    """Compiled blocks give the losses and gradients of uncompiled ones."""
    _need_compiler(subject)
    model, batch = subject.model(), subject.rows(2)
    eager = outcome_of(model, batch)
    apply(model, recompute="none", compiles=True)
    return Figure(outcome_of(model, batch).distance_to(eager), FP32)


def compiled_chunks_are_near_fp32(subject: Subject) -> Figure:
    """What `attention: auto` takes for a compiled run in bf16 on a CPU, against the product with all scores in fp32."""
    _need_compiler(subject)
    subject = subject.with_every_expert()
    batch, gradients = subject.rows(2, CHUNK * 5 // 4), []
    makers: tuple[AttentionMaker, ...] = ("chunked", "dense")
    for maker in makers:
        model = subject.model()
        model.use_attention(maker)
        if maker == "chunked":
            apply(model.to(torch.bfloat16), recompute="none", compiles=True)
        gradients.append(_together(outcome_of(model, batch).gradients))
    return Figure(distance(gradients[:1], gradients[1:]), _of_bf16(subject))


def _need_compiler(subject: Subject) -> None:
    if subject.device == "cpu" and not has_compiler():
        raise Skip("no C++ compiler")


def recomputed_equals_plain(subject: Subject, kind: Recompute) -> Figure:
    """What is computed again in the backward pass is what was computed, dropout's masks included: no element of the loss
    or the gradients differs. On CUDA two forward passes need not have the same bits."""
    batch, results = subject.rows(2), []
    for each in ("none", kind):
        model = subject.model().train()
        model.use_dropout(DROPOUT)
        recompute_blocks(model, each)
        torch.manual_seed(0)
        results.append(outcome_of(model, batch))
    plain, again = results
    if subject.device != "cpu":
        return Figure(again.distance_to(plain), FP32)
    return Figure(num_unequal([again.losses, *again.gradients], [plain.losses, *plain.gradients]), 0)


def chunked_loss_equals_full(subject: Subject) -> Figure:
    """The loss in chunks of rows, and its gradients, are those of the cross-entropy of full logits."""
    weight_VD = subject.model().lm_head.weight.detach().requires_grad_()
    num_rows = 5 * CHUNK_ELEMENTS // (2 * len(weight_VD))  # two chunks and a half
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(num_rows, weight_VD.shape[1], generator=generator).to(subject.device).requires_grad_()
    labels_N = torch.randint(0, len(weight_VD), (num_rows,), generator=generator).to(subject.device)
    losses = [
        linear_cross_entropy(h_ND[None], weight_VD, labels_N[None]).loss_sum,
        F.cross_entropy(h_ND @ weight_VD.t(), labels_N, reduction="sum"),
    ]
    chunked, full = (Outcome(loss, torch.autograd.grad(loss, [h_ND, weight_VD])) for loss in losses)
    return Figure(chunked.distance_to(full), FP32)


def bf16_is_near_fp32(subject: Subject) -> Figure:
    """The gradient of the bf16 policy, all weights together, lies as near to that of fp32 as its roundings explain.

    A rounding moves a value by at most 2^-8 of itself. Roundings are independent, so n of them in a row move it by
    about sqrt(n) as much. One weight of few elements may lie further off. Every token is given to every expert: which
    of two nearly equal ones is chosen is no matter of precision.
    """
    subject = subject.with_every_expert()
    gradients = [
        _together(step_outcome(subject.engine(dtype=dtype), subject.rows()).gradients)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return Figure(distance(gradients[:1], gradients[1:]), _of_bf16(subject))


def _together(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def _of_bf16(subject: Subject) -> float:
    return BF16_ROUNDOFF * (ROUNDINGS_PER_BLOCK * subject.config.num_hidden_layers) ** 0.5
