"""Every way to compute attention gives the same, forward and backward, inside the walls of a row."""

import pytest
import torch

from groundup.model import attention
from groundup.model.attention import MAKERS, chunked, dense
from groundup.model.segments import Segments

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def random_inputs(length, *, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q_BHTK = torch.randn(2, 4, length, 8, generator=generator)
    k_BGTK, v_BGTK = (torch.randn(2, groups, length, 8, generator=generator) for _ in range(2))
    is_start_BT = torch.rand(2, length, generator=generator) < 0.2
    return [q_BHTK, k_BGTK, v_BGTK], Segments.from_borders(is_start_BT).bias_B1TT(torch.float32)


def value_and_gradients(maker, inputs, bias):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out_BHTK = maker(*inputs, bias)
    weights = torch.randn(out_BHTK.shape, generator=torch.Generator().manual_seed(9))
    return out_BHTK, *torch.autograd.grad((out_BHTK * weights).sum(), inputs)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 16, 33])
def test_makers_agree_with_the_definition(monkeypatch, length, groups, chunk):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    inputs, bias = random_inputs(length, groups=groups)
    expected = value_and_gradients(by_hand, inputs, bias)
    for name, maker in MAKERS.items():
        for found, wanted in zip(value_and_gradients(maker, inputs, bias), expected, strict=True):
            torch.testing.assert_close(found, wanted, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def by_hand(q_BHTK, k_BGTK, v_BGTK, bias_B1TT):
    """One query at a time, only over the keys it may see."""
    rows = []
    for b in range(q_BHTK.shape[0]):
        for h in range(q_BHTK.shape[1]):
            group = h // (q_BHTK.shape[1] // k_BGTK.shape[1])
            for t in range(q_BHTK.shape[2]):
                seen = (bias_B1TT[b, 0, t] == 0).nonzero().squeeze(1)
                scores = k_BGTK[b, group].index_select(0, seen) @ q_BHTK[b, h, t] / q_BHTK.shape[3] ** 0.5
                rows.append(scores.softmax(0) @ v_BGTK[b, group].index_select(0, seen))
    return torch.stack(rows).view(q_BHTK.shape)


def test_chunks_read_only_keys_up_to_their_end(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 4)
    seen = []
    monkeypatch.setattr(attention, "dense", lambda q, k, v, bias: seen.append(k.shape[2]) or dense(q, k, v, bias))
    inputs, bias = random_inputs(10)
    chunked(*inputs, bias)
    assert seen == [4, 8, 10]


@pytest.mark.parametrize("maker", list(MAKERS))
def test_the_model_uses_the_maker_it_is_told(monkeypatch, make_model, maker):
    model = make_model()
    calls = []
    monkeypatch.setitem(MAKERS, maker, lambda *inputs: calls.append(maker) or dense(*inputs))
    model.use_attention(maker)
    model.logits(torch.zeros(1, 5, dtype=torch.int64))
    assert calls == [maker] * 2


@pytest.mark.parametrize("maker", list(MAKERS))
def test_makers_give_the_same_logits_in_bf16(make_model, maker):
    model = make_model().to(torch.bfloat16)
    tokens_BT = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    segments = Segments.from_borders(torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.2)
    model.use_attention("dense")
    expected = model.logits(tokens_BT, segments)
    model.use_attention(maker)
    torch.testing.assert_close(model.logits(tokens_BT, segments), expected, rtol=3e-2, atol=3e-2)
