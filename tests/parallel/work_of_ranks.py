"""What the tests of the world let two ranks do."""

import torch
import torch.distributed as dist

from groundup.parallel import world as rooms
from groundup.parallel.checks import refuse_divergence, refuse_mismatch
from groundup.parallel.mesh import Mesh


def say(world, values):
    mine = values[world.rank]
    world.barrier()
    return {
        "broadcast": world.broadcast(mine),
        "gather": world.gather(mine),
        "any": world.any(world.rank == 1),
        "none": world.any(False),
        "sums": world.sum_counts([world.rank, 1, 1 << 40]),
    }


def reduce(world, shapes, bucket_elements):
    rooms.BUCKET_ELEMENTS, before = bucket_elements, rooms.BUCKET_ELEMENTS
    generator = torch.Generator().manual_seed(world.rank)
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    if len(shapes[-1]) == 2:
        gradients[-1] = gradients[-1].t().contiguous().t()
    world.all_reduce_gradients(gradients)
    rooms.BUCKET_ELEMENTS = before
    return [gradient.flatten().tolist() for gradient in gradients]


def compare_facts(world, facts):
    refuse_mismatch(world, facts[world.rank])
    return "same"


def compare_weights(world, flipped):
    """Weights with one flipped mantissa bit on rank 1."""
    weights = {name: torch.arange(12.0).view(3, 4) + 1 for name in ("h.0.w", "h.3.w", "h.4.w")}
    weights["h.4.b"] = torch.ones(5, dtype=torch.bfloat16)
    if world.rank == 1 and flipped:
        weights[flipped].view(torch.int32)[1, 2] ^= 1
    refuse_divergence(world, 300, weights)
    return "same"


def groups_of_equal_meshes(world):
    """Process groups, after one mesh and after three more with its degrees."""
    counts = []
    for _ in range(4):
        Mesh({"data_shard": world.size // 2, "tensor": 2}, rank=world.rank).devices  # noqa: B018
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts
