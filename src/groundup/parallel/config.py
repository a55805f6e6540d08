"""The recipe's section of ranks. Nothing in it is part of a stage's key: a run may go on with other numbers."""

from pydantic import Field, NonNegativeInt, PositiveInt

from groundup.base.config import COSMETIC, Config


class ParallelConfig(Config):
    """How the training stages are spread over processes."""

    data: PositiveInt = Field(1, json_schema_extra=COSMETIC)
    """Data-parallel ranks: each computes its share of every batch. Under torchrun, the number that it started."""
    check_every: PositiveInt = Field(100, json_schema_extra=COSMETIC)
    """Steps from one comparison of the ranks' weights to the next; they are compared before each checkpoint too."""
    max_restarts: NonNegativeInt = Field(3, json_schema_extra=COSMETIC)
    """How often ranks that were lost are started again from the last checkpoint."""
