"""The recipe's section of ranks. Nothing in it is part of a stage's key: a run may go on with other numbers."""

from math import prod
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from groundup.base.config import COSMETIC, Config

Dim = Literal["pipeline", "data_replicate", "data_shard", "expert", "context", "tensor"]
Schedule = Literal["gpipe", "1f1b", "interleaved"]
Engine = Literal["torch", "deepspeed"]
Shard = Literal["optimizer", "gradients", "parameters"]
DIMS: tuple[Dim, ...] = ("pipeline", "data_replicate", "data_shard", "expert", "context", "tensor")
"""Dimensions of the mesh, the outermost first: ranks that talk most lie closest together."""
REST = -1
"""A degree that takes what the others leave of the ranks."""
ZERO_STAGES: dict[Shard, int] = {"optimizer": 1, "gradients": 2, "parameters": 3}
"""Stages of ZeRO by what is the last thing to be sharded (arXiv:1910.02054)."""

Degree = Annotated[int, Field(ge=REST, json_schema_extra=COSMETIC)]


class ParallelConfig(Config):
    """How the training stages are spread over processes. Degrees multiply to the number of ranks; one may be -1."""

    engine: Engine = Field("torch", json_schema_extra=COSMETIC)
    """Who shards with data_shard: torch's FSDP2, or DeepSpeed's ZeRO, which goes with no other dimension."""
    data_replicate: Degree = REST
    """Ranks with whole copies of what the other dimensions leave: each computes its share of every batch."""
    data_shard: Degree = 1
    """Ranks that share a batch and hold a shard each of weights, gradients and optimizer (FSDP2, ZeRO)."""
    tensor: Degree = 1
    """Ranks that share each product, each with its heads and columns, and the tokens between them."""
    pipeline: Degree = 1
    """Ranks that hold a run of layers each and pass micro-batches on."""
    pipeline_schedule: Schedule = Field("1f1b", json_schema_extra=COSMETIC)
    """With pipeline: all micro-batches forward, then all backward (gpipe); one forward, one backward in turn (1f1b), which
    keeps fewer of them at a time; the same with two shorter runs of layers a rank (interleaved), whose ranks wait less."""
    expert: Degree = 1
    """Ranks that share a batch and hold a share of the experts each; tokens travel to their experts."""
    context: Degree = 1
    """Ranks that share each row: every one has a part of its tokens and gathers the keys and values of all."""
    shard: Shard = Field("parameters", json_schema_extra=COSMETIC)
    """With data_shard: parameters are gathered for each block and let go after it (ZeRO-3), or gathered once a
    micro-batch, gradients and optimizer alone staying in shards (ZeRO-2); optimizer alone (ZeRO-1) with deepspeed."""
    cpu_offload: bool = Field(False, json_schema_extra=COSMETIC)
    """With data_shard: shards and their optimizer lie in the host's memory; with deepspeed and ZeRO-1 or 2 the optimizer."""
    deepspeed_config: str | None = Field(None, json_schema_extra=COSMETIC)
    """A JSON file of DeepSpeed's own settings, for what the recipe does not say: sizes of buckets, thresholds, offload of
    the optimizer alone. What contradicts the recipe is refused."""
    check_every: PositiveInt = Field(100, json_schema_extra=COSMETIC)
    """Steps from one comparison of the ranks' weights to the next; they are compared before each checkpoint too."""
    max_restarts: NonNegativeInt = Field(3, json_schema_extra=COSMETIC)
    """How often ranks that were lost are started again from the last checkpoint."""

    @field_validator(*DIMS)
    @classmethod
    def _is_a_degree(cls, degree: int) -> int:
        if degree == 0:
            raise ValueError("a degree is 1 or more, or -1 for the rest of the ranks")
        return degree

    @model_validator(mode="after")
    def _has_one_rest(self) -> "ParallelConfig":
        if sum(degree == REST for degree in self.degrees.values()) > 1:
            raise ValueError("only one degree can be -1, the rest of the ranks")
        return self

    @model_validator(mode="after")
    def _has_an_engine_for_it(self) -> "ParallelConfig":
        if self.engine == "torch" and self.shard == "optimizer":
            raise ValueError("shard: optimizer (ZeRO-1) needs engine: deepspeed; torch's engine has gradients (ZeRO-2)")
        if self.engine == "torch" and self.deepspeed_config is not None:
            raise ValueError("deepspeed_config is read with engine: deepspeed alone")
        for dim in ("tensor", "pipeline", "expert", "context"):
            if self.engine == "deepspeed" and self.degrees[dim] != 1:
                raise ValueError(
                    f"engine: deepspeed shards over data_shard alone; leave {dim} out, or take engine: torch"
                )
        return self

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage of ZeRO; 0 where torch's engine shards."""
        return ZERO_STAGES[self.shard] if self.engine == "deepspeed" else 0

    @property
    def degrees(self) -> dict[Dim, int]:
        """Degree by dimension, -1 not resolved."""
        return {dim: getattr(self, dim) for dim in DIMS}

    @property
    def num_ranks(self) -> int:
        """Ranks that the section asks for by itself; -1 asks for none."""
        return prod(degree for degree in self.degrees.values() if degree != REST)
