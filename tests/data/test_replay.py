"""Rows of text between rows of chats."""

import numpy as np
import pytest

from groundup.data.replay import ReplayedRows
from groundup.data.rows import read_batch


class Counted:
    """A source whose row n is made of the number n, negative for text."""

    def __init__(self, rows_per_epoch, *, sign=1, row_length=4):
        self.rows_per_epoch, self.sign, self.row_length = rows_per_epoch, sign, row_length

    def row(self, index):
        tokens = np.full(self.row_length, self.sign * (index + 1))
        return tokens, tokens, np.zeros(self.row_length, dtype=np.int64)

    def documents_of(self, index):
        return [self.sign * (index + 1)]


@pytest.mark.parametrize("every", [2, 3, 4, 7])
def test_every_nth_row_is_text_and_every_chat_row_comes_once_an_epoch(every):
    rows = ReplayedRows(Counted(30), Counted(9, sign=-1), every=every)
    seen = [int(rows.row(index)[0][0]) for index in range(rows.rows_per_epoch)]
    assert all((number < 0) == (index % every == every - 1) for index, number in enumerate(seen))
    assert [number for number in seen if number > 0][:30] == list(range(1, 31))
    assert [-number for number in seen if number < 0] == list(range(1, rows.rows_per_epoch // every + 1))
    assert [rows.names[rows.source_of(index)] for index in range(every)] == ["chats"] * (every - 1) + ["text"]
    batch = read_batch(rows, 0, 2 * every)
    assert batch.source_tokens() == {"chats": 2 * (every - 1) * 4, "text": 2 * 4}
    assert [rows.documents_of(index)[0] for index in range(rows.rows_per_epoch)] == seen


def test_rows_of_two_lengths_and_nothing_but_text_are_refused():
    with pytest.raises(ValueError, match="row_length"):
        ReplayedRows(Counted(3), Counted(3, row_length=8), every=2)
    with pytest.raises(ValueError, match="every"):
        ReplayedRows(Counted(3), Counted(3), every=1)
