"""Ways to spread a model that are wrong: each must be seen by the proof."""

from unittest.mock import patch

from torch.distributed.fsdp import FSDPModule

from groundup.proof.spread.compare import compare
from groundup.train import spread_engine


def averages(world, *arguments):
    """Gradients averaged over the ranks, FSDP2's own habit."""
    usual = FSDPModule.set_gradient_divide_factor
    with patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, _: usual(self, float(world.size))):
        return compare(world, *arguments)


def shards_nothing(world, shape, parallel, *rest):
    """Every rank keeps the whole model."""
    return compare(world, shape, {"data_replicate": 2}, *rest)


def norm_of_a_shard(world, *arguments):
    """Each rank clips by its own shard's norm."""

    def own(gradients, mesh, device):
        return sum((gradient.square().sum() for gradient, _ in gradients), start=0.0) ** 0.5

    with patch.object(spread_engine, "norm_over_ranks", own):
        return compare(world, *arguments)
