"""Symptoms of fine-tuning: what is forgotten, and answers that never stop."""

import statistics

from groundup.report.diagnosis.evidence import Evidence
from groundup.report.diagnosis.finding import Finding
from groundup.report.numbers import percent

FORGETTING = 0.08
LEAST_STOPPING = 0.7


def forgets(evidence: Evidence) -> Finding | None:
    """The base text is predicted worse than before."""
    stage = evidence.stage
    looks = stage.audit.get("base_bits_per_byte")
    before = stage.figure("audit_base_bits_per_byte_before")
    now = looks.values[-1] if looks else None
    if before is None or now is None:
        before, now = stage.figure("bits_per_byte_before"), stage.figure("bits_per_byte")
    if evidence.is_pretraining or before is None or now is None or now < (1 + FORGETTING) * before:
        return None
    return Finding(
        "the model forgets what it was pretrained on",
        f"bits per byte of the base text rose from {before:.3f} to {now:.3f}, {percent(now / before - 1)}",
        f"set {stage.name}.replay_every to 5, lower {evidence.rate_name}, or train an adapter",
        0.94,
    )


def never_stops(evidence: Evidence) -> Finding | None:
    """Answers run to their limit."""
    stage = evidence.stage
    looks = stage.audit.get("stop_rate")
    rate, least = stage.figure("stop_rate"), LEAST_STOPPING
    if rate is None and looks:
        # a few prompts, cut short, one much like another: they stop or go on together, and the last look is what the model is
        rate, least = max(statistics.median(looks.values[-3:]), looks.values[-1]), LEAST_STOPPING / 2
    if rate is None or rate >= least:
        return None
    return Finding(
        "answers do not stop by themselves",
        f"{percent(rate)} of the held-out questions got an answer that ended before the limit",
        "look whether the end of a turn is learned, with `groundup inspect masks`; then train longer",
        0.93 if rate < 0.5 else 0.75,
    )
