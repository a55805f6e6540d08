"""Symptoms of the learning rate: too high, too low, no warmup, gradients clipped at every step."""

import numpy as np

from groundup.report.diagnosis.evidence import Evidence
from groundup.report.diagnosis.finding import Finding
from groundup.report.numbers import percent, short

FAR_ABOVE, WAY_ABOVE, FAR_BELOW = 4.0, 10.0, 0.2
"""Multiples of the law's rate from which a curve that fits is explained by the rate; the law itself is right to 1.5×."""


def lr_too_high(evidence: Evidence) -> Finding | None:
    """The loss rises, or stays up until the rate comes down."""
    if not evidence.has_curve or evidence.peak_lr is None:
        return None
    signs = []
    if evidence.end > evidence.lowest[1] + _worse_by(evidence):
        signs.append(f"the loss rose from {evidence.lowest[1]:.3f} to {evidence.end:.3f}")
    climb = _climb(evidence)
    if climb is not None:
        signs.append(climb)
    waits = _waits_for_decay(evidence)
    if waits is not None:
        signs.append(waits)
    norms = _growing_norms(evidence)
    if norms is not None:
        signs.append(norms)
    ratio = evidence.lr_ratio
    is_far = ratio is not None and ratio >= FAR_ABOVE
    # without a law two signs are needed, near it three; far above it the rate itself is a sign, and ten times is enough
    least = 2 if ratio is None else 3 if ratio < FAR_ABOVE / 2 else 2 if not is_far else 1 if ratio < WAY_ABOVE else 0
    if len(signs) < least:
        return None
    if is_far:
        signs.append(
            f"{evidence.rate_name} {short(evidence.peak_lr)} is {ratio:.1f}× what `auto` gives ({short(evidence.lr_of_law or 0)})"
        )
    target = evidence.lr_of_law if is_far else evidence.peak_lr / 4
    return Finding(
        seen="the learning rate is too high",
        why="; ".join(signs),
        next=f"set {evidence.rate_name} to {short(target or 0)}, or to `auto` in pretraining",
        sureness=min(0.97, 0.5 + 0.12 * len(signs) + (0.2 if is_far else 0.0)),
    )


def _worse_by(evidence: Evidence) -> float:
    return max(0.04 * abs(evidence.lowest[1]), 3 * evidence.noise / np.sqrt(max(1, len(evidence.loss) / 20)), 0.05)


def _climb(evidence: Evidence) -> str | None:
    """The loss stands above where it began while the rate is up."""
    highest = float(np.max(evidence.trend[1:]))
    if highest < evidence.start + max(0.05 * evidence.start, 3 * evidence.noise):
        return None
    step = int(evidence.steps[1 + int(np.argmax(evidence.trend[1:]))])
    return f"the loss began at {evidence.start:.3f} and rose to {highest:.3f} by step {step}"


def _waits_for_decay(evidence: Evidence) -> str | None:
    """Most of the fall comes only when the rate has come down to less than half."""
    rates, peak = evidence.main_lr, evidence.peak_lr or 0.0
    late = [step for step, rate in zip(rates.steps, rates.values, strict=True) if rate >= peak / 2]
    if not late or late[-1] >= rates.steps[-1]:
        return None
    begin, turn = int(0.1 * len(evidence.loss)), int(np.searchsorted(evidence.steps, late[-1]))
    if turn - begin < 10 or len(evidence.loss) - turn < 5:
        return None
    first, middle = (
        float(np.median(evidence.loss[begin : begin + 5])),
        float(evidence.trend[min(turn, len(evidence.trend) - 1)]),
    )
    early, afterwards = first - middle, middle - evidence.end
    if (
        afterwards <= 3 * evidence.noise / np.sqrt(len(evidence.loss) / 20)
        or afterwards < 0.6 * max(early, 0)
        or afterwards < 0.02 * middle
    ):
        return None
    return f"the loss fell by {max(early, 0.0):.3f} while the rate was up (steps {evidence.steps[begin]} to {late[-1]}) and by {afterwards:.3f} after it had halved"


