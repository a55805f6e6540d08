"""Muon against torch's, and over stacks."""

import pytest
import torch

from groundup.optim import muon
from groundup.optim.muon import Muon, orthogonalize

SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
SHAPES = [(16, 16), (24, 8), (8, 24), (1, 8), (40, 3)]


def matrices(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(optimizer, parameters, steps=5):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def newton_schulz_of_torch(update_NMK):
    """torch's, which computes in bf16, a matrix at a time."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    results = [_zeropower_via_newtonschulz(matrix, muon.NEWTON_SCHULZ, muon.STEPS, 1e-7) for matrix in update_NMK]
    return torch.stack(results).to(update_NMK.dtype)


def their_muon(parameters):
    return torch.optim.Muon(
        parameters, nesterov=True, ns_coefficients=muon.NEWTON_SCHULZ, ns_steps=muon.STEPS, **SETTINGS
    )


@pytest.mark.parity
def test_it_is_torchs_but_for_the_dtype_of_newton_schulz(monkeypatch):
    ours, theirs = matrices(), matrices()
    expected = train(their_muon(theirs), theirs)
    monkeypatch.setattr(muon, "orthogonalize", newton_schulz_of_torch)
    for found, wanted in zip(train(Muon(ours, **SETTINGS), ours), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parity
def test_it_is_torchs_where_both_compute_in_fp32(monkeypatch):
    ours, theirs = matrices(), matrices()
    found = train(Muon(ours, **SETTINGS), ours)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    for mine, wanted in zip(found, train(their_muon(theirs), theirs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_fp32_newton_schulz_is_near_torchs_bf16():
    ours, theirs, start = matrices(), matrices(), matrices()
    expected = train(their_muon(theirs), theirs)
    for found, wanted, began in zip(train(Muon(ours, **SETTINGS), ours), expected, start, strict=True):
        assert (found - wanted).norm() < 0.03 * (wanted - began).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_is_its_matrices_one_by_one(shape):
    stacked = matrices([(3, *shape)])
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stacked[0].detach()]
    optimizers = Muon(stacked, **SETTINGS), Muon(alone, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        stacked[0].grad = torch.randn(stacked[0].shape, generator=generator)
        for parameter, gradient in zip(alone, stacked[0].grad, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stacked[0].detach(), torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)


def test_neighbours_of_one_shape_do_not_mix():
    three = matrices([(8, 8)] * 3)
    together = train(Muon(three, **SETTINGS), three, steps=1)
    generator = torch.Generator().manual_seed(1)
    for index, parameter in enumerate(matrices([(8, 8)] * 3)):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        Muon([parameter], **SETTINGS).step()
        torch.testing.assert_close(parameter.detach(), together[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_nearly_orthogonal(shape):
    direction = orthogonalize(torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)))[0]
    singular = torch.linalg.svdvals(direction)
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert torch.isfinite(orthogonalize(torch.zeros(1, *shape))).all()


def test_a_parameter_without_gradient_stays():
    one, other = matrices([(4, 4)] * 2)
    before = other.detach().clone()
    one.grad = torch.ones_like(one)
    Muon([one, other], **SETTINGS).step()
    assert torch.equal(other.detach(), before)


def test_parts_given_to_others_change_no_bit():
    whole, parted, given = matrices(SHAPES * 3), matrices(SHAPES * 3), []

    def map_parts(function, parts):
        given.extend(len(part) for part in parts)
        return map(function, parts)

    expected = train(Muon(whole, **SETTINGS), whole)
    found = train(Muon(parted, num_parts=2, map_parts=map_parts, **SETTINGS), parted)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert given == [2, 1] * 5 * len(SHAPES)
