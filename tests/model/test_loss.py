"""The one loss against full logits."""

import pytest
import torch
from torch.nn import functional as F

from groundup.model import loss
from groundup.model.loss import IGNORE_INDEX, PLAIN, LossOptions, linear_cross_entropy

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def random_case(dtype, *, seed=0, size=(3, 11), hidden=16, vocab=50, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    h_BTD = torch.randn(*size, hidden, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    labels_BT = torch.randint(0, vocab, size, generator=generator)
    labels_BT[torch.rand(size, generator=generator) < ignored] = IGNORE_INDEX
    return h_BTD, weight_VD, labels_BT


@pytest.mark.parametrize("chunk_elements", [1, 50 * 4, 50 * 5 + 49, 1 << 21])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_loss_and_gradients_equal_those_of_full_logits(monkeypatch, dtype, ignored, chunk_elements):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", chunk_elements)
    h_BTD, weight_VD, labels_BT = random_case(dtype, ignored=ignored)
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT)
    gradients = torch.autograd.grad(sums.loss_sum * 0.25, (h_BTD, weight_VD))
    full_BTV = h_BTD.float() @ weight_VD.float().t()
    per_token = F.cross_entropy(
        full_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    expected = torch.autograd.grad(per_token.sum() * 0.25, (h_BTD, weight_VD))
    torch.testing.assert_close(sums.loss_sum, per_token.sum(), **TOLERANCE[dtype])
    torch.testing.assert_close(sums.per_token_BT.flatten(), per_token, **TOLERANCE[dtype])
    assert sums.num_tokens == int((labels_BT != IGNORE_INDEX).sum()) and not sums.per_token_BT.requires_grad
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, **TOLERANCE[dtype])


def test_fp32_keeps_the_chunks_of_earlier_runs_and_16_bits_have_even_ones():
    chunks = {dtype: list(loss._chunks(10, 4, dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert chunks[torch.float32] == [(0, 4), (4, 8), (8, 10)] and list(loss._chunks(0, 4, torch.float32)) == []
    assert chunks[torch.bfloat16] == [(0, 3), (3, 6), (6, 10)] and list(loss._chunks(0, 4, torch.bfloat16)) == []


@pytest.mark.parametrize("rows", [1, 4, 5, 7, 33, 1000])
def test_the_head_s_gradient_in_bf16_is_that_of_all_rows_however_many_are_gathered(monkeypatch, rows):
    """Chunks of at most four rows, gathered up to `rows` of them for one product."""
    h_BTD, weight_VD, labels_BT = random_case(torch.bfloat16, ignored=0.0)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 50 * 4)
    monkeypatch.setattr(loss, "GATHERED_BYTES", 50 * rows * 2)
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT)
    found = torch.autograd.grad(sums.loss_sum, weight_VD)[0]
    full = F.cross_entropy(h_BTD.float().flatten(0, 1) @ weight_VD.float().t(), labels_BT.flatten(), reduction="sum")
    wanted = torch.autograd.grad(full, weight_VD)[0]
    assert (found.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("options", [PLAIN, LossOptions(z_loss=0.1, label_smoothing=0.1)])
def test_rows_that_go_through_softmax_at_a_time_change_no_bit(monkeypatch, options, dtype):
    h_BTD, weight_VD, labels_BT = random_case(dtype)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 50 * 7)
    found = []
    for num_rows in (1, 3, 1000):
        monkeypatch.setattr(loss, "CACHED_ELEMENTS", 50 * num_rows)
        sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT, options=options, grad_scale=4.0)
        gradients = torch.autograd.grad(sums.loss_sum, (h_BTD, weight_VD))
        found.append([sums.loss_sum, sums.per_token_BT, *sums.extras.values(), *gradients])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_label_at_all_costs_nothing(dtype):
    h_BTD, weight_VD, labels_BT = random_case(dtype, ignored=2.0)
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT)
    assert sums.loss_sum == 0 and sums.num_tokens == 0 and not sums.per_token_BT.any()
    for gradient in torch.autograd.grad(sums.loss_sum, (h_BTD, weight_VD)):
        assert (gradient == 0).all()


