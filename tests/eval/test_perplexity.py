"""Perplexity and bits per byte."""

import math
import random

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from groundup.eval import perplexity
from groundup.eval.config import EvalConfig
from groundup.eval.perplexity import measure_texts, windows_of


def test_every_token_is_counted_exactly_once():
    generator = random.Random(0)
    for _ in range(500):
        ids = list(range(generator.randint(0, 60)))
        window = generator.randint(1, 20)
        stride = generator.randint(1, window)
        counted = []
        for piece, num_seen in windows_of(ids, window, stride):
            assert 1 < len(piece) <= window + 1 and 0 <= num_seen < len(piece) - 1
            assert list(piece) == ids[piece[0] : piece[0] + len(piece)]
            counted += piece[num_seen + 1 :]
        assert counted == ids[1:], f"{len(ids)=} {window=} {stride=}"


def test_each_prediction_but_the_first_window_looks_back_far_enough():
    for piece, num_seen in list(windows_of(list(range(100)), 16, 4))[1:]:
        assert num_seen == 12 and len(piece) <= 17


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(ValidationError, match="must not exceed"):
        EvalConfig(window=8, stride=9)


def test_a_uniform_model_by_hand(make_model):
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    measure = measure_texts(model, [([0, *range(5, 25)], 60), ([0, 7], 1), ([0], 0)], window=8, stride=4)
    assert (measure.num_tokens, measure.num_bytes, measure.num_texts) == (21, 61, 3)
    assert measure.nats == pytest.approx(21 * math.log(400), rel=1e-6)
    assert measure.perplexity == pytest.approx(400, rel=1e-6)
    assert measure.bits_per_byte == pytest.approx(21 * math.log2(400) / 61, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (64, 32), (1, 1)])
@pytest.mark.parametrize("tokens_a_batch", [1, 20, 4096])
def test_batches_and_padding_change_nothing(monkeypatch, make_model, window, stride, tokens_a_batch):
    monkeypatch.setattr(perplexity, "TOKENS_A_BATCH", tokens_a_batch)
    model, generator = make_model(), random.Random(1)
    texts = [([0, *(generator.randrange(400) for _ in range(length))], length * 3) for length in (30, 1, 9, 17, 0)]
    expected = 0.0
    for ids, _ in texts:
        for piece, num_seen in windows_of(ids, window, stride):
            with torch.no_grad():
                logits_TV = model.logits(torch.tensor([piece[:-1]]))[0]
            expected += float(
                F.cross_entropy(logits_TV[num_seen:], torch.tensor(piece[num_seen + 1 :]), reduction="sum")
            )
    measure = measure_texts(model, texts, window=window, stride=stride)
    assert measure.nats == pytest.approx(expected, rel=1e-5)
    assert measure.num_tokens == 57 and measure.num_bytes == 171


def test_a_wide_window_is_the_whole_text(make_model):
    model, ids = make_model(), [0, *range(1, 40)]
    with torch.no_grad():
        whole = F.cross_entropy(model.logits(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="sum")
    assert measure_texts(model, [(ids, 40)], window=100, stride=50).nats == pytest.approx(float(whole), rel=1e-5)
