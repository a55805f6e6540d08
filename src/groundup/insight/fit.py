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
STARTS = tuple((alpha, beta) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0))
MOST_STEPS, ENOUGH = 400, 1e-5
"""Steps of a fit, and the share of its cost below which a gain is none."""
MOST_DAMPING = 1e6
NUM_CONSTANTS = 5
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

    @property
    def scatter(self) -> float:
        """Standard deviation of a run's log loss around the law, for the constants that were fitted to them."""
        free = max(1, len(self.residuals) - NUM_CONSTANTS)
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


def fit_law(
    runs: Sequence[Observation],
    *,
    power: float = POWER,
    powers: tuple[float, float] = POWERS,
    draws: int = DRAWS,
    seed: int = 0,
) -> FittedLaw:
    """The law of least Huber loss of log L; its draws are fits to the law's own losses with resampled residuals, with powers
    spread evenly between two.

    Residuals are resampled, not runs: of a dozen runs, a sample of runs often lacks a size. They are made larger by the
    root of n / (n - 5), as a fit of five constants leaves them too small.
    """
    assert len(runs) > NUM_CONSTANTS, "more runs than constants"
    places = np.log([[run.parameters, worth(run.tokens, run.unique_tokens, TOKENS_HALF_LIFE)] for run in runs])
    observed = np.log([run.loss for run in runs])
    law, explained = _best(places, observed, power)
    residuals = observed - explained
    wide = (residuals - residuals.mean()) * math.sqrt(len(runs) / (len(runs) - NUM_CONSTANTS))
    chance = np.random.default_rng(seed)
    drawn: list[PerplexityLaw] = []
    spread = sorted({powers[0], sum(powers) / 2, powers[1]})
    for one in spread:
        begun, told = _best(places, observed, one)
        samples = told + chance.choice(wide, (-(-draws // len(spread)), len(runs)))
        again, _ = _minimised(places, samples, np.tile(begun, (len(samples), 1)), one)
        drawn += [_law(constants, one) for constants in again]
    return FittedLaw(_law(law, power), tuple(drawn), tuple(map(float, residuals)))


def _best(places: Floats, observed: Floats, power: float) -> tuple[Floats, Floats]:
    """(constants, log losses) of the best fit over all starts."""
    starts = _starts(places, observed, power)
    found, costs = _minimised(places, np.tile(observed, (len(starts), 1)), starts, power)
    best = found[costs.argmin()]
    return best, _terms(best[None], places, power)[0][0]


def _law(constants: Floats, power: float) -> PerplexityLaw:
    """Constants (log A, log B, log of the floor, alpha, beta) as a law; the floor is E, or its power of the perplexity."""
    a, b, floor, alpha, beta = map(float, constants)
    E = math.exp(floor) if power == 0 else floor / power
    return PerplexityLaw(E=E, A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta, power=power)


def _starts(places: Floats, observed: Floats, power: float) -> Floats:
    """Constants that give a third of the whole to each term at the largest run."""
    largest = int(places.sum(axis=1).argmax())
    whole = observed[largest] if power == 0 else power * math.exp(observed[largest])
    third, (size, length) = whole - math.log(3), places[largest]
    return np.array([[third + alpha * size, third + beta * length, third, alpha, beta] for alpha, beta in STARTS])


def _terms(constants: Floats, places: Floats, power: float) -> tuple[Floats, Floats]:
    """(log losses (S, n), their derivatives (S, n, 5)) of S laws at n places: a softmax of the three terms."""
    sizes, lengths = places.T
    a, b, floor, alpha, beta = constants.T[:, :, None]
    logs = np.stack([a - alpha * sizes, b - beta * lengths, np.broadcast_to(floor, (len(constants), len(sizes)))])
    top = logs.max(axis=0)
    total = top + np.log(np.exp(logs - top).sum(axis=0))
    shares = np.exp(logs - total)
    slopes = np.stack([*shares, -shares[0] * sizes, -shares[1] * lengths], axis=-1)
    if power == 0:
        return total, slopes
    total = np.maximum(total, LEAST_E)  # what a step that went astray says of a loss below 0
    return np.log(total / power), slopes / total[:, :, None]


def _huber(residuals: Floats) -> Floats:
    """Summed over the places of each law."""
    size = np.abs(residuals)
    inside = size <= HUBER_DELTA
    return np.asarray(np.where(inside, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum(axis=1))


def _minimised(places: Floats, observed: Floats, constants: Floats, power: float) -> tuple[Floats, Floats]:
    """(constants (S, 5), costs (S)) for S samples (S, n) at once: Levenberg and Marquardt's steps with the weights of the
    Huber loss, until no sample gains any more."""
    constants = _clipped(constants, power)
    damping = np.full(len(constants), 1e-3)
    explained, slopes = _terms(constants, places, power)
    cost = _huber(observed - explained)
    for _ in range(MOST_STEPS):
        left = observed - explained
        weights = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(left), 1e-12))
        normal = np.einsum("snc,sn,snd->scd", slopes, weights, slopes)
        pull = np.einsum("snc,sn->sc", slopes, weights * left)
        ridge = damping[:, None] * (np.einsum("scc->sc", normal) + 1e-9)
        step = np.linalg.solve(normal + ridge[:, :, None] * np.eye(NUM_CONSTANTS), pull[:, :, None])[:, :, 0]
        tried = _clipped(constants + step, power)
        explained_then, slopes_then = _terms(tried, places, power)
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


def _clipped(constants: Floats, power: float) -> Floats:
    """Within the ranges of the constants."""
    a, b, floor, alpha, beta = constants.T
    floor = np.maximum(floor, math.log(LEAST_E) if power == 0 else power * LEAST_E)
    return np.stack([a, b, floor, np.clip(alpha, *EXPONENTS), np.clip(beta, *EXPONENTS)], axis=1)
