"""Where each parameter is cut, by its name and shape: what a rank of a mesh holds is known before any rank exists. Imports
no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from groundup.parallel.config import DIMS, Dim, ParallelConfig, Schedule

Shape = tuple[int, ...]
TENSOR_DIM: Mapping[str, int] = {
    "*.self_attn.[qkv]_proj.*": 0,
    "*.self_attn.o_proj.weight": 1,
    "*.mlp.gate_proj.weight": 0,
    "*.mlp.up_proj.weight": 0,
    "*.mlp.down_proj.weight": 1,
    "model.embed_tokens.weight": 0,
    "lm_head.weight": 0,
}
"""The dim that `parallel.tensor` cuts of a parameter, by patterns of names: what `parallel/tensor.py` does. What fits none
(norms, routers, experts) is whole on every rank of a product."""


@dataclass(frozen=True)
class Spread:
    """Degrees by dimension, and the place in the pipeline of the rank that is meant."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    shard: Literal["optimizer", "gradients", "parameters"] = "parameters"
    schedule: Schedule = "1f1b"
    cpu_offload: bool = False
    by_deepspeed: bool = False
    place: int = 0

    @classmethod
    def of(cls, degrees: Mapping[Dim, int], config: ParallelConfig, *, place: int = 0) -> "Spread":
        """A recipe's section, its degrees resolved, for a rank at that place of the pipeline."""
        return cls(
            pipeline=degrees["pipeline"],
            data_replicate=degrees["data_replicate"],
            data_shard=degrees["data_shard"],
            expert=degrees["expert"],
            context=degrees["context"],
            tensor=degrees["tensor"],
            shard=config.shard,
            schedule=config.pipeline_schedule,
            cpu_offload=config.cpu_offload,
            by_deepspeed=config.zero_stage > 0,
            place=place,
        )

    @property
    def degrees(self) -> dict[Dim, int]:
        return {dim: getattr(self, dim) for dim in DIMS}

    @property
    def num_ranks(self) -> int:
        return prod(self.degrees.values())

    @property
    def is_sharded(self) -> bool:
        """Whether some rank holds less than the whole model."""
        return self.num_ranks > self.data_replicate

    @property
    def num_row_shares(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.data_replicate * self.data_shard * self.expert


def tensor_dim(name: str) -> int | None:
    """The dim of a parameter that tensor ranks share; None where each has it whole."""
    return next((dim for pattern, dim in TENSOR_DIM.items() if fnmatchcase(name, pattern)), None)


def shard_dim(size: Shape, num_shards: int) -> int:
    """The dim that FSDP cuts: the first, but of a stack of experts that the ranks do not divide one that they do.

    Cut by experts, a rank would hold one expert where its share is less: FSDP pads to the largest.
    """
    if len(size) < 3 or size[0] % num_shards == 0:
        return 0
    return next((dim for dim in range(1, len(size)) if size[dim] % num_shards == 0), 0)


def held_shape(name: str, size: Shape, spread: Spread) -> Shape:
    """What a rank has of a parameter of its stages while it computes: all but `data_shard`, which gathers for that."""
    dim = tensor_dim(name)
    if dim is not None:
        size = _part(size, dim, spread.tensor)
    return _part(size, 0, spread.expert) if ".mlp.experts." in name else size


def shard_shape(size: Shape, spread: Spread) -> Shape:
    """What stays of it with a rank in the memory: its shard, padded to the largest as FSDP does."""
    return _part(size, shard_dim(size, spread.data_shard), spread.data_shard)


def _part(size: Shape, dim: int, degree: int) -> Shape:
    return (*size[:dim], -(-size[dim] // degree), *size[dim + 1 :])
