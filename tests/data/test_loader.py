"""Reading ahead."""

import contextlib
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from groundup.base import failpoints
from groundup.base.errors import DataError
from groundup.data import loader
from groundup.data.loader import prefetched_batches
from groundup.model.loss import IGNORE_INDEX
from groundup.model.segments import Segments


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


def test_an_error_while_reading_ahead_names_the_row_at_the_step_that_needs_it():
    batches = prefetched_batches(Numbers(fails_at=4), batch_rows=3, first_step=0, last_step=3)
    assert next(batches).tokens_BT[0, 0] == 0
    with pytest.raises(DataError, match=r"E-LOADER: cannot read row 4: OSError: the disk is gone at rows 3 to 5"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")], "a thread is left"


def test_a_fault_inside_the_thread_ends_the_run_in_words(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "loader.batch:raise:2")
    batches = prefetched_batches(Numbers(), batch_rows=3, first_step=0, last_step=3)
    next(batches)
    with pytest.raises(DataError, match="E-LOADER: cannot read row 3 or one after it: RuntimeError: failpoint"):
        list(batches)


class Recorder:
    """Stands for torch.cuda: writes down what it is asked for."""

    def __init__(self):
        self.calls = []

    def Stream(self, device):
        self.calls.append(f"stream on {device}")
        return SimpleNamespace(record_event=lambda: self.calls.append("copied") or "event")

    @contextlib.contextmanager
    def stream(self, stream):
        self.calls.append("copying")
        yield

    def current_stream(self, device):
        return SimpleNamespace(wait_event=lambda event: self.calls.append(f"waits for {event}"))


def test_on_cuda_the_next_batch_is_pinned_and_copied_beside_the_step(monkeypatch):
    """The order of the calls; no CUDA device is needed, and none was asked."""
    cuda = Recorder()
    monkeypatch.setattr(loader.torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: cuda.calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: cuda.calls.append("kept"))
    moves = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: moves.append((device, how)) or to(self, "cpu"))
    batches = list(prefetched_batches(Numbers(), batch_rows=3, first_step=0, last_step=1, device="cuda:1"))
    assert cuda.calls == [
        *("stream on cuda:1", "copying", "pinned", "pinned", "pinned", "copied"),
        *("waits for event", "kept", "kept", "kept"),
    ]
    assert moves == [("cuda:1", {"non_blocking": True})] * 3
    assert batches[0].counts == (2, 2, 2) and batches[0].slice(1, 3).num_loss_tokens == 4


def test_a_slice_reads_no_label_where_the_counts_are_known():
    batch = next(prefetched_batches(Numbers(), batch_rows=3, first_step=0, last_step=1))
    unread = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE_INDEX))
    assert unread.slice(0, 2).num_loss_tokens == 4 and replace(unread, counts=()).slice(0, 2).num_loss_tokens == 0


def test_a_slice_keeps_the_room_that_was_counted_for_its_documents():
    """Else the documents of a micro-batch on a device take a place a token."""
    batch = next(prefetched_batches(Numbers(), batch_rows=3, first_step=0, last_step=1))
    counted = replace(batch, segments=Segments(batch.segments.starts_BT, 5))
    assert counted.slice(0, 2).segments.max_documents == 5
