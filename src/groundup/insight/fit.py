"""A law of scale fitted to runs, with intervals by the bootstrap."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.insight.laws import POWER, TOKENS_HALF_LIFE, PerplexityLaw, worth

Floats = NDArray[np.float64]

HUBER_DELTA = 1e-2
"""Of the logarithm of the loss. Hoffmann et al. (arXiv:2203.15556, appendix D.3) take 1e-3 for hundreds of runs, which makes
of nearly all a sum of distances; a dozen runs of one ladder, without outliers, are used better by squares (docs/log.md)."""
EXPONENTS = (0.05, 2.0)
"""What alpha and beta are kept within; outside of it a term is no slope any more."""
LEAST_E = 1e-2
POWERS = (POWER - 0.1, POWER + 0.1)
"""Between which the power of a law is known: its draws have all of these."""
FLOORS = (0.8, 1.2)
"""Between which a floor that is given is known, in parts of it."""
STARTS = tuple((alpha, beta) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0))
MOST_STEPS, ENOUGH = 400, 1e-5
"""Steps of a fit, and the share of its cost below which a gain is none."""
MOST_DAMPING = 1e6
NUM_CONSTANTS = 5
FLOOR = 2
"""Place of the floor among them."""
DRAWS = 200


@dataclass(frozen=True)
class Observation:
    """A finished run: parameters, tokens, how many of the text's tokens are different ones, and its loss."""

    parameters: float
    tokens: float
    unique_tokens: float
    loss: float


