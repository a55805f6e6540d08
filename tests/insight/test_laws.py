"""The laws against what was published."""

import math

import pytest

from groundup.insight.laws import (
    CHINCHILLA,
    REPEATED,
    REPLICATION,
    TOKENS_HALF_LIFE,
    best_for_use,
    best_vocabulary,
    loss_of_repeated,
    worth,
)

CHINCHILLA_FLOPS = 5.76e23
LAWS = {"Hoffmann": CHINCHILLA, "Besiroglu": REPLICATION, "Muennighoff": REPEATED}


def test_chinchilla_itself():
    """70 B on 1.4 T: the replication says so too, the printed fit asks for half as many parameters (its own table A3)."""
    parameters, tokens = REPLICATION.best_split(CHINCHILLA_FLOPS)
    assert 60e9 < parameters < 80e9 and 1.2e12 < tokens < 1.6e12 and tokens / parameters == pytest.approx(20, abs=3)
    parameters, tokens = CHINCHILLA.best_split(CHINCHILLA_FLOPS)
    assert 30e9 < parameters < 45e9 and tokens / parameters > 50
    gopher = CHINCHILLA.loss(280e9, 300e9)
    assert CHINCHILLA.loss(70e9, 1.4e12) < gopher - 0.04, "Chinchilla beats Gopher for the same operations"


@pytest.mark.parametrize(
    ("flops", "parameters", "tokens"),
    [(2.21e19, 400e6, 9.2e9), (1.62e20, 1e9, 27.1e9), (2.46e22, 10e9, 410.1e9), (1.71e24, 67e9, 4.1e12)],
)
def test_the_printed_table_of_the_third_approach(flops, parameters, tokens):
    """Table A3 of Hoffmann et al."""
    assert CHINCHILLA.best_split(flops) == pytest.approx((parameters, tokens), rel=0.05)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_best_split_is_the_best(law):
    for flops in (1e15, 1e19, 1e24):
        parameters, tokens = law.best_split(flops)
        assert 6 * parameters * tokens == pytest.approx(flops)
        for factor in (0.5, 0.9, 1.1, 2.0):
            assert law.loss(parameters * factor, tokens / factor) > law.loss(parameters, tokens)
        assert law.best_parameters(tokens) == pytest.approx(parameters)
        assert law.tokens_for(law.loss(parameters, tokens), parameters) == pytest.approx(tokens)
        assert law.tokens_for(law.E, parameters) == math.inf


def test_repeated_tokens_are_worth_what_was_published():
    """Up to 4 epochs nearly as good as new, worth little past 40, never more than 1 + R* times the text."""
    assert worth(1e9, 2e9, TOKENS_HALF_LIFE) == 1e9
    assert worth(4e9, 1e9, TOKENS_HALF_LIFE) / 4e9 > 0.93
    assert worth(44e9, 1e9, TOKENS_HALF_LIFE) / 44e9 < 0.36
    assert worth(1e15, 1e9, TOKENS_HALF_LIFE) == pytest.approx((1 + TOKENS_HALF_LIFE) * 1e9)
    share = (worth((1 + TOKENS_HALF_LIFE) * 1e9, 1e9, TOKENS_HALF_LIFE) / 1e9 - 1) / TOKENS_HALF_LIFE
    assert share == pytest.approx(1 - 1 / math.e)
    assert pytest.approx(521, abs=0.5) == REPEATED.A and pytest.approx(1488, abs=0.5) == REPEATED.B
    assert REPEATED.best_parameters(1e9) == pytest.approx(0.051 * 1e9, rel=0.02), "U_N = 0.051 U_D"


def test_the_law_for_repeated_data_falls_with_parameters_and_data():
    once = loss_of_repeated(REPEATED, 1e8, 4e9, 4e9)
    assert once == REPEATED.loss(1e8, 4e9)
    four, forty = (loss_of_repeated(REPEATED, 1e8, 4e9, 4e9 / epochs) for epochs in (4, 40))
    assert once < four < forty and four - once < 0.2 * (forty - once)
    assert loss_of_repeated(REPEATED, 1e8, 8e9, 1e9) < loss_of_repeated(REPEATED, 1e8, 4e9, 1e9)


def test_a_model_that_is_used_much_is_smaller_and_trained_longer():
    """Half the parameters for a fifth more training, 30 % of them for twice: the curve is that steep (the printed fit)."""
    parameters, tokens = CHINCHILLA.best_split(1e21)
    loss = CHINCHILLA.loss(parameters, tokens)
    overhead = {share: share * CHINCHILLA.tokens_for(loss, share * parameters) / tokens for share in (0.5, 0.3)}
    assert overhead[0.5] == pytest.approx(1.2, abs=0.02) and overhead[0.3] == pytest.approx(2.05, abs=0.1)
    assert best_for_use(CHINCHILLA, loss, 0.0) == pytest.approx((parameters, tokens), rel=0.01)
    sizes = [best_for_use(CHINCHILLA, loss, used)[0] for used in (0, 1e11, 1e12, 1e13)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * sizes[0]


def test_larger_models_deserve_larger_vocabularies():
    """43 K for 3 B, at least 216 K for 70 B (Tao et al. 2024); the printed exponents have two digits."""
    assert best_vocabulary(3e9, 3200) == pytest.approx(43_000, rel=0.2)
    assert 216_000 < best_vocabulary(70e9, 8192) < 300_000
    assert best_vocabulary(1e6, 128) < 4096
