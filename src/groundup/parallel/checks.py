"""What ranks compare: that they run the same thing before the first step, and hold the same weights on the way."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundup.base.errors import DistributedError
from groundup.parallel.config import DIMS
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
    """Raise DistributedError, on every rank, if a rank's weights are not those of most, naming the first that differs.

    Compared are ranks that hold the same part of the model: those that differ in `data_replicate` and `context` alone.
    """
    if world.size == 1:
        return
    hashes = [_hash(weights[name]) for name in weights]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    part = [world.mesh.coordinates[dim] for dim in DIMS if dim not in ("data_replicate", "context")]
    gathered = world.gather([part, digest])
    parts, together = [str(part) for part, _ in gathered], [digest for _, digest in gathered]
    # of each part the most common; among equals the first rank's
    usual_of = {
        part: together.index(Counter(d for p, d in zip(parts, together, strict=True) if p == part).most_common(1)[0][0])
        for part in dict.fromkeys(parts)
    }
    odd = next((rank for rank, part in enumerate(parts) if together[rank] != together[usual_of[part]]), None)
    if odd is None:
        return
    usual, every = usual_of[parts[odd]], world.gather([list(weights), hashes])
    (names, mine), (_, theirs) = every[odd], every[usual]
    name = next(name for name, own, other in zip(names, mine, theirs, strict=True) if own != other)
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
