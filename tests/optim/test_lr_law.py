"""`auto` of the rates and of Muon's decay: the laws, and what they are not for."""

import pytest
from pydantic import ValidationError

from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.lr_law import adamw_lr, muon_lr, muon_weight_decay, settled
from groundup.stages.config import FinetuneConfig

SIZES = {"num_parameters": 1_000_000, "batch_size_tokens": 2500}
RUN = SIZES | {"num_steps": 1000}


def test_the_law_in_figures():
    assert adamw_lr(**SIZES) == pytest.approx(0.036 * 0.05)
    assert adamw_lr(4_000_000, 2500) == pytest.approx(adamw_lr(**SIZES) / 2)
    assert adamw_lr(1_000_000, 10_000) == pytest.approx(adamw_lr(**SIZES) * 2)
    assert muon_lr(**SIZES) == pytest.approx(0.0154 * 50 / 31.6227766)
    assert muon_lr(16_000_000, 10_000) == pytest.approx(muon_lr(**SIZES))


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [("adamw", adamw_lr(**SIZES)), ("adamw_8bit", adamw_lr(**SIZES)), ("muon", muon_lr(**SIZES) / 3)],
)
def test_auto_becomes_a_number(optimizer, lr):
    found = settled(OptimConfig(optimizer=optimizer, lr="auto", muon_lr="auto"), **RUN)
    assert found.lr == pytest.approx(lr) and found.muon_lr == pytest.approx(muon_lr(**SIZES))
    given = settled(OptimConfig(optimizer=optimizer, lr="auto", muon_lr=0.03), **RUN)
    assert given.muon_lr == 0.03 and given.lr == pytest.approx(0.01 if optimizer == "muon" else lr)
    assert settled(OptimConfig(optimizer=optimizer), **RUN) == OptimConfig(optimizer=optimizer)


def test_a_decay_at_auto_takes_the_same_share_of_a_run_of_any_length():
    found = settled(OptimConfig(muon_lr=0.02, muon_weight_decay="auto"), **RUN)
    assert found.muon_weight_decay == pytest.approx(4 / (0.02 * 1000)) == muon_weight_decay(0.02, 1000)
    longer = settled(OptimConfig(muon_lr=0.02, muon_weight_decay="auto"), **RUN | {"num_steps": 4000})
    assert longer.muon_weight_decay == pytest.approx(found.muon_weight_decay / 4)
    assert 0.02 * muon_weight_decay(0.02, 1) == pytest.approx(0.1), "no step turns a matrix over"
    given = settled(OptimConfig(muon_lr=0.02, muon_weight_decay=0.3), **RUN)
    assert given.muon_weight_decay == 0.3


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_it_is_refused_where_no_law_is_known(optimizer):
    with pytest.raises(ValidationError, match=f"give a number for {optimizer}"):
        OptimConfig(optimizer=optimizer, lr="auto")


@pytest.mark.parametrize("rate", [{"lr": "auto"}, {"muon_lr": "auto"}, {"muon_weight_decay": "auto"}])
def test_it_is_refused_for_fine_tuning(rate):
    section = {"data": "x.jsonl", "duration": "1 steps", "row_length": 8, "batch_size_tokens": 8}
    with pytest.raises(ValidationError, match="a law for pretraining"):
        FinetuneConfig(**section | rate)


def test_no_optimizer_is_built_of_an_open_rate(make_model):
    with pytest.raises(AssertionError, match="settle the rates"):
        build_optimizers(dict(make_model().named_parameters()), OptimConfig(lr="auto"))
    with pytest.raises(AssertionError, match="settle the decay"):
        build_optimizers(dict(make_model().named_parameters()), OptimConfig(muon_weight_decay="auto"))