@dataclass(frozen=True)
class FittedLaw:
    """The law, what it leaves unexplained, and the laws of the bootstrap's samples."""

    law: PerplexityLaw
    draws: tuple[PerplexityLaw, ...]
    residuals: tuple[float, ...]
    """Logarithm of each loss over the law's."""
    num_fitted: int = NUM_CONSTANTS
    """Constants that were fitted; one less where the floor was given."""

    @property
    def scatter(self) -> float:
        """Standard deviation of a run's log loss around the law, for the constants that were fitted to them."""
        free = max(1, len(self.residuals) - self.num_fitted)
        return math.sqrt(math.fsum(one * one for one in self.residuals) / free)

    def interval(self, figure: Callable[[PerplexityLaw], float], level: float = 0.9) -> tuple[float, float]:
        """Where a figure of the law lies in a share `level` of the draws."""
        low, high = np.quantile([figure(draw) for draw in self.draws], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def predicted_loss(law: PerplexityLaw, parameters: float, tokens: float, unique_tokens: float) -> float:
    """A law's loss where the tokens may be passes over fewer unique ones, which then are worth less (Muennighoff et al.,
    arXiv:2305.16264, eq. 5, with the half-life found there).

    That parameters beyond what the text is best for are worth less, too, is left out: the full form jumps where the second
    pass begins, and a ladder is there to tell what parameters are worth.
    """
    return law.loss(parameters, worth(tokens, unique_tokens, TOKENS_HALF_LIFE))


@dataclass(frozen=True)
class Form:
    """What of a law is not fitted."""

    power: float
    floor: float | None = None
    """E where it is given, nats a token."""

    @property
    def num_fitted(self) -> int:
        return NUM_CONSTANTS - (self.floor is not None)

    def range_of_floor(self) -> tuple[float, float]:
        """Least and most of the third constant: log E, or E times the power where there is one."""
        least, most = (LEAST_E, math.inf) if self.floor is None else (self.floor, self.floor)
        return (math.log(least), math.log(most)) if self.power == 0 else (self.power * least, self.power * most)


def fit_law(
    runs: Sequence[Observation],
    *,
    floor: float | None = None,
    power: float = POWER,
    powers: tuple[float, float] = POWERS,
    draws: int = DRAWS,
    seed: int = 0,
) -> FittedLaw:
    """The law of least Huber loss of log L, its E the floor where one is given; its draws are fits to the law's own losses
    with resampled residuals, with powers spread evenly between two and the floor by FLOORS.

    Residuals are resampled, not runs: of a dozen runs, a sample of runs often lacks a size. They are made larger by the
    root of n / (n - c) for c fitted constants, as the fit leaves them too small.
    """
    assert len(runs) > NUM_CONSTANTS, "more runs than constants"
    places = np.log([[run.parameters, worth(run.tokens, run.unique_tokens, TOKENS_HALF_LIFE)] for run in runs])
    observed = np.log([run.loss for run in runs])
    form = Form(power, floor)
    law, explained = _best(places, observed, form)
    residuals = observed - explained
    wide = (residuals - residuals.mean()) * math.sqrt(len(runs) / (len(runs) - form.num_fitted))
    chance = np.random.default_rng(seed)
    drawn: list[PerplexityLaw] = []
    spread = [Form(one, other) for one in _three(powers) for other in _floors(floor)]
    for one in spread:
        begun, told = _best(places, observed, one)
        samples = told + chance.choice(wide, (-(-draws // len(spread)), len(runs)))
        again, _ = _minimised(places, samples, np.tile(begun, (len(samples), 1)), one)
        drawn += [_law(constants, one) for constants in again]
    return FittedLaw(_law(law, form), tuple(drawn), tuple(map(float, residuals)), form.num_fitted)


def _three(ends: tuple[float, float]) -> list[float]:
    """Both ends and their middle; one number where they are the same."""
    return sorted({ends[0], sum(ends) / 2, ends[1]})


def _floors(floor: float | None) -> list[float | None]:
    return [None] if floor is None else [floor * part for part in _three(FLOORS)]


def _best(places: Floats, observed: Floats, form: Form) -> tuple[Floats, Floats]:
    """(constants, log losses) of the best fit over all starts."""
    starts = _starts(places, observed, form)
    found, costs = _minimised(places, np.tile(observed, (len(starts), 1)), starts, form)
    best = found[costs.argmin()]
    return best, _terms(best[None], places, form)[0][0]


def _law(constants: Floats, form: Form) -> PerplexityLaw:
    """Constants (log A, log B, log of the floor, alpha, beta) as a law; the floor is E, or its power of the perplexity."""
    a, b, floor, alpha, beta = map(float, constants)
    E = math.exp(floor) if form.power == 0 else floor / form.power
    return PerplexityLaw(E=E, A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta, power=form.power)


def _starts(places: Floats, observed: Floats, form: Form) -> Floats:
    """Constants that give a third of the whole to each term at the largest run."""
    largest = int(places.sum(axis=1).argmax())
    whole = observed[largest] if form.power == 0 else form.power * math.exp(observed[largest])
    third, (size, length) = whole - math.log(3), places[largest]
    return np.array([[third + alpha * size, third + beta * length, third, alpha, beta] for alpha, beta in STARTS])


def _terms(constants: Floats, places: Floats, form: Form) -> tuple[Floats, Floats]:
    """(log losses (S, n), their derivatives (S, n, 5)) of S laws at n places: a softmax of the three terms."""
    sizes, lengths = places.T
    a, b, floor, alpha, beta = constants.T[:, :, None]
    logs = np.stack([a - alpha * sizes, b - beta * lengths, np.broadcast_to(floor, (len(constants), len(sizes)))])
    top = logs.max(axis=0)
    total = top + np.log(np.exp(logs - top).sum(axis=0))
    shares = np.exp(logs - total)
    slopes = np.stack([*shares, -shares[0] * sizes, -shares[1] * lengths], axis=-1)
    if form.floor is not None:
        slopes[:, :, FLOOR] = 0.0
    if form.power == 0:
        return total, slopes
    total = np.maximum(total, LEAST_E)  # what a step that went astray says of a loss below 0
    return np.log(total / form.power), slopes / total[:, :, None]


def _huber(residuals: Floats) -> Floats:
    """Summed over the places of each law."""
    size = np.abs(residuals)
    inside = size <= HUBER_DELTA
    return np.asarray(np.where(inside, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum(axis=1))


def _minimised(places: Floats, observed: Floats, constants: Floats, form: Form) -> tuple[Floats, Floats]:
    """(constants (S, 5), costs (S)) for S samples (S, n) at once: Levenberg and Marquardt's steps with the weights of the
    Huber loss, until no sample gains any more."""
    constants = _clipped(constants, form)
    damping = np.full(len(constants), 1e-3)
    explained, slopes = _terms(constants, places, form)
    cost = _huber(observed - explained)
    for _ in range(MOST_STEPS):
        left = observed - explained
        weights = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(left), 1e-12))
        normal = np.einsum("snc,sn,snd->scd", slopes, weights, slopes)
        pull = np.einsum("snc,sn->sc", slopes, weights * left)
        ridge = damping[:, None] * (np.einsum("scc->sc", normal) + 1e-9)
        step = np.linalg.solve(normal + ridge[:, :, None] * np.eye(NUM_CONSTANTS), pull[:, :, None])[:, :, 0]
        tried = _clipped(constants + step, form)
        explained_then, slopes_then = _terms(tried, places, form)
        cost_then = _huber(observed - explained_then)
        is_better = cost_then < cost
        gained = float(((cost - cost_then) / np.maximum(cost, 1e-30))[is_better].max(initial=0.0))
        constants = np.where(is_better[:, None], tried, constants)
        explained = np.where(is_better[:, None], explained_then, explained)
        slopes = np.where(is_better[:, None, None], slopes_then, slopes)
        cost = np.where(is_better, cost_then, cost)
        damping = np.clip(np.where(is_better, damping / 4, damping * 4), 1e-9, MOST_DAMPING)
        if gained < ENOUGH and (is_better | (damping >= MOST_DAMPING)).all():
            break
    return constants, cost


def _clipped(constants: Floats, form: Form) -> Floats:
    """Within the ranges of the constants."""
    a, b, floor, alpha, beta = constants.T
    floor = np.clip(floor, *form.range_of_floor())
    return np.stack([a, b, floor, np.clip(alpha, *EXPONENTS), np.clip(beta, *EXPONENTS)], axis=1)