def _growing_norms(evidence: Evidence) -> str | None:
    norms = np.array(evidence.stage.grad_norm.values)
    if len(norms) < 40:
        return None
    early, late = (
        float(np.median(norms[: len(norms) // 10])),
        float(np.median(norms[len(norms) // 4 : 3 * len(norms) // 4])),
    )
    return f"the gradient norm grew from {short(early)} to {short(late)}" if late > 3 * early > 0 else None


def lr_too_low(evidence: Evidence) -> Finding | None:
    """The loss still falls evenly at the end, or hardly fell, with a rate far below the law's."""
    ratio, peak = evidence.lr_ratio, evidence.peak_lr
    if not evidence.has_curve or peak is None:
        return None
    fall = evidence.start - evidence.end
    if ratio is not None:
        if ratio > FAR_BELOW or evidence.end > evidence.lowest[1] + _worse_by(evidence):
            return None
        why = f"{evidence.rate_name} {short(peak)} is {ratio:.2g}× what `auto` gives ({short(evidence.lr_of_law or 0)}); the loss fell by {fall:.3f} to {evidence.end:.3f}"
        return Finding(
            "the learning rate is too low",
            why,
            f"set {evidence.rate_name} to `auto`, or to {short(evidence.lr_of_law or 0)}",
            min(0.96, 0.8 + 0.05 * np.log2(FAR_BELOW / ratio)),
        )
    looks = evidence.validation_loss
    if evidence.is_pretraining or len(looks) < 3:
        return None
    first, last = looks.values[0], looks.values[-1]
    if (
        abs(first - last) > 0.02 * first
        or abs(evidence.level(0.0, 0.25) - evidence.level(0.75, 1.0)) > 2 * evidence.noise
    ):
        return None
    why = (
        f"validation was {first:.3f} at step {looks.steps[0]} and is {last:.3f} after {looks.steps[-1]}, at "
        f"{evidence.rate_name} {short(peak)}"
    )
    next_rate = f"set {evidence.rate_name} to {short(10 * peak)}"
    return Finding(
        "the learning rate is too low: nothing moves",
        why,
        next_rate,
        0.95 if abs(first - last) < 0.005 * first else 0.7,
    )


def warmup_missing(evidence: Evidence) -> Finding | None:
    """The first full steps throw the weights off, and no warmup softened them."""
    warmup = evidence.resolved("warmup_steps")
    if not evidence.has_curve or warmup is None or warmup > max(1, 0.003 * len(evidence.loss)):
        return None
    size = max(8, len(evidence.loss) // 8)
    first = evidence.loss[:size]
    bump = int(np.argmax(first[1:])) + 1
    if (
        first[bump] < evidence.start + max(0.1, 0.02 * evidence.start, 3 * evidence.noise)
        or evidence.end > evidence.start - 0.05 * evidence.start
    ):
        return None
    return Finding(
        seen="warmup is missing",
        why=f"with {warmup:.0f} warmup steps the loss rose from {evidence.start:.3f} to {first[bump]:.3f} at step "
        f"{evidence.steps[bump]} before it fell to {evidence.end:.3f}",
        next=f"set {evidence.stage.name}.warmup to `5 %`; a lower rate helps too",
        sureness=0.85,
    )


def clipped_at_every_step(evidence: Evidence) -> Finding | None:
    """The limit on the gradient norm, not the gradient, sets the size of the steps."""
    limit = evidence.number("max_grad_norm")
    norms = np.array(evidence.stage.grad_norm.values)
    if limit is None or len(norms) < 20:
        return None
    after = norms[len(norms) // 10 :]
    clipped, middle = float(np.mean(after > limit)), float(np.median(after))
    if clipped < 0.98 or middle < 4 * limit:
        return None
    return Finding(
        seen="gradients are clipped at every step",
        why=f"{percent(clipped)} of the steps have a norm above max_grad_norm={short(limit)}; the median norm is {short(middle)}",
        next=f"raise {evidence.stage.name}.max_grad_norm to {short(2 * middle)}; where the norm grew first, lower the rate",
        sureness=0.75 if middle < 8 * limit else 0.9,
    )
