"""What the full run's curve will be, and where curves of its size and text normally lie, from a ladder's runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.insight.fit import FittedLaw, Observation, fit_law, predicted_loss
from groundup.insight.laws import FLOOR_NATS_A_BYTE, PerplexityLaw
from groundup.insight.rungs import Outcome

SHARES = tuple(number / 10 for number in range(1, 11))
"""Of a run, at which its curve is told."""
LEVEL = 0.9
DEVIATIONS = 1.645
"""Standard deviations to each side that hold a share LEVEL of a normal distribution."""


@dataclass(frozen=True)
class Forecast:
    """A curve and its band."""

    shares: tuple[float, ...]
    loss: tuple[float, ...]
    """Nats a token, held-out rows."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Between them a share LEVEL of runs is expected to lie; what a run gains that learns to look back is let into it."""
    to_gain: float = 0.0
    """Share of the end's loss that this is; 0 where a run of the ladder has learned it."""


def observations(outcomes: Sequence[Outcome]) -> list[Observation]:
    """What a law is fitted to."""
    return [Observation(one.parameters, one.tokens, one.unique_tokens, one.loss) for one in outcomes]


def fit_outcomes(outcomes: Sequence[Outcome]) -> FittedLaw:
    """The law of finished runs, its floor that of the text (FLOOR_NATS_A_BYTE).

    Runs of minutes stand too far above a floor to tell where it is: left free it went to the end of its range, and the
    losses that were foretold went astray with it (docs/scale.md).
    """
    return fit_law(observations(outcomes), floor=FLOOR_NATS_A_BYTE * outcomes[0].bytes_a_token)


def forecast(
    fitted: FittedLaw, outcomes: Sequence[Outcome], parameters: float, tokens: float, unique_tokens: float
) -> Forecast:
    """The curve of a run: the law's loss at its end, and before it what runs stood above their ends.

    How far a run stands above its end, log(loss at a share / loss at the end), is fitted at each share by a plane over
    log parameters and log tokens. The band holds three things: the law's draws, the runs' scatter around the law, and
    around that plane. Where no run of the ladder has learned to look back, the full run may, all at once, and no law of
    them tells of it: the band is open downwards by what that takes off, in proportion to the share of the run.
    """
    first = max(one.looks[0][0] for one in outcomes)
    shares = tuple(share for share in SHARES if share >= first)
    places = np.array([[1.0, math.log(one.parameters), math.log(one.tokens)] for one in outcomes])
    here = np.array([1.0, math.log(parameters), math.log(tokens)])
    end = math.log(predicted_loss(fitted.law, parameters, tokens, unique_tokens))
    draws = np.log([predicted_loss(law, parameters, tokens, unique_tokens) for law in fitted.draws])
    spread = float(((draws - end) ** 2).mean()) + fitted.scatter**2
    logs, deviations = [], []
    for share in shares:
        above = np.array([_log_loss(one, share) - _log_loss(one, 1.0) for one in outcomes])
        mean, variance = _plane(places, above, here)
        logs.append(end + mean)
        deviations.append(math.sqrt(spread + variance))
    bounds = [DEVIATIONS * deviation for deviation in deviations]
    to_gain = min((one.to_gain for one in outcomes if one.repeat_loss is not None), default=0.0)
    gained = [1 - share * to_gain for share in shares]
    return Forecast(
        shares,
        tuple(math.exp(log) for log in logs),
        tuple(part * math.exp(log - bound) for part, log, bound in zip(gained, logs, bounds, strict=True)),
        tuple(math.exp(log + bound) for log, bound in zip(logs, bounds, strict=True)),
        to_gain,
    )


def _log_loss(outcome: Outcome, share: float) -> float:
    """Between two looks, straight over the logarithm of the share."""
    places, losses = zip(*outcome.looks, strict=True)
    return float(np.interp(math.log(share), np.log(places), np.log(losses)))


def _plane(places: NDArray[np.float64], values: NDArray[np.float64], here: NDArray[np.float64]) -> tuple[float, float]:
    """(value, variance of a run's value) of the least-squares plane at a place."""
    solution, *_ = np.linalg.lstsq(places, values)
    left = values - places @ solution
    free = max(1, len(values) - places.shape[1])
    leverage = float(here @ np.linalg.pinv(places.T @ places) @ here)
    return float(here @ solution), float(left @ left) / free * (1 + leverage)


def best_size(fitted: FittedLaw, flops: float, unique_tokens: float) -> tuple[float, float, float]:
    """(parameters, the least and the most of them in LEVEL of the draws) that are best for 6 N D operations on a text."""
    sizes = np.geomspace(1e3, 1e13, 2001)

    def best(law: PerplexityLaw) -> float:
        losses = [predicted_loss(law, size, flops / 6 / size, unique_tokens) for size in sizes]
        return float(sizes[int(np.argmin(losses))])

    low, high = fitted.interval(best, LEVEL)
    return best(fitted.law), low, high
