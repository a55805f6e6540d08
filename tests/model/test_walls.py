"""Documents of one row know nothing of each other (case P01)."""

import pytest
import torch

from groundup.model import attention
from groundup.model.attention import MAKERS
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments

LENGTHS = [9, 1, 14, 6]


def pack(seed):
    """A row of four documents: tokens, labels, segments, the place of each document."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, 400, (1, sum(LENGTHS)), generator=generator)
    labels_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
    is_start_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    places, at = [], 0
    for length in LENGTHS:
        is_start_BT[0, at] = True
        labels_BT[0, at : at + length - 1] = tokens_BT[0, at + 1 : at + length]
        places.append(slice(at, at + length))
        at += length
    return tokens_BT, labels_BT, Segments.from_borders(is_start_BT), places


def logits_and_input_gradients(model, tokens_BT, segments, labels_BT):
    """Logits, and the gradient of the labels' loss with respect to each position's embedding."""
    embeddings = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, __, x_BTD: (x_BTD.retain_grad(), embeddings.append(x_BTD))[0]
    )
    logits_BTV = model.logits(tokens_BT, segments).detach()
    model(tokens_BT, segments, labels_BT).loss_sum.backward()
    hook.remove()
    return logits_BTV, embeddings[-1].grad


@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_a_token_of_one_document_changes_nothing_in_another(monkeypatch, make_model, model_type, maker):
    monkeypatch.setattr(attention, "CHUNK", 8)
    model = make_model(model_type=model_type)
    model.use_attention(maker)
    tokens_BT, labels_BT, segments, places = pack(seed=0)
    logits, gradients = logits_and_input_gradients(model, tokens_BT, segments, labels_BT)
    for changed in (0, 2, 3):
        other_BT = tokens_BT.clone()
        other_BT[:, places[changed]] = (tokens_BT[:, places[changed]] + 7) % 400
        own_labels_BT = labels_BT.clone()
        logits_now, gradients_now = logits_and_input_gradients(model, other_BT, segments, own_labels_BT)
        for document, place in enumerate(places):
            if document != changed:
                assert torch.equal(logits_now[:, place], logits[:, place]), f"{changed} leaks into {document}"
                assert torch.equal(gradients_now[:, place], gradients[:, place]), f"{changed} leaks into {document}"
        assert not torch.equal(logits_now[:, places[changed]], logits[:, places[changed]])


@pytest.mark.parametrize("maker", list(MAKERS))
def test_the_loss_of_one_document_has_no_gradient_in_another(make_model, maker):
    model = make_model()
    model.use_attention(maker)
    tokens_BT, labels_BT, segments, places = pack(seed=1)
    for document in (0, 2, 3):
        own_BT = torch.full_like(labels_BT, IGNORE_INDEX)
        own_BT[:, places[document]] = labels_BT[:, places[document]]
        _, gradients = logits_and_input_gradients(model, tokens_BT, segments, own_BT)
        inside = torch.zeros(gradients.shape[1], dtype=torch.bool)
        inside[places[document]] = True
        assert (gradients[0, ~inside] == 0).all()
        assert (gradients[0, inside] != 0).any()


@pytest.mark.parametrize("maker", list(MAKERS))
def test_packed_equals_separate(make_model, maker):
    model = make_model()
    model.use_attention(maker)
    for seed in range(5):
        tokens_BT, labels_BT, segments, places = pack(seed)
        logits_BTV = model.logits(tokens_BT, segments)
        packed = model(tokens_BT, segments, labels_BT)
        packed_gradients = torch.autograd.grad(packed.loss_sum, list(model.parameters()))
        loss_sum, gradients = torch.zeros(()), [torch.zeros_like(parameter) for parameter in model.parameters()]
        for place in places:
            own_BT = tokens_BT[:, place]
            alone_BTV = model.logits(own_BT)
            scale = alone_BTV.abs().max()
            assert (logits_BTV[:, place] - alone_BTV).abs().max() <= 1e-6 * scale
            sums = model(own_BT, Segments.whole_rows(1, own_BT.shape[1]), labels_BT[:, place])
            loss_sum = loss_sum + sums.loss_sum
            parts = torch.autograd.grad(sums.loss_sum, list(model.parameters()))
            gradients = [total + part for total, part in zip(gradients, parts, strict=True)]
        torch.testing.assert_close(packed.loss_sum, loss_sum, rtol=1e-6, atol=0)
        for one, other in zip(packed_gradients, gradients, strict=True):
            # four sums of products, each rounded in its own order
            assert (one - other).norm() <= 2e-6 * other.norm()


def test_segments_by_hand():
    segments = Segments.from_borders(torch.tensor([[False, False, True, False, True, True]]))
    assert segments.starts_BT.tolist() == [[0, 0, 2, 2, 4, 5]]
    assert segments.position_ids_BT.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert segments.mask_BTT()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    bias = segments.bias_B1TT(torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 1, 6, 6)
    assert torch.equal(bias[0, 0] == 0, segments.mask_BTT()[0]) and bias.min() == float("-inf")
