"""Where each parameter is cut, by formula, beside what torch's own mesh, sharding and tensor parallelism leave on a rank."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from parallel.tiny_shapes import DENSE
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import Spread, shard_dim, shard_shape
from groundup.parallel.shards import holding_of, local
from groundup.parallel.world import World
from groundup.train.spread_footprint import gathered_numbers, held_shapes
from groundup.train.weight_shapes import block_shapes, parameter_shapes

BIASED = DENSE | {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False}
EXPERTS = DENSE | {
    "model_type": "dots1",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "router_aux_loss_coef": 0.0,
}
MESHES = [
    (DENSE, {"data_replicate": 64}),
    (DENSE, {"data_shard": 8}),
    (DENSE, {"data_shard": 3, "tensor": 2}),
    (BIASED, {"data_replicate": 2, "data_shard": 4, "tensor": 2}),
    (DENSE, {"pipeline": 4, "data_shard": 2, "context": 2}),
    (BIASED, {"pipeline": 2, "pipeline_schedule": "interleaved", "tensor": 2, "data_shard": 2}),
    (EXPERTS, {"expert": 3, "data_shard": 4}),
    (EXPERTS, {"data_shard": 8}),
    (EXPERTS, {"expert": 2, "tensor": 2, "pipeline": 2}),
]


@pytest.fixture
def fake_world():
    """Makes one rank of a world of any size, whose messages go nowhere."""

    def make(rank, parallel):
        config = ParallelConfig(**{"data_replicate": 1} | parallel)
        dist.init_process_group("fake", rank=rank, world_size=config.num_ranks, store=FakeStore())
        world = World(rank, config.num_ranks, num_local=8)
        world.spread(config)
        return world

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize(("shape", "parallel"), MESHES, ids=lambda value: " ".join(map(str, value.items()))[-60:])
def test_what_the_formula_says_is_what_a_rank_holds(fake_world, shape, parallel):
    shape = ModelConfig(**shape)
    config = ParallelConfig(**{"data_replicate": 1} | parallel)
    per_stage = config.num_ranks // config.pipeline
    for place in {0, config.pipeline - 1}:
        if dist.is_initialized():
            dist.destroy_process_group()
        world = fake_world(place * per_stage, parallel)  # the first of the ranks that share a stage: none is larger
        spread = Spread.of(config.degrees, config, place=place)
        with torch.device("meta"):
            model = CausalLM(shape)
        apply(model, recompute="none", compiles=False, world=world)
        held = held_shapes(parameter_shapes(shape), shape, spread)
        wanted = {name: shard_shape(size, spread) for name, size in held.items() if "correction_bias" not in name}
        found = {
            name: tuple(local(weight).shape)
            for name, weight in model.named_parameters()
            if "correction_bias" not in name
        }
        assert found == wanted
        pieces = {name: holding_of(weight, world.mesh).piece.shape for name, weight in model.named_parameters()}
        assert {name: pieces[name] for name in wanted} == wanted
        assert len(found) > 3 and (config.num_ranks == config.data_replicate or found != parameter_shapes(shape))


def test_a_stack_that_shards_do_not_divide_is_cut_inside_its_matrices():
    assert shard_dim((6, 32, 16), 3) == 0
    assert shard_dim((6, 32, 16), 8) == 1
    assert shard_dim((6, 30, 16), 8) == 2
    assert shard_dim((6, 30, 15), 8) == 0 and shard_dim((30, 16), 8) == 0


def test_what_a_rank_has_gathered_while_it_computes():
    """Of ZeRO-3 the ends and two blocks; where parameters are in no shards, all that it holds."""
    shape = ModelConfig(**DENSE)
    held = held_shapes(parameter_shapes(shape), shape, Spread(data_shard=2))
    whole, block = (sum(map(prod, sizes)) for sizes in (held.values(), block_shapes(shape, 0).values()))
    gathered = {
        shard: gathered_numbers(held, Spread(data_shard=2, shard=shard))
        for shard in ("optimizer", "gradients", "parameters")
    }
    assert gathered == {"optimizer": whole, "gradients": whole, "parameters": whole - 2 * block}
    assert gathered_numbers(held, Spread()) == 0
