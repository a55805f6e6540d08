"""A look at held-out rows."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from groundup.adapters.config import AdapterConfig
from groundup.adapters.lora import MARK, inject_lora
from groundup.data.rows import RowBatch, read_batch
from groundup.model.segments import Segments
from groundup.train.validation import repeats_BT, validation_figures, weighted_loss


@pytest.mark.parametrize("micro_batch_rows", [1, 3, 64])
def test_figures_are_those_of_full_logits(make_model, make_rows, micro_batch_rows):
    model, rows = make_model().train(), make_rows()
    token_bytes = np.full(400, 3, dtype=np.int32)
    token_bytes[0] = 0  # end of text
    figures = validation_figures(
        model, rows, max_rows=5, micro_batch_rows=micro_batch_rows, device="cpu", token_bytes=token_bytes
    )
    batch = read_batch(rows, 0, 5)
    with torch.no_grad():
        logits_BTV = model.logits(batch.tokens_BT, batch.segments)
    labels = batch.labels_BT.flatten()
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), labels, reduction="none")
    assert figures["loss"] == pytest.approx(float(losses.sum()) / batch.num_loss_tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    real = labels > 0
    assert 0 < int(real.sum()) < batch.num_loss_tokens, "an end-of-text is among the labels"
    wanted = float(losses[real].sum()) / math.log(2) / (3 * int(real.sum()))
    assert figures["bits_per_byte"] == pytest.approx(wanted, rel=1e-5)
    assert model.training


def test_a_look_is_without_dropout_and_leaves_the_model_training(make_model, make_rows):
    rows = make_rows()
    sizes = {"max_rows": 2, "micro_batch_rows": 2, "device": "cpu", "token_bytes": None}
    models = [make_model() for _ in range(2)]
    for model, dropout in zip(models, (0.0, 0.5), strict=True):
        inject_lora(model, AdapterConfig(adapter="lora", lora_dropout=dropout), seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if MARK in name:
                    parameter.fill_(0.1)
        model.train()
    batch = read_batch(rows, 0, 2)
    trained = [float(model(batch.tokens_BT, batch.segments, batch.labels_BT).nll_sum) for model in models]
    assert trained[0] != trained[1], "dropout is at work in training"
    assert validation_figures(models[0], rows, **sizes) == validation_figures(models[1], rows, **sizes)
    assert models[1].training


def test_no_bytes_no_bits_and_no_labels_no_figures(make_model, make_rows):
    rows = make_rows()
    sizes = {"max_rows": 2, "micro_batch_rows": 2, "device": "cpu", "token_bytes": None}
    figures = set(validation_figures(make_model(), rows, **sizes))
    assert figures - {"repeat_loss", "first_loss", "repeat_share"} == {"loss", "perplexity"}
    whole = rows.row
    rows.row = lambda index: (whole(index)[0], np.full(16, -100), whole(index)[2])
    assert validation_figures(make_model(), rows, **sizes) == {}


def batch_of(tokens, labels, starts):
    tensors = [torch.tensor(rows) for rows in (tokens, labels, starts)]
    return RowBatch(tensors[0], tensors[1], Segments(tensors[2]), int((tensors[1] != -100).sum()))


def test_a_repeat_is_a_pair_that_stood_before_in_its_document_and_row():
    batch = batch_of(
        [[1, 2, 3, 1, 2, 3, 1], [1, 2, 1, 2, 1, 2, 9], [1, 2, 3, 1, 2, 3, 1]],
        [[2, 3, 1, 2, 3, 1, 4], [2, 1, 2, 1, 2, 9, 9], [2, 3, 1, 2, -100, 1, 2]],
        [[0, 0, 0, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0]],
    )
    wanted = [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1]]
    to_come = [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [2, 0, 1, 0, 0, 0, 0]]
    assert [one.astype(int).tolist() for one in repeats_BT(batch)] == [to_come, wanted]


@pytest.mark.parametrize("label", [52, 53])
def test_what_is_not_supervised_is_no_pair(label):
    # counted by 152 or 153, 151 then -100 would be the same number as 150 then 52 or 53
    batch = batch_of([[150, 151, 150, 0]], [[label, -100, label, 151]], [[0] * 4])
    assert [one.astype(int).tolist() for one in repeats_BT(batch)] == [[[1, 0, 0, 0]], [[0, 0, 1, 0]]]


def test_the_loss_of_repeats_is_theirs_alone(make_model):
    model, generator = make_model(), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (4, 17), generator=generator).tolist()
    batch = batch_of([row[:-1] for row in tokens], [row[1:] for row in tokens], [[0] * 16] * 4)

    class Rows:
        rows_per_epoch = 4

        def row(self, index):
            return tuple(tensor[index].numpy() for tensor in (batch.tokens_BT, batch.labels_BT, batch.segments.starts_BT))  # fmt: skip

    sizes = {"max_rows": 4, "micro_batch_rows": 3, "device": "cpu", "token_bytes": None}
    figures = validation_figures(model, Rows(), **sizes)
    with torch.no_grad():
        logits_BTV = model.logits(batch.tokens_BT, batch.segments)
    losses_BT = F.cross_entropy(logits_BTV.mT, batch.labels_BT, reduction="none").numpy()
    to_come_BT, is_repeat_BT = repeats_BT(batch)
    assert 0 < is_repeat_BT.mean() < 1
    assert figures["repeat_share"] == pytest.approx(is_repeat_BT.mean())
    assert figures["repeat_loss"] == pytest.approx(losses_BT[is_repeat_BT].mean(), rel=1e-5)
    assert figures["first_loss"] == pytest.approx(np.average(losses_BT, weights=to_come_BT), rel=1e-5)
    assert figures["repeat_loss"] != pytest.approx(figures["loss"], rel=1e-3)


def test_one_loss_of_several_sets_follows_their_weights():
    looks = {"web": {"loss": 2.0}, "code": {"loss": 1.0}}
    assert weighted_loss(looks, {"web": 3.0, "code": 1.0, "nothing held out": 9.0}) == 1.75
    assert weighted_loss(looks, {}) == 1.5
    assert weighted_loss({"text": {"loss": 0.1 + 0.2}}, {}) == 0.1 + 0.2, "one set keeps its bits"
