"""Ways to spread a model that are wrong: each must be seen by the proof."""

from unittest.mock import patch

from torch.distributed.fsdp import FSDPModule

from groundup.parallel import pipeline
from groundup.parallel.pipeline import Pipeline
from groundup.proof.spread.compare import compare
from groundup.train import pipeline_engine, spread_engine


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


def leaves_tied_apart(world, *arguments):
    """Each end of the pipeline moves the tied weight by its own gradient."""
    with patch.object(Pipeline, "add_between_ends", lambda *_: None):
        return compare(world, *arguments)


def keeps_every_layer(world, *arguments):
    """No layer is dropped."""
    with patch.object(pipeline, "keep_stages", lambda *_: None):
        return compare(world, *arguments)


def counts_tied_twice(world, *arguments):
    """Both ends of the pipeline count the tied weight in the norm."""
    with patch.object(pipeline_engine, "replace", lambda holding, **_: holding):
        return compare(world, *arguments)
