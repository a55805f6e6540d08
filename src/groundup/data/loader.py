"""Reading ahead: the next step's rows are gathered, and copied to the device, while the current step computes.

Holds no state: what a step reads is a function of its number.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from groundup.base.errors import DataError, GroundupError
from groundup.base.failpoints import reach
from groundup.data.rows import RowBatch, RowSource, read_batch


def prefetched_batches(
    source: RowSource, *, batch_rows: int, first_step: int, last_step: int, device: str = "cpu"
) -> Iterator[RowBatch]:
    """Batch of each step from `first_step` to `last_step` (excluded): step s reads rows [s × batch_rows, (s+1) × batch_rows).

    For a CUDA device the batches lie there, one ahead of the step that computes. Raises DataError, at the step that
    needs it, for a row that cannot be read.
    """
    if first_step >= last_step:
        return
    stream = torch.cuda.Stream(device) if device.startswith("cuda") else None  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        upcoming = pool.submit(_read, source, first_step * batch_rows, batch_rows, device, stream)
        for step in range(first_step, last_step):
            batch, copied = upcoming.result()
            if copied is not None:
                computing = torch.cuda.current_stream(device)
                computing.wait_event(copied)
                for tensor in batch.tensors():
                    tensor.record_stream(computing)  # made on another stream: its memory must outlive this one's work
            if step + 1 < last_step:
                upcoming = pool.submit(_read, source, (step + 1) * batch_rows, batch_rows, device, stream)
            yield batch


def _read(
    source: RowSource, first_row: int, num_rows: int, device: str, stream: torch.cuda.Stream | None
) -> tuple[RowBatch, torch.cuda.Event | None]:
    try:
        reach("loader.batch")
        batch = read_batch(source, first_row, num_rows)
    except GroundupError:
        raise
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(
            "E-LOADER",
            what=f"cannot read row {_first_bad_row(source, first_row, num_rows)}: {type(error).__name__}: {error}",
            where=f"rows {first_row} to {first_row + num_rows - 1}",
            next="the token files may have changed or their disk may be gone; the same command goes on from the last "
            "checkpoint when they are back",
        ) from error
    if stream is None:
        return batch, None
    with torch.cuda.stream(stream):
        return batch.pinned().to(device), stream.record_event()


def _first_bad_row(source: RowSource, first_row: int, num_rows: int) -> str:
    for row in range(first_row, first_row + num_rows):
        try:
            source.row(row)
        except (OSError, ValueError, IndexError, RuntimeError):
            return str(row)
    return f"{first_row} or one after it"
