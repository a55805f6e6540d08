"""One product for many experts: rows sorted by expert, each run of them times its expert's matrix.

Two makers compute it, torch's grouped product and a loop. Both are operators of their own, whole for the compiler: its
own description of the grouped product knows bf16 only, and where a loop ends is not known when it compiles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16
"""Bytes that a row of a grouped product's operands must be a multiple of."""


def can_group(x_MD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether torch computes the grouped product of these: rows of whole 16 bytes, on CUDA in bf16 only."""
    sizes = (weight_EFD.shape[1] * weight_EFD.element_size(), weight_EFD.shape[2] * weight_EFD.element_size())
    is_aligned = all(size % ALIGNMENT == 0 for size in sizes)
    dtypes = (torch.bfloat16,) if x_MD.is_cuda else (torch.float32, torch.bfloat16)
    return is_aligned and x_MD.dtype in dtypes


def grouped_product(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """x W_e^T in one call of torch; `ends_E[e]` (int32) is where the rows of expert e end."""
    return _product(x_MD, weight_EFD, ends_E, True)


def looped_product(x_MD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The definition: one product after the other."""
    return _product(x_MD, weight_EFD, ends_E, False)


@torch.library.custom_op("groundup::expert_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, is_grouped: bool) -> Tensor:
    return _rows(x, weight.mT, ends, is_grouped)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, is_grouped: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("groundup::expert_product_backward", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, is_grouped: bool) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    grad_x = _rows(grad, weight, ends, is_grouped)
    if is_grouped:
        return grad_x, F.grouped_mm(grad.t(), x, offs=ends)
    grad_weight = torch.zeros_like(weight)
    for expert, (begin, end) in enumerate(_runs(ends)):
        torch.mm(grad[begin:end].t(), x[begin:end], out=grad_weight[expert])
    return grad_x, grad_weight


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, is_grouped: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _rows(x: Tensor, matrices: Tensor, ends: Tensor, is_grouped: bool) -> Tensor:
    """Each run of rows times its matrix, not transposed."""
    if is_grouped:
        return F.grouped_mm(x, matrices, offs=ends)
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for matrix, (begin, end) in zip(matrices, _runs(ends), strict=True):
        torch.mm(x[begin:end], matrix, out=out[begin:end])
    return out


def _runs(ends: Tensor) -> list[tuple[int, int]]:
    last = ends.tolist()
    return list(zip([0, *last[:-1]], last, strict=True))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    x, weight, ends, ctx.is_grouped = inputs
    ctx.save_for_backward(x, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return (*_gradients(grad, *ctx.saved_tensors, ctx.is_grouped), None, None)


_product.register_autograd(_backward, setup_context=_keep)
