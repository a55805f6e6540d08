"""What ranks compare: that they run the same thing before the first step, and hold the same weights on the way."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundup.base.errors import DistributedError
from groundup.parallel.world import World

if TYPE_CHECKING:
    from torch import Tensor


STRAGGLER_RATIO = 2.0


def refuse_mismatch(world: World, facts: Mapping[str, Any]) -> None:
    """Raise DistributedError, on every rank, that names the first rank and the key whose value is not rank 0's."""
    if world.size == 1:
        return
    first, *others = world.gather({name: repr(value) for name, value in facts.items()})
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise DistributedError(
                    "E-RANK-MISMATCH",
                    what=f"rank {rank} differs from rank 0 in {name!r}: {other.get(name)} and not {first.get(name)}",
                    where="before the first step",
                    next="give every rank the same recipe, data and versions",
                )


def refuse_divergence(world: World, step: int, weights: Mapping[str, "Tensor"]) -> None:
    """Raise DistributedError, on every rank, if a rank's weights are not those of most, naming the first that differs."""
    if world.size == 1:
        return
    hashes = [_hash(weights[name]) for name in weights]
    together = world.gather(hashlib.sha256("".join(hashes).encode()).hexdigest())
    if len(set(together)) == 1:
        return
    # the most common; among equals rank 0's
    usual = together.index(Counter(together).most_common(1)[0][0])
    every = world.gather(hashes)
    odd = next(rank for rank, value in enumerate(together) if value != together[usual])
    name = next(name for name, mine, theirs in zip(weights, every[odd], every[usual], strict=True) if mine != theirs)
    raise DistributedError(
        "E-DIVERGED",
        what=f"rank {odd} holds other weights than rank {usual}, first in {name}",
        where=f"step {step}",
        next="the last checkpoint is from before: the same command goes on from it; if it comes again, test that machine",
    )


@dataclass(frozen=True)
class Straggler:
    """A rank that computes much longer than the others."""

    rank: int
    words: str


def find_straggler(world: World, busy_seconds: float) -> Straggler | None:
    """The slowest rank, if it computed `STRAGGLER_RATIO` times as long as the median of the others."""
    seconds = world.gather(busy_seconds)
    slowest = max(range(len(seconds)), key=lambda rank: float(seconds[rank]))
    usual = statistics.median(value for rank, value in enumerate(seconds) if rank != slowest)
    if seconds[slowest] < STRAGGLER_RATIO * usual:
        return None
    ratio = seconds[slowest] / max(usual, 1e-9)
    return Straggler(slowest, f"rank {slowest} computes {ratio:.1f}x the median of the others; all wait for it")


def _hash(weight: "Tensor") -> str:
    import torch

    return hashlib.sha256(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data).hexdigest()
