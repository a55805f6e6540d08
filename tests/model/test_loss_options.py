"""z-loss and label smoothing inside the one loss, against plain torch on full logits."""

import pytest
import torch
from torch.nn import functional as F

from groundup.model import loss
from groundup.model.loss import IGNORE_INDEX, PLAIN, LossOptions, linear_cross_entropy

OPTIONS = [LossOptions(z_loss=0.01), LossOptions(label_smoothing=0.1), LossOptions(z_loss=0.3, label_smoothing=0.25)]
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def random_case(dtype, *, seed=0, size=(3, 11), hidden=16, vocab=50, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    h_BTD = torch.randn(*size, hidden, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    labels_BT = torch.randint(0, vocab, size, generator=generator)
    labels_BT[torch.rand(size, generator=generator) < ignored] = IGNORE_INDEX
    return h_BTD, weight_VD, labels_BT


def on_full_logits(h_BTD, weight_VD, labels_BT, options):
    """(objective, negative log-likelihood, log²Z), each a sum, by torch's own functions."""
    flat_NV, labels_N = (h_BTD @ weight_VD.t()).flatten(0, 1), labels_BT.flatten()
    smoothed, plain = (
        F.cross_entropy(flat_NV, labels_N, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=share)
        for share in (options.label_smoothing, 0.0)
    )
    squares = (torch.logsumexp(flat_NV, dim=1).square() * (labels_N != IGNORE_INDEX)).sum()
    return smoothed + options.z_loss * squares, plain, squares


@pytest.mark.parametrize("chunk_elements", [1, 50 * 5 + 49, 1 << 21])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_objective_and_gradients_equal_those_of_full_logits(monkeypatch, dtype, options, chunk_elements):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_elements)
    h_BTD, weight_VD, labels_BT = random_case(dtype)
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=options)
    found = torch.autograd.grad(sums.loss_sum * 0.25, (h_BTD, weight_VD))
    full = [t.detach().float().requires_grad_() for t in (h_BTD, weight_VD)]
    objective, plain, squares = on_full_logits(*full, labels_BT, options)
    wanted = torch.autograd.grad(objective * 0.25, full)
    torch.testing.assert_close(sums.loss_sum, objective, **TOLERANCE[dtype])
    torch.testing.assert_close(sums.nll_sum, plain, **TOLERANCE[dtype])
    assert tuple(sums.extras) == options.terms() and not any(term.requires_grad for term in sums.extras.values())
    if options.z_loss:
        torch.testing.assert_close(sums.extras["z_loss"], squares, **TOLERANCE[dtype])
    weights = {"z_loss": options.z_loss, "smoothing_loss": options.label_smoothing}
    whole = (1 - options.label_smoothing) * sums.nll_sum + sum(weights[name] * v for name, v in sums.extras.items())
    torch.testing.assert_close(whole, sums.loss_sum.detach(), rtol=1e-5, atol=1e-4)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, **TOLERANCE[dtype])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_those_of_full_logits_in_fp64(options):
    """The formula alone, without fp32's rounding: the objective of doubles against the gradient of floats."""
    h_BTD, weight_VD, labels_BT = random_case(torch.float32, seed=3)
    found = torch.autograd.grad(
        linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=options).loss_sum, (h_BTD, weight_VD)
    )
    full = [t.detach().double().requires_grad_() for t in (h_BTD, weight_VD)]
    wanted = torch.autograd.grad(on_full_logits(*full, labels_BT, options)[0], full)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 1e-6 * other.norm()


def test_options_that_are_off_change_no_bit():
    for dtype in TOLERANCE:
        h_BTD, weight_VD, labels_BT = random_case(dtype)
        results = []
        for options in (PLAIN, LossOptions(0.0, 0.0)):
            sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=options)
            assert sums.extras == {} and torch.equal(sums.loss_sum.detach(), sums.nll_sum)
            results.append((sums.loss_sum, *torch.autograd.grad(sums.loss_sum, (h_BTD, weight_VD))))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_scale_inside_changes_no_result(scale):
    h_BTD, weight_VD, labels_BT = random_case(torch.float32)
    gradients = [
        torch.autograd.grad(
            linear_cross_entropy(h_BTD, weight_VD, labels_BT, grad_scale=s, options=OPTIONS[2]).loss_sum, h_BTD
        )[0]
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_label_at_all_costs_nothing(options):
    h_BTD, weight_VD, labels_BT = random_case(torch.float32, ignored=2.0)
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=options)
    assert sums.loss_sum == 0 and all(value == 0 for value in sums.extras.values())
    for gradient in torch.autograd.grad(sums.loss_sum, (h_BTD, weight_VD)):
        assert (gradient == 0).all()


def test_large_logits_stay_finite():
    h_BTD, weight_VD, labels_BT = random_case(torch.float32)
    sums = linear_cross_entropy((h_BTD * 1e3), weight_VD, labels_BT, options=OPTIONS[2])
    assert sums.loss_sum.isfinite() and torch.autograd.grad(sums.loss_sum, weight_VD)[0].isfinite().all()


def test_z_loss_makes_log_z_small():
    """What it is for: under descent the level of the logits falls towards Z = 1."""
    h_BTD, weight_VD, labels_BT = random_case(torch.float32, ignored=0.0)
    squares = []
    for _ in range(60):
        sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=LossOptions(z_loss=1.0))
        squares.append(float(sums.extras["z_loss"]))
        (gradient,) = torch.autograd.grad(sums.loss_sum, weight_VD)
        weight_VD = (weight_VD - 1e-3 * gradient).detach().requires_grad_()
    assert squares[-1] < 0.5 * squares[0]
