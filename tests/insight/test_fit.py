"""A law fitted to made-up runs: the one they were made by comes back, within its interval."""

import math

import numpy as np
import pytest

from groundup.insight import fit
from groundup.insight.fit import Observation, fit_law, predicted_loss
from groundup.insight.laws import POWER, TOKENS_HALF_LIFE, LossLaw, PerplexityLaw

LAWS = (
    PerplexityLaw(E=1.5, A=80, B=440, alpha=0.30, beta=0.45),
    PerplexityLaw(E=0.8, A=30, B=2500, alpha=0.22, beta=0.60),
    PerplexityLaw(E=1.2, A=600, B=60, alpha=0.50, beta=0.30),
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
        assert getattr(fitted.law, name) == pytest.approx(getattr(law, name), rel=0.02), name
    assert fitted.scatter < 1e-5


def test_a_sum_of_losses_comes_back_as_one():
    """Hoffmann et al.: the power 0."""
    law = LossLaw(E=1.7, A=400, B=500, alpha=0.42, beta=0.36)
    fitted = fit_law(made_runs(law), power=0.0, powers=(0.0, 0.0), draws=4)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fitted.law, name) == pytest.approx(getattr(law, name), rel=0.01), name
    assert fitted.law.loss(*TARGET) == pytest.approx(law.loss(*TARGET), rel=1e-4)
    assert all(draw.power == 0 for draw in fitted.draws)


@pytest.mark.parametrize("power", [POWER, 0.0])
def test_a_floor_that_is_given_stays_and_the_rest_is_fitted_to_it(power):
    law = PerplexityLaw(E=1.5, A=80, B=440, alpha=0.30, beta=0.45, power=power)
    runs = made_runs(law, noise=0.003)
    fitted = fit_law(runs, floor=1.5, power=power, powers=(power, power), draws=30)
    assert pytest.approx(1.5, rel=1e-12) == fitted.law.E and fitted.num_fitted == 4
    assert fitted.law.loss(*TARGET) == pytest.approx(law.loss(*TARGET), rel=0.01)
    assert {round(draw.E, 9) for draw in fitted.draws} == {1.2, 1.5, 1.8}, "it is known to a fifth"
    free = fit_law(runs, power=power, powers=(power, power), draws=30)
    assert free.num_fitted == 5 and abs(free.law.E / 1.5 - 1) > 0.01, "such runs do not tell the floor"
    exact = fit_law(made_runs(law), floor=1.5, power=power, draws=3)
    for name in ("A", "B", "alpha", "beta"):
        assert getattr(exact.law, name) == pytest.approx(getattr(law, name), rel=0.01), name


def test_what_is_not_fitted_costs_no_degree_of_freedom(monkeypatch):
    """Eight runs: the scatter, and the residuals that the draws are made of, are for four constants or for five."""
    runs, samples = made_runs(LAWS[0], noise=0.01)[::2], []
    minimised = fit._minimised
    monkeypatch.setattr(fit, "_minimised", lambda places, observed, *rest: samples.append(observed) or minimised(places, observed, *rest))  # fmt: skip
    for floor, fitted_constants in ((LAWS[0].E, 4), (None, 5)):
        samples.clear()
        fitted = fit_law(runs, floor=floor, powers=(POWER, POWER), draws=1200)
        left = np.array(fitted.residuals)
        assert fitted.scatter == pytest.approx(math.sqrt((left**2).sum() / (8 - fitted_constants)))
        drawn = np.concatenate([some - some.mean(axis=0) for some in samples if np.ptp(some, axis=0).any()])
        assert drawn.std() / left.std() == pytest.approx(math.sqrt(8 / (8 - fitted_constants)), rel=0.04)


def test_near_its_floor_the_law_is_a_sum_of_losses():
    law = PerplexityLaw(E=2.0, A=80, B=440, alpha=0.30, beta=0.45)
    scale = POWER * math.exp(POWER * law.E)
    summed = LossLaw(E=2.0, A=80 / scale, B=440 / scale, alpha=0.30, beta=0.45)
    assert law.loss(1e13, 1e13) == pytest.approx(summed.loss(1e13, 1e13), rel=1e-4)
    assert law.loss(1e5, 1e5) < 0.9 * summed.loss(1e5, 1e5), "far above it, not"


@pytest.mark.costly
@pytest.mark.parametrize("law", LAWS)
def test_the_truth_lies_in_the_interval_nine_times_in_ten_or_nearly(law):
    """Of eight times the largest run's operations: ten ladders of runs that scatter by 0.3 %."""
    true, noise = law.loss(*TARGET), 0.003
    inside, errors = 0, []
    for seed in range(10):
        runs = made_runs(law, noise=noise, seed=seed)
        fitted = fit_law(runs, powers=(POWER, POWER), draws=40, seed=seed)
        low, high = fitted.interval(lambda one: one.loss(*TARGET))
        inside += low <= true <= high
        errors.append(abs(fitted.law.loss(*TARGET) / true - 1))
        assert noise / 2 < fitted.scatter < 2 * noise
    assert inside >= 7, inside
    assert np.mean(errors) < 0.015 and max(errors) > 0.003, "an extrapolation that is never wrong was not one"


def test_an_unknown_power_makes_the_interval_wide():
    runs = made_runs(LAWS[0], noise=0.001)
    spans = []
    for powers in ((POWER, POWER), (POWER - 0.1, POWER + 0.1)):
        low, high = fit_law(runs, powers=powers, draws=60).interval(lambda one: one.loss(*TARGET))
        spans.append(high / low - 1)
    assert spans[1] > 1.5 * spans[0] and spans[1] > 0.01


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
