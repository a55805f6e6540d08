"""`lr: auto`: the law, what it is not for, and that it was measured."""

import pytest
from pydantic import ValidationError

from groundup.optim.build import build_optimizers
from groundup.optim.config import OptimConfig
from groundup.optim.lr_law import adamw_lr, muon_lr, settled
from groundup.stages.config import FinetuneConfig

SIZES = {"num_parameters": 1_000_000, "batch_size_tokens": 2500}


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
    found = settled(OptimConfig(optimizer=optimizer, lr="auto", muon_lr="auto"), **SIZES)
    assert found.lr == pytest.approx(lr) and found.muon_lr == pytest.approx(muon_lr(**SIZES))
    given = settled(OptimConfig(optimizer=optimizer, lr="auto", muon_lr=0.03), **SIZES)
    assert given.muon_lr == 0.03 and given.lr == pytest.approx(0.01 if optimizer == "muon" else lr)
    assert settled(OptimConfig(optimizer=optimizer), **SIZES) == OptimConfig(optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_it_is_refused_where_no_law_is_known(optimizer):
    with pytest.raises(ValidationError, match=f"give a number for {optimizer}"):
        OptimConfig(optimizer=optimizer, lr="auto")


@pytest.mark.parametrize("rate", [{"lr": "auto"}, {"muon_lr": "auto"}])
def test_it_is_refused_for_fine_tuning(rate):
    section = {"data": "x.jsonl", "duration": "1 steps", "row_length": 8, "batch_size_tokens": 8}
    with pytest.raises(ValidationError, match="a law for pretraining"):
        FinetuneConfig(**section | rate)


def test_no_optimizer_is_built_of_an_open_rate(make_model):
    with pytest.raises(AssertionError, match="settle the rates"):
        build_optimizers(dict(make_model().named_parameters()), OptimConfig(lr="auto"))