def test_frozen_hidden_states_or_head_get_no_gradient():
    h_BTD, weight_VD, labels_BT = random_case(torch.float32)
    both = torch.autograd.grad(linear_cross_entropy(h_BTD, weight_VD, labels_BT).loss_sum, (h_BTD, weight_VD))
    one = torch.autograd.grad(linear_cross_entropy(h_BTD, weight_VD.detach(), labels_BT).loss_sum, h_BTD)[0]
    other = torch.autograd.grad(linear_cross_entropy(h_BTD.detach(), weight_VD, labels_BT).loss_sum, weight_VD)[0]
    assert torch.equal(one, both[0]) and torch.equal(other, both[1])
    with torch.no_grad():
        assert linear_cross_entropy(h_BTD, weight_VD, labels_BT).loss_sum.isfinite()


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_extreme_logits_stay_finite(scale):
    h_BTD, weight_VD, labels_BT = random_case(torch.float32)
    h_BTD = (h_BTD.detach() * scale).requires_grad_()
    sums = linear_cross_entropy(h_BTD, weight_VD, labels_BT)
    gradients = torch.autograd.grad(sums.loss_sum, (h_BTD, weight_VD))
    assert sums.loss_sum.isfinite() and (sums.per_token_BT >= 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradient_passes_the_numerical_check(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 30)
    h_BTD, weight_VD, labels_BT = random_case(torch.float32, size=(1, 4), hidden=3, vocab=7)

    def value(h, weight):
        return linear_cross_entropy(h.float(), weight.float(), labels_BT).loss_sum

    for at in range(3):
        step = torch.zeros_like(h_BTD)
        step[0, at, at] = 1e-2
        numerical = (value(h_BTD + step, weight_VD) - value(h_BTD - step, weight_VD)) / 2e-2
        exact = torch.autograd.grad(value(h_BTD, weight_VD), h_BTD)[0][0, at, at]
        torch.testing.assert_close(exact, numerical, rtol=1e-2, atol=1e-3)


def test_a_shift_of_labels_by_none_or_two_is_another_loss(make_model):
    """The oracle of case P02: on x[t+1] = x[t] + 1 a model that knows the rule has loss 0 for one shift only."""
    vocab = 12
    tokens_BT = torch.arange(vocab)[None] % vocab
    weight_VD = torch.eye(vocab) * 50
    h_BTD = torch.nn.functional.one_hot((tokens_BT + 1) % vocab, vocab).float()
    losses = [float(linear_cross_entropy(h_BTD, weight_VD, (tokens_BT + shift) % vocab).loss_sum) for shift in range(3)]
    assert losses[1] < 1e-6 and losses[0] > 100 and losses[2] > 100


def test_a_scale_inside_keeps_small_gradients_in_fp16():
    """Of a sure model every other probability, e^-18, rounds to 0 in fp16; the result is that of no scale."""
    weight_VD = torch.eye(64)
    labels_BT = torch.arange(20)[None]
    h_BTD = weight_VD[labels_BT] * 18
    gradients = []
    for dtype, scale in (
        (torch.float32, 1.0),
        (torch.float32, 2.0**12),
        (torch.float16, 1.0),
        (torch.float16, 2.0**12),
    ):
        h, weight = (t.detach().to(dtype).clone().requires_grad_() for t in (h_BTD, weight_VD))
        (linear_cross_entropy(h, weight, labels_BT, grad_scale=scale).loss_sum * 2.0**12).backward()
        gradients.append(torch.cat([h.grad.flatten(), weight.grad.flatten()]).double())
    plain, scaled, lost, kept = gradients
    torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-6)
    assert (kept - plain).norm() < 0.03 * plain.norm() < (lost - plain).norm() < plain.norm()
