"""Symptoms in the form of the loss curve: stuck, diverging, oscillating, spiking, flat."""

import numpy as np
from numpy.typing import NDArray

from groundup.report.diagnosis.evidence import DEVIATIONS_OF_A_NORMAL, Evidence, running_median
from groundup.report.diagnosis.finding import Finding
from groundup.report.numbers import percent

SPIKE_DEVIATIONS = 12.0
FLAT_FRACTION = 0.01
SMALL_BATCH = 256
"""Tokens of a batch below which noise is laid to it."""


def stuck_at_uniform(evidence: Evidence) -> Finding | None:
    """Nothing is learned: the loss stays at ln(vocabulary)."""
    uniform = evidence.uniform_loss
    if uniform is None or not evidence.is_pretraining or not evidence.has_curve:
        return None
    if abs(evidence.end - uniform) > 0.03 * uniform or evidence.level(0.4, 0.6) < 0.97 * uniform:
        return None
    return Finding(
        seen="the loss is stuck at ln(vocabulary): nothing is learned",
        why=f"ln({evidence.vocab_size:,}) = {uniform:.3f}, and the loss is {evidence.end:.3f} after {evidence.steps[-1]} steps",
        next="look at what is learned with `groundup inspect tokens`: labels that do not belong to their tokens, or weights "
        "that do not change, look like this",
        sureness=0.9,
    )


def diverged(evidence: Evidence) -> Finding | None:
    """The loss rose and did not come back, or was not finite any more."""
    broken = evidence.events("nonfinite")
    if broken and not evidence.stage.is_finished:
        step, words = broken[-1]
        return Finding(
            "the run diverged to numbers that are not finite",
            f"step {step}: {words}",
            f"go back to a checkpoint before step {step} with half of {evidence.rate_name}; look at the documents named",
            0.97,
        )
    if not evidence.has_curve or swing(evidence) is not None:
        return None
    step, low = evidence.lowest
    rise = evidence.end - low
    if rise < max(0.06 * low, 0.15, 2 * evidence.noise) or evidence.level(0.85, 1.0) < low + 0.5 * rise:
        return None
    return Finding(
        "the loss diverged",
        f"it was lowest at step {step}, {low:.3f}, and is {evidence.end:.3f} at the end",
        f"go back to the checkpoint before step {step} and halve {evidence.rate_name}; `on_spike: rewind` does it by itself",
        0.92,
    )


