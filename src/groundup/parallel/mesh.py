"""The mesh: how many ranks each dimension has, where this rank stands, and the groups it talks to."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import gcd, prod
from typing import TYPE_CHECKING

from groundup.base.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.parallel.config import DIMS, REST, Dim, ParallelConfig
from groundup.parallel.connections import watch_connections

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

ROW_DIMS: tuple[Dim, ...] = ("data_replicate", "data_shard", "expert")
"""Dimensions that share the rows of a batch."""
TOKEN_DIMS: tuple[Dim, ...] = (*ROW_DIMS, "context")
"""Dimensions whose ranks see different tokens: gradients and losses are summed over them."""


class Mesh:
    """Degrees by dimension and this rank's coordinates; rank 0 has coordinate 0 everywhere, the last dimension runs fastest.

    Without degrees: one rank, the same path.
    """

    def __init__(
        self,
        degrees: Mapping[Dim, int] | None = None,
        *,
        rank: int = 0,
        device_type: str = "cpu",
        zero_stage: int = 0,
    ) -> None:
        self.degrees: dict[Dim, int] = dict.fromkeys(DIMS, 1) | dict(degrees or {})
        self.rank, self.device_type = rank, device_type
        self.zero_stage = zero_stage
        """Of DeepSpeed; 0 where torch's own parts hold the model."""
        self.coordinates: dict[Dim, int] = {}
        for dim in reversed(DIMS):
            rank, self.coordinates[dim] = divmod(rank, self.degrees[dim])

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.degrees.values())

    @property
    def is_sharded(self) -> bool:
        """Whether some rank holds less than the whole model, or DeepSpeed holds it."""
        return self.size > self.degrees["data_replicate"] or self.zero_stage > 0

    def has(self, dim: Dim) -> bool:
        """Whether a dimension has more than one rank."""
        return self.degrees[dim] > 1

    @property
    def num_row_shares(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return prod(self.degrees[dim] for dim in ROW_DIMS)

    @property
    def row_share(self) -> int:
        """Number of this rank's part of the rows."""
        share = 0
        for dim in ROW_DIMS:
            share = share * self.degrees[dim] + self.coordinates[dim]
        return share

    def rank_at(self, coordinates: Mapping[Dim, int]) -> int:
        """The rank at a place."""
        rank = 0
        for dim in DIMS:
            rank = rank * self.degrees[dim] + coordinates[dim]
        return rank

    @cached_property
    def devices(self) -> "DeviceMesh":
        """torch's mesh of the dimensions with more than one rank. Collective where no equal mesh was made before."""
        import torch.distributed as dist

        return _device_mesh(
            dist.group.WORLD, self.device_type, tuple(dim for dim in DIMS if self.has(dim)), self.degrees
        )

    def along(self, *dims: Dim) -> "DeviceMesh":
        """torch's mesh of some dimensions, through this rank."""
        return self.devices[dims if len(dims) > 1 else dims[0]]

    def group(self, dim: Dim) -> "dist.ProcessGroup":
        """The ranks that differ from this one in one dimension only."""
        return self.along(dim).get_group()

    def groups(self, dims: tuple[Dim, ...]) -> Iterator["dist.ProcessGroup"]:
        """The groups of those of the dimensions that have more than one rank."""
        return (self.group(dim) for dim in dims if self.has(dim))

    def describe(self) -> str:
        """How ranks share the model, in words: `data_shard 2 × tensor 2`; empty where each holds the whole."""
        if not self.is_sharded:
            return ""
        engine = [f"deepspeed zero{self.zero_stage}"] if self.zero_stage else []
        return " × ".join([*engine, *(f"{dim} {degree}" for dim, degree in self.degrees.items() if degree > 1)])


_made: dict[tuple[object, ...], "DeviceMesh"] = {}
"""Meshes of this process. Each of gloo's groups keeps a thread that wakes a hundred times a second for as long as the
process lives: three hundred groups took a whole core."""


def _device_mesh(
    world: "dist.ProcessGroup | None", device_type: str, dims: tuple[Dim, ...], degrees: Mapping[Dim, int]
) -> "DeviceMesh":
    """The one mesh of these degrees over this process group."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes = tuple(degrees[dim] for dim in dims)
    for stale in [key for key in _made if key[0] is not world]:
        del _made[stale]
    key = (world, device_type, dims, sizes)
    if key not in _made:
        _made[key] = init_device_mesh(device_type, sizes, mesh_dim_names=tuple(dims))
        watch_connections()  # its groups have their own
    return _made[key]


def degrees_of(config: ParallelConfig, num_ranks: int) -> dict[Dim, int]:
    """The degrees with -1 resolved for so many ranks. Raises ConfigError, with the nearest split, where they do not multiply to it."""
    degrees = config.degrees
    rest = [dim for dim, degree in degrees.items() if degree == REST]
    fixed = config.num_ranks
    if (rest and num_ranks % fixed == 0) or fixed == num_ranks:
        found = degrees | dict.fromkeys(rest, num_ranks // fixed)
        if config.zero_stage and found["data_replicate"] > 1:
            raise _cannot(
                "data_replicate",
                found["data_replicate"],
                "DeepSpeed shards over all its ranks",
                f"set parallel.data_shard: {num_ranks}",
            )
        return found
    asked = " × ".join(f"{dim} {degree}" for dim, degree in degrees.items() if degree > 1) or "no degree"
    nearest = _nearest(degrees, num_ranks)
    raise ConfigError(
        "E-CONFIG-MESH",
        what=f"{asked} is {fixed} ranks{' or a multiple' if rest else ''}, and there are {num_ranks}",
        where="parallel",
        next=f"start {fixed} ranks, or set {{{', '.join(f'{dim}: {degree}' for dim, degree in nearest.items())}}}",
    )


def _nearest(degrees: Mapping[Dim, int], num_ranks: int) -> dict[Dim, int]:
    """Every degree lowered to what still divides the ranks, from the innermost outwards; the rest is data. What divides a model
    or a row is lowered to a divisor, which does so too."""
    found: dict[Dim, int] = {}
    left = num_ranks
    for dim in reversed(DIMS):
        if dim != "data_replicate" and degrees[dim] > 1:
            most = degrees[dim] if dim in ("data_shard", "pipeline") else gcd(degrees[dim], left)
            found[dim] = max(degree for degree in range(1, most + 1) if left % degree == 0)
            left //= found[dim]
    return {dim: degree for dim, degree in found.items() if degree > 1} | {"data_replicate": left}


def check_mesh(degrees: Mapping[Dim, int], shape: ModelConfig, *, row_length: int, has_adapter: bool) -> None:
    """Raise ConfigError, naming the nearest degree that works, for a model or rows that a dimension cannot divide."""
    divided: list[tuple[Dim, str, int]] = [
        ("tensor", "num_attention_heads", shape.num_attention_heads),
        ("tensor", "num_key_value_heads", shape.num_key_value_heads),
        ("tensor", "intermediate_size", shape.intermediate_size),
        ("tensor", "row_length", row_length),
    ]
    if shape.vocab_size != "auto":
        divided.append(("tensor", "vocab_size", shape.vocab_size))
    if degrees["expert"] > 1:
        if shape.num_experts is None:
            raise _cannot("expert", degrees["expert"], "the model has no experts", "leave parallel.expert out")
        divided.append(("expert", "num_experts", shape.num_experts))
    # a rank has the same part of the row from the front and from the back, so that all have as much to attend to
    divided.append(("context", "row_length / 2", row_length // 2 if row_length % 2 == 0 else 1))
    for dim, name, size in divided:
        if size % degrees[dim]:
            nearest = max(degree for degree in range(1, degrees[dim]) if size % degree == 0)
            beside, left = divmod(degrees["data_replicate"] * degrees[dim], nearest)
            then = f"set parallel.{dim}: {nearest}"
            if not left:
                then += f", for as many ranks with data_replicate: {beside}"
            raise _cannot(dim, degrees[dim], f"{name}={size} is no multiple", then)
    if degrees["pipeline"] > shape.num_hidden_layers:
        raise _cannot(
            "pipeline",
            degrees["pipeline"],
            f"there are {shape.num_hidden_layers} layers",
            f"set parallel.pipeline: {shape.num_hidden_layers} or fewer",
        )
    if degrees["pipeline"] > 1 and shape.num_experts is not None:
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(shape, name):
                raise _cannot(
                    "pipeline",
                    degrees["pipeline"],
                    f"{name}={getattr(shape, name)} is a loss of layers that the last rank does not have",
                    f"set {name}: 0",
                )
    for dim in ("tensor", "pipeline", "expert"):
        if has_adapter and degrees[dim] > 1:
            raise _cannot(
                dim,
                degrees[dim],
                "adapters are trained on whole layers",
                "spread them with data_replicate or data_shard",
            )


def _cannot(dim: Dim, degree: int, why: str, then: str) -> ConfigError:
    return ConfigError("E-CONFIG-MESH", what=f"parallel.{dim}: {degree}: {why}", where="parallel", next=then)
