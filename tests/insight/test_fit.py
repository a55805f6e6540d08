"""A law fitted to made-up runs: the one they were made by comes back, within its interval."""

import math

import numpy as np
import pytest

from groundup.insight.fit import Observation, fit_law, predicted_loss
from groundup.insight.laws import TOKENS_HALF_LIFE, LossLaw

LAWS = (
    LossLaw(E=1.7, A=400, B=500, alpha=0.42, beta=0.36),
    LossLaw(E=1.0, A=60, B=3000, alpha=0.30, beta=0.55),
    LossLaw(E=2.2, A=4000, B=200, alpha=0.70, beta=0.30),
)
SIZES, LENGTHS = (1e5, 2e5, 4e5, 8e5), (1e5, 2e5, 4e5, 8e5)
UNIQUE = 1e9
TARGET = (8e5 * math.sqrt(8), 8e5 * math.sqrt(8))


def made_runs(law, *, noise=0.0, seed=0, unique=UNIQUE):
    chance = np.random.default_rng(seed)
    return [
        Observation(size, tokens, unique, predicted_loss(law, size, tokens, unique) * math.exp(noise * chance.normal()))
        for size in SIZES
        for tokens in LENGTHS
    ]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_without_noise_comes_back(law):
    fitted = fit_law(made_runs(law), draws=4)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fitted.law, name) == pytest.approx(getattr(law, name), rel=0.01), name
    assert fitted.scatter < 1e-6


@pytest.mark.parametrize("law", LAWS)
def test_the_truth_lies_in_the_interval_nine_times_in_ten_or_nearly(law):
    """Of eight times the largest run's operations: 24 ladders of runs that scatter by 0.3 %."""
    true, noise = law.loss(*TARGET), 0.003
    inside, errors = 0, []
    for seed in range(24):
        fitted = fit_law(made_runs(law, noise=noise, seed=seed), draws=60, seed=seed)
        low, high = fitted.interval(lambda one: one.loss(*TARGET))
        inside += low <= true <= high
        errors.append(abs(fitted.law.loss(*TARGET) / true - 1))
        assert noise / 2 < fitted.scatter < 2 * noise
    assert inside >= 18, inside
    assert np.mean(errors) < 0.015 and max(errors) > 0.003, "an extrapolation that is never wrong was not one"


def test_one_run_that_went_wrong_moves_the_law_little():
    law = LAWS[0]
    runs = made_runs(law, noise=0.002)
    spoilt = [*runs[:5], Observation(runs[5].parameters, runs[5].tokens, UNIQUE, 1.3 * runs[5].loss), *runs[6:]]
    places = [(size, tokens) for size in SIZES for tokens in LENGTHS]
    clean, robust = (fit_law(some, draws=4).law for some in (runs, spoilt))
    assert max(abs(robust.loss(*place) / clean.loss(*place) - 1) for place in places) < 0.012


def test_repeated_text_is_worth_less_and_the_fit_knows_it():
    law, unique = LAWS[0], 2e5
    fitted = fit_law(made_runs(law, unique=unique), draws=4)
    assert fitted.law.beta == pytest.approx(law.beta, rel=0.02)
    taken_for_new = fit_law([Observation(run.parameters, run.tokens, UNIQUE, run.loss) for run in made_runs(law, unique=unique)], draws=4)  # fmt: skip
    assert abs(taken_for_new.law.loss(1e6, 3.2e6) / law.loss(1e6, 3.2e6) - 1) > 0.002
    four, forty = (predicted_loss(law, 1e6, 1e9, 1e9 / passes) for passes in (4, 40))
    once = law.loss(1e6, 1e9)
    assert once < four < forty < law.loss(1e6, 1e9 / 40)
    most = predicted_loss(law, 1e6, 1e15, 1e6)
    assert most == pytest.approx(law.loss(1e6, 1e6 * (1 + TOKENS_HALF_LIFE)))
