"""What becomes of a process that is refused memory: which error says so, and what to try next."""

from groundup.base.errors import DistributedError, DoesNotFit
from groundup.parallel.world import World

ALLOCATOR = "can't allocate memory"
"""What torch's CPU allocator says; CUDA has an error class of its own, whose words begin with the next."""
CUDA = "CUDA out of memory"
CHEAPEST_FIRST = (
    "lower `micro_batch_rows`, then `num_threads` and `row_length`, train with `adapter: lora`, or take a smaller model "
    "(fewer layers, a smaller vocabulary)"
)
"""The next settings to try, in the order of what they cost."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was refused."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in (ALLOCATOR, CUDA))
    )


def smaller_micro_batch(rows: int, lanes: int, world: World) -> tuple[int, int]:
    """(half the rows, lanes), or half the lanes for single rows, for another try at the same step.

    Raises DoesNotFit for a single row in one lane, and DistributedError where other ranks would not know of the smaller
    one.
    """
    if world.size > 1:
        raise DistributedError(
            "E-OOM-RANK",
            what=f"rank {world.rank} ran out of memory with micro-batches of {rows} rows",
            where=f"rank {world.rank}",
            next=f"set `micro_batch_rows: {max(1, rows // 2)}` and run the same command with `--allow-change` of it"
            if rows > 1
            else CHEAPEST_FIRST,
        )
    if rows > 1:
        return rows // 2, lanes
    if lanes > 1:
        return rows, lanes // 2
    raise does_not_fit("a micro-batch of a single row")


def layout_words(rows: int, lanes: int) -> str:
    """How a step is computed."""
    at_once = f", {lanes} at a time" if lanes > 1 else ""
    return f"micro-batches of {rows} rows{at_once}"


def does_not_fit(what: str) -> DoesNotFit:
    """The error for memory that did not suffice."""
    return DoesNotFit("E-MEMORY", what=f"out of memory in {what}", next=CHEAPEST_FIRST)
