"""Reading ahead: the next step's rows are gathered while the current step computes. Holds no state."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from groundup.base.failpoints import reach
from groundup.data.rows import RowBatch, RowSource, read_batch


def prefetched_batches(source: RowSource, *, batch_rows: int, first_step: int, last_step: int) -> Iterator[RowBatch]:
    """Batch of each step from `first_step` to `last_step` (excluded): step s reads rows [s × batch_rows, (s+1) × batch_rows)."""
    if first_step >= last_step:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        upcoming = pool.submit(_read, source, first_step * batch_rows, batch_rows)
        for step in range(first_step, last_step):
            batch = upcoming.result()
            if step + 1 < last_step:
                upcoming = pool.submit(_read, source, (step + 1) * batch_rows, batch_rows)
            yield batch


def _read(source: RowSource, first_row: int, num_rows: int) -> RowBatch:
    reach("loader.batch")
    return read_batch(source, first_row, num_rows)