def swing(evidence: Evidence) -> tuple[int, float] | None:
    """(period in steps, height) of a loss that comes and goes; None where it does not."""
    size = len(evidence.loss)
    if size < 60:
        return None
    rest = (evidence.loss - running_median(evidence.loss, size // 8))[size // 8 :]
    smooth = np.convolve(rest, np.ones(3) / 3, mode="valid")
    longest = len(smooth) // 3
    if longest < 6 or float(np.std(smooth)) == 0:
        return None
    likeness = np.array([np.corrcoef(smooth[:-lag], smooth[lag:])[0, 1] for lag in range(2, longest)])
    dips = np.flatnonzero(likeness < 0)
    if not len(dips):
        return None
    period = 2 + int(dips[0]) + int(np.argmax(likeness[dips[0] :]))
    if likeness[period - 2] < 0.45 or period < 6 or _is_an_epoch(evidence, period):
        return None
    height = float(np.percentile(smooth, 95) - np.percentile(smooth, 5))
    return (period, height) if height > max(4 * evidence.noise / np.sqrt(3), 0.04 * evidence.end) else None


def _is_an_epoch(evidence: Evidence, period: int) -> bool:
    """Whether a period is that of the passes over the text: where it is learned by heart, that shows by itself."""
    epochs = evidence.stage.epoch
    if not epochs or epochs.values[-1] < 2:
        return False
    passes = period * epochs.values[-1] / epochs.steps[-1]
    return abs(passes - round(passes)) < 0.15 and round(passes) >= 1


def oscillates(evidence: Evidence) -> Finding | None:
    """The loss goes up and down more than it falls: order of the data, size of the batch, or the rate."""
    if not evidence.has_curve:
        return None
    found = swing(evidence)
    if found is not None:
        period, height = found
        return Finding(
            "the loss swings with a period: the order of the data",
            f"every {period} steps it comes back by {height:.3f}, {percent(height / evidence.end)} of its level",
            f"shuffle what is read: {period} batches in a row are of one kind, the next of another; mix sources with "
            "`pretrain.mixture`",
            0.9,
        )
    fall = evidence.level(0.4, 0.6) - evidence.level(0.8, 1.0)
    batch, ratio = evidence.number("batch_size_tokens") or 0.0, evidence.lr_ratio
    if evidence.noise < 0.03 * evidence.end or fall > 1.2 * evidence.noise or not evidence.is_pretraining:
        return None
    is_fast = ratio is not None and ratio > 2
    if not is_fast and batch >= SMALL_BATCH:
        return None
    cause = "the rate" if is_fast else "the batch"
    return Finding(
        f"the loss oscillates without falling: {cause}",
        f"from step to step it changes by {evidence.noise:.3f}, and fell by {fall:.3f} from the middle to the last fifth; a batch is "
        f"{batch:,.0f} tokens",
        f"raise {evidence.stage.name}.batch_size_tokens to {8 * batch:,.0f} and lower the rate",
        0.75,
    )


def spikes(evidence: Evidence) -> Finding | None:
    """Single steps stand far above their neighbours."""
    named = evidence.events("spike")
    found = dict(named) or {step: f"loss {loss:.3f}" for step, loss in _spikes(evidence)}
    if not found:
        return None
    steps = sorted(found)
    return Finding(
        f"{len(steps)} {'spike' if len(steps) == 1 else 'spikes'} of the loss",
        f"step {steps[0]}: {found[steps[0]]}{f'; also steps {_listed(steps[1:])}' if len(steps) > 1 else ''}",
        f"read the documents named{'' if named else ' by `on_spike: warn`'}; `on_spike: rewind` leaves such batches out, a lower rate makes them rarer",
        0.9 if named else 0.7,
    )


def _listed(steps: list[int]) -> str:
    return ", ".join(str(step) for step in steps[:5]) + (" …" if len(steps) > 5 else "")


def _spikes(evidence: Evidence) -> list[tuple[int, float]]:
    if len(evidence.loss) < 40:
        return []
    begin = len(evidence.loss) // 10
    rest: NDArray[np.float64] = (evidence.loss - evidence.trend)[begin:]
    spread = DEVIATIONS_OF_A_NORMAL * float(np.median(np.abs(rest - np.median(rest))))
    limit = max(SPIKE_DEVIATIONS * spread, 0.1 * evidence.end)
    return [(int(evidence.steps[begin + at]), float(evidence.loss[begin + at])) for at in np.flatnonzero(rest > limit)]


def plateau(evidence: Evidence) -> Finding | None:
    """The loss stopped falling early although the run went on."""
    if len(evidence.loss) < 60 or swing(evidence) is not None:
        return None
    end, before = evidence.level(0.8, 1.0), evidence.level(0.3, 0.5)
    doubt = 2.5 * evidence.noise / np.sqrt(0.2 * len(evidence.loss))
    if abs(before - end) > max(FLAT_FRACTION * end, 0.0) or doubt > 2 * FLAT_FRACTION * end:
        return None
    uniform = evidence.uniform_loss
    if (evidence.is_pretraining and uniform is not None and end > 0.97 * uniform) or end < 0.3 * evidence.start:
        return None
    rates = np.array(evidence.main_lr.values)
    share = float(np.median(rates[len(rates) // 3 :]) / max(rates.max(), 1e-30))
    is_rate_gone = share < 0.02
    return Finding(
        "the loss is on a plateau",
        f"it is {end:.3f} in the last fifth and was {before:.3f} before half of the run; the rate is {percent(share)} of its peak",
        "the rate decays too early: lengthen its schedule"
        if is_rate_gone
        else "try another rate first, then a larger model; labels with noise in them look like this too",
        0.8,
    )
