"""Packed documents: every token a target once, no border crossed, the place a pure function."""

import random

import numpy as np
import pytest

from groundup.data.packing import PackedDocuments
from groundup.data.rows import read_batch
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.loss import IGNORE_INDEX

END_OF_TEXT = 0
VOCAB_SIZE = 1 << 20


def write_store(folder, generator, *, num_documents, max_length, max_shard_tokens=1 << 20):
    """A store whose real tokens are 1, 2, 3 …: each token occurs once. Returns it and the document of each token."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenWriter(
        folder, "train", vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT, max_shard_tokens=max_shard_tokens
    )
    document_of, token = {}, 1
    for document in range(num_documents):
        ids = list(range(token, token + generator.randint(0, max_length)))
        token += len(ids)
        document_of.update(dict.fromkeys(ids, document))
        writer.add(ids, {"document": document})
    writer.close()
    return TokenStore(folder, "train", vocab_size=VOCAB_SIZE), document_of


def rows_of_epoch(packed, epoch=0):
    first = epoch * packed.rows_per_epoch
    return [packed.row(index) for index in range(first, first + packed.rows_per_epoch)]


def supervised(rows):
    return [int(label) for _, labels, _ in rows for label in labels if label != IGNORE_INDEX]


def test_every_token_is_a_target_once_and_no_border_is_crossed(tmp_path):
    for seed in range(200):
        generator = random.Random(seed)
        store, document_of = write_store(
            tmp_path / str(seed),
            generator,
            num_documents=generator.randint(1, 12),
            max_length=generator.choice([0, 3, 20]),
            max_shard_tokens=generator.choice([40, 1 << 20]),
        )
        for row_length in ((1, 16), (5, 64))[seed % 2]:
            context = f"{seed=} {row_length=}"
            packed = PackedDocuments(store, row_length=row_length, seed=seed)
            rows = rows_of_epoch(packed, epoch=seed % 3)
            # a document's leading end-of-text is never predicted, its closing one is
            assert sorted(supervised(rows)) == [END_OF_TEXT] * store.num_documents + sorted(document_of), context
            for row in rows:
                check_borders(row, document_of, context)


def check_borders(row, document_of, context):
    tokens, labels, starts = row
    assert len(tokens) == len(labels) == len(starts)
    for t, label in enumerate(labels):
        start = int(starts[t])
        assert start <= t and (starts[start : t + 1] == start).all(), context
        inside = {document_of[int(token)] for token in tokens[start : t + 1] if int(token) != END_OF_TEXT}
        assert len(inside) <= 1, f"{context}: one segment holds {inside}"
        if label == IGNORE_INDEX:
            continue
        if t + 1 < len(tokens):
            assert label == tokens[t + 1], f"{context}: the label is not the next token"
            assert starts[t + 1] == start, f"{context}: a label crosses a border"
        if label != END_OF_TEXT and inside:
            assert inside == {document_of[int(label)]}, f"{context}: predicts another document's token"


def test_number_of_labels_has_a_closed_form(tmp_path):
    store, _ = write_store(tmp_path, random.Random(1), num_documents=30, max_length=20)
    packed = PackedDocuments(store, row_length=16, seed=0)
    batch = read_batch(packed, 0, packed.rows_per_epoch)
    assert batch.num_loss_tokens == store.num_tokens - store.num_documents
    assert batch.num_loss_tokens == len(supervised(rows_of_epoch(packed)))
    assert packed.rows_per_epoch == -(-(store.num_tokens - 1) // 16)


def test_a_cut_document_goes_on_in_another_row(tmp_path):
    """P06."""
    writer = TokenWriter(tmp_path, "train", vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT, max_shard_tokens=1 << 20)
    writer.add(list(range(1, 161)), {})
    writer.close()
    packed = PackedDocuments(TokenStore(tmp_path, "train", vocab_size=VOCAB_SIZE), row_length=16, seed=0)
    rows = sorted((row for row in rows_of_epoch(packed)), key=lambda row: int(row[1][0]) or 1 << 30)
    assert [int(row[0][0]) for row in rows] == [*range(0, 160, 16), 160]
    assert all((row[2] == 0).all() for row in rows[:10])


def test_epochs_differ_in_order_and_agree_in_content(tmp_path):
    store, _ = write_store(tmp_path, random.Random(2), num_documents=30, max_length=20)
    packed = PackedDocuments(store, row_length=16, seed=0)
    epochs = [rows_of_epoch(packed, epoch) for epoch in range(3)]
    orders = [supervised(rows) for rows in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    # and not only the rows: the documents themselves stand in another order
    assert {tuple(row[0]) for row in epochs[0]} != {tuple(row[0]) for row in epochs[1]}
    assert supervised(rows_of_epoch(PackedDocuments(store, row_length=16, seed=1))) != orders[0]


def test_a_row_is_a_pure_function_of_its_number(tmp_path):
    store, _ = write_store(tmp_path, random.Random(3), num_documents=600, max_length=6)  # several blocks of sums
    packed = PackedDocuments(store, row_length=8, seed=5)
    indices = list(range(4 * packed.rows_per_epoch))
    expected = {index: packed.row(index) for index in indices}
    random.Random(0).shuffle(indices)
    fresh = PackedDocuments(store, row_length=8, seed=5)
    for index in indices[:500]:
        for found, wanted in zip(fresh.row(index), expected[index], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_batch_may_reach_over_the_end_of_an_epoch(tmp_path):
    store, document_of = write_store(tmp_path, random.Random(4), num_documents=9, max_length=20)
    packed = PackedDocuments(store, row_length=8, seed=0)
    count = packed.rows_per_epoch
    assert count > 3
    batch = read_batch(packed, count - 2, 4)
    for row in range(4):
        tokens, labels, starts = packed.row(count - 2 + row)
        np.testing.assert_array_equal(batch.tokens_BT[row].numpy(), tokens)
        np.testing.assert_array_equal(batch.labels_BT[row].numpy(), labels)
        np.testing.assert_array_equal(batch.segments.starts_BT[row].numpy(), starts)
    seen = []
    for first in range(0, 7 * count, 7):  # seven epochs in batches that divide nothing
        seen += batch_targets(read_batch(packed, first, 7))
    assert sorted(seen) == sorted(7 * ([END_OF_TEXT] * 9 + list(document_of)))


def batch_targets(batch):
    return batch.labels_BT[batch.labels_BT != IGNORE_INDEX].tolist()


def test_documents_of_a_row_are_those_it_holds(tmp_path):
    store, document_of = write_store(tmp_path, random.Random(6), num_documents=20, max_length=20)
    packed = PackedDocuments(store, row_length=16, seed=0)
    for index in range(2 * packed.rows_per_epoch):
        tokens, labels, _ = packed.row(index)
        held = {document_of[int(token)] for token in [*tokens, *labels] if int(token) > 0}
        assert held <= set(packed.documents_of(index))
        assert len(packed.documents_of(index)) <= len(held) + 17


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_slices_count_their_own_labels(tmp_path, num_rows):
    store, _ = write_store(tmp_path, random.Random(7), num_documents=9, max_length=9)
    packed = PackedDocuments(store, row_length=8, seed=0)
    batch = read_batch(packed, 0, 5)
    parts = [batch.slice(begin, begin + num_rows) for begin in range(0, 5, num_rows)]
    assert sum(part.num_loss_tokens for part in parts) == batch.num_loss_tokens
    assert sum(len(part) for part in parts) == 5
    assert all(part.segments.starts_BT.shape == part.tokens_BT.shape for part in parts)
