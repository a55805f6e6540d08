"""Adafactor against torch's, and over stacks."""

import pytest
import torch

from groundup.optim.adafactor import Adafactor

SETTINGS = {"lr": 0.3, "weight_decay": 0.1}
"""From step 12 on the rate is 1/sqrt(step)."""
SHAPES = [(6, 10), (10, 6), (1, 8), (16,), (1,)]


def parameters(shapes, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(scale * torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, params, steps=20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in params]


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["random", "zeros"])
def test_it_is_torchs(scale):
    ours, theirs, start = (parameters(SHAPES, scale) for _ in range(3))
    expected = train(torch.optim.Adafactor(theirs, foreach=False, **SETTINGS), theirs)
    for found, wanted, began in zip(train(Adafactor(ours, **SETTINGS), ours), expected, start, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(wanted, began, rtol=1e-3)


def test_a_stack_is_its_matrices_one_by_one():
    (stacked,) = parameters([(3, 6, 10)])
    with torch.no_grad():
        stacked *= torch.tensor([0.1, 1.0, 10.0])[:, None, None]  # a scale of all three would show
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    optimizers = Adafactor([stacked], **SETTINGS), Adafactor(alone, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        stacked.grad = torch.randn(stacked.shape, generator=generator)
        for parameter, gradient in zip(alone, stacked.grad, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)


def test_an_update_is_relative_and_clipped():
    (parameter,) = parameters([(8, 8)])
    before = parameter.detach().clone()
    parameter.grad = 1e6 * torch.ones_like(parameter)
    Adafactor([parameter], lr=0.02, weight_decay=0.0).step()
    change = (parameter.detach() - before).square().mean().sqrt()
    torch.testing.assert_close(change, 0.02 * before.square().mean().sqrt(), rtol=1e-4, atol=0.0)


def test_a_parameter_without_gradient_stays():
    one, other = parameters([(4, 4), (4, 4)])
    before = other.detach().clone()
    one.grad = torch.ones_like(one)
    Adafactor([one, other], **SETTINGS).step()
    assert torch.equal(other.detach(), before)
