"""Documents of one row know nothing of each other (case P01)."""

import pytest
import torch
from flash_stand_in import varlen_attn

from groundup.model import makers
from groundup.model.loss import IGNORE_INDEX
from groundup.model.makers import MAKERS
from groundup.model.segments import Segments

LENGTHS = [9, 1, 14, 6]
TRAINING_MAKERS = [maker for maker in MAKERS if maker != "flex"]


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    monkeypatch.setattr(makers, "varlen_attn", varlen_attn)


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


@pytest.mark.parametrize("maker", TRAINING_MAKERS)
@pytest.mark.parametrize(("model_type", "window"), [("qwen3", None), ("qwen2", None), ("llama", None), ("mistral", 4)])
def test_a_token_of_one_document_changes_nothing_in_another(monkeypatch, make_model, model_type, window, maker):
    monkeypatch.setattr(makers, "CHUNK", 8)
    model = make_model(model_type=model_type, sliding_window=window)
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


@pytest.mark.parametrize("maker", TRAINING_MAKERS)
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


@pytest.mark.parametrize("maker", TRAINING_MAKERS)
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
        apart = torch.stack(
            [(one - other).norm() for one, other in zip(packed_gradients, gradients, strict=True)]
        ).norm()
        assert apart <= 1e-6 * torch.stack([other.norm() for other in gradients]).norm(), "all gradients together"


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
    assert segments.mask_BTT(window=1)[0].int().tolist() == torch.eye(6, dtype=torch.int32).tolist()
    assert segments.first_seen_BT(2).tolist() == [[0, 0, 2, 2, 4, 5]]
    longer = Segments.from_borders(torch.tensor([[False, False, False, True, False, False]]))
    assert longer.first_seen_BT(2).tolist() == [[0, 0, 1, 3, 3, 4]]
    bias = segments.bias_B1TT(torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.shape == (1, 1, 6, 6)
    assert torch.equal(bias[0, 0] == 0, segments.mask_BTT()[0]) and bias.min() == float("-inf")


def test_borders_have_one_length_whatever_the_walls():
    one = Segments.from_borders(torch.tensor([[False, True, False], [False, False, False]]))
    assert one.cu_seqlens().tolist() == [0, 1, 3, 6, 6, 6, 6] and one.cu_seqlens().dtype == torch.int32
    assert Segments.from_borders(torch.ones(2, 3, dtype=torch.bool)).cu_seqlens().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert Segments.whole_rows(2, 3).cu_seqlens().tolist() == [0, 3, 6]


@pytest.mark.parametrize(("num_documents", "room"), [(1, 8), (8, 8), (9, 32), (33, 128), (500, 512)])
def test_room_for_documents_is_counted_on_the_host(num_documents, room):
    """Rows that leave the host: few sizes, never too small."""
    is_start_BT = torch.zeros(4, 128, dtype=torch.bool)
    is_start_BT[:, 0] = True
    is_start_BT.flatten()[1 : 1 + num_documents - 4] = num_documents > 4
    is_start_BT[:, 0] = True
    segments = Segments.from_borders(is_start_BT)
    moved = segments.moved(lambda starts_BT: starts_BT.to("meta"))
    assert moved.max_documents == room and segments.moved(torch.clone).max_documents is None
    begins = Segments(segments.starts_BT, room).cu_seqlens().tolist()
    assert len(begins) == room + 1 and sorted(set(begins)) == sorted(set(segments.cu_seqlens().tolist()))
