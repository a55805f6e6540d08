"""Reading ahead."""

import numpy as np
import pytest
import torch

from groundup.data.loader import prefetched_batches


class Numbers:
    """Rows that hold their own number."""

    row_length, rows_per_epoch = 2, 5

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def row(self, index):
        if index == self.fails_at:
            raise OSError("the disk is gone")
        return np.full(2, index), np.full(2, index), np.zeros(2, dtype=np.int64)

    def documents_of(self, index):
        return [index]


def test_step_reads_its_own_rows():
    batches = list(prefetched_batches(Numbers(), batch_rows=3, first_step=2, last_step=5))
    assert [batch.tokens_BT[:, 0].tolist() for batch in batches] == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert all(batch.tokens_BT.dtype == torch.int64 for batch in batches)
    assert not list(prefetched_batches(Numbers(), batch_rows=3, first_step=5, last_step=5))


def test_an_error_while_reading_ahead_comes_to_the_step_that_needs_the_rows():
    batches = prefetched_batches(Numbers(fails_at=4), batch_rows=3, first_step=0, last_step=3)
    assert next(batches).tokens_BT[0, 0] == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
