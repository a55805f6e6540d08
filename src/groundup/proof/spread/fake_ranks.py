"""One rank of a world of any size, alone: torch builds the mesh and cuts a model that takes no memory; its messages go nowhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundup.base.errors import DistributedError
from groundup.model.causal_lm import CausalLM
from groundup.model.config import ModelConfig
from groundup.parallel.apply import apply
from groundup.parallel.config import ParallelConfig
from groundup.parallel.cut import Shape, Spread, shard_shape
from groundup.parallel.shards import local
from groundup.parallel.world import World
from groundup.train.spread_footprint import held_shapes
from groundup.train.weight_shapes import parameter_shapes


@contextmanager
def fake_rank(rank: int, config: ParallelConfig) -> Iterator[World]:
    """The world as that rank of `config.num_ranks` has it. Not where this process has met others already."""
    dist.init_process_group("fake", rank=rank, world_size=config.num_ranks, store=FakeStore())
    try:
        world = World(rank, config.num_ranks)
        world.spread(config)
        yield world
    finally:
        dist.destroy_process_group()


def local_shapes(
    shape: ModelConfig, config: ParallelConfig, rank: int, *, attention: str, dtype: torch.dtype
) -> dict[str, Shape]:
    """Shape of what torch leaves of each parameter on a rank. Raises ConfigError for what the mesh does not go with, and
    DistributedError where the formula of memory says otherwise."""
    with torch.device("meta"):
        model = CausalLM(shape)
    model.use_attention(attention)  # type: ignore[arg-type]
    with fake_rank(rank, config) as world:
        apply(model, recompute="none", compiles=False, world=world, dtype=dtype)
        found = {name: tuple(local(weight).shape) for name, weight in model.named_parameters()}
        place = world.mesh.coordinates["pipeline"]
        whole = {
            name for name in found if name.endswith("e_score_correction_bias")
        }  # no gradient moves it: in no shard
    spread = Spread.of(config.degrees, config, place=place)
    held = held_shapes(parameter_shapes(shape), shape, spread)
    planned = {name: size if name in whole else shard_shape(size, spread) for name, size in held.items()}
    odd = next((name for name in sorted(found.keys() | planned.keys()) if not _fits(found, planned, name)), None)
    if odd is not None:
        raise DistributedError(
            "E-PROOF",
            what=f"rank {rank} would hold {odd} as {found.get(odd)}, and its memory is counted for {planned.get(odd)}",
            where="parallel",
            next="do not trust the memory below; report this",
        )
    return found


def _fits(found: dict[str, Shape], planned: dict[str, Shape], name: str) -> bool:
    """The formula counts the largest shard, to which FSDP pads the others."""
    if name not in found or name not in planned:
        return False
    return len(found[name]) == len(planned[name]) and all(
        a <= b for a, b in zip(found[name], planned[name], strict=True)
    )
