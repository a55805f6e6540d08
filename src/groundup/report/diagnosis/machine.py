"""Symptoms of the machine: waiting for data, memory that grows, a slow rank, fp16 out of range, experts without work."""

import itertools

import numpy as np

from groundup.report.diagnosis.evidence import Evidence
from groundup.report.diagnosis.finding import Finding
from groundup.report.numbers import percent, size

WAITING = 0.3
"""Share of a step's time from which waiting for data is worth a word."""
DEAD = 0.1
"""Share of an even load below which an expert does not work."""


def loader_bound(evidence: Evidence) -> Finding | None:
    """Steps wait for their data."""
    shares = evidence.stage.data_fraction.values[1:]
    if len(shares) < 10:
        return None
    share = float(np.median(shares))
    if share < WAITING:
        return None
    return Finding(
        "training waits for its data",
        f"the median step spends {percent(share)} of its time waiting for rows",
        "put the tokens on a local disk, and look at what else reads it; a larger row or batch reads fewer pieces",
        0.95 if share > 0.35 else 0.8,
    )


def memory_creeps(evidence: Evidence) -> Finding | None:
    """The process grows from step to step."""
    sizes = np.array(evidence.stage.peak_memory_bytes.values)
    if len(sizes) < 40:
        return None
    later = sizes[len(sizes) // 3 :]
    grown = float(later[-1] - later[0])
    ends = [later[number * (len(later) - 1) // 4] for number in range(5)]
    quarters = [after - before for before, after in itertools.pairwise(ends)]
    # what an allocator still gathers comes slower and slower, a leak at the same pace
    if grown < max(0.05 * later[0], 16e6) or min(quarters) < 0.15 * grown or quarters[-1] < 0.6 * quarters[0]:
        return None
    each = grown / len(later)
    return Finding(
        "memory creeps up",
        f"the process grew from {size(later[0])} to {size(later[-1])} in the last {len(later)} steps, {size(each)} a step, in every quarter of them",
        "something keeps what a step computed; what is saved resumes, so begin the process anew before the memory is gone",
        0.9,
    )


def slow_rank(evidence: Evidence) -> Finding | None:
    """One rank computes longer, and all wait for it."""
    found = evidence.events("straggler")
    if not found:
        return None
    step, words = found[0]
    return Finding(
        "a rank is slow",
        f"step {step}: {words}",
        "look at that machine: its clock, its heat, what else runs on it; leave it out until then",
        0.95,
    )


def fp16_overflows(evidence: Evidence) -> Finding | None:
    """Gradients leave fp16's range again and again."""
    counts = evidence.stage.overflow_steps
    steps = len(counts)
    if steps < 10:
        return None
    total = counts.values[-1]
    later = total - counts.values[steps // 4]
    if total < max(6, 0.02 * steps) or not later:
        return None
    return Finding(
        "gradients overflow fp16",
        f"{total:.0f} of {steps} steps were passed over, {later:.0f} of them after the first quarter",
        f"set {evidence.stage.name}.precision to bf16; where only fp16 is fast, lower the rate",
        0.93,
    )


def dead_experts(evidence: Evidence) -> Finding | None:
    """Experts that hardly any token is given to."""
    dead = [
        (layer, expert)
        for layer, shares in enumerate(evidence.stage.expert_shares)
        for expert, share in enumerate(shares)
        if share < DEAD / len(shares)
    ]
    if not dead:
        return None
    total = sum(len(shares) for shares in evidence.stage.expert_shares)
    named = ", ".join(f"{layer}.{expert}" for layer, expert in dead[:6])
    return Finding(
        "experts are dead",
        f"{len(dead)} of {total} experts (layer.expert {named}{' …' if len(dead) > 6 else ''}) got less than {percent(DEAD)} of an even share in the last quarter",
        "raise model.router_aux_loss_coef, or balance with a router bias; a lower rate keeps routers from collapsing",
        0.93,
    )
