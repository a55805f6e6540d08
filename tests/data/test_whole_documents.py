"""Documents packed whole: every token a target once, none cut that fits, the place a pure function."""

import random

import numpy as np
import pytest

from groundup.data.packing import PackedDocuments
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.data.whole_documents import WholeDocuments
from groundup.model.loss import IGNORE_INDEX

END_OF_TEXT = 0
VOCAB_SIZE = 1 << 20


def write_store(folder, generator, *, num_documents, max_length):
    """A store whose real tokens are 1, 2, 3 …; returns it and its documents by their first token."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = TokenWriter(folder, "train", vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT, max_shard_tokens=300)
    documents, token = [], 1
    for number in range(num_documents):
        ids = list(range(token, token + generator.randint(0, max_length)))
        token += len(ids)
        documents.append([END_OF_TEXT, *ids, END_OF_TEXT])
        writer.add(ids, {"document": number})
    writer.close()
    return TokenStore(folder, "train", vocab_size=VOCAB_SIZE), documents


def parts_of(row):
    """(ids with the last label, all places supervised) of each part of a row, padding left out."""
    tokens, labels, starts = row
    parts = []
    for start in sorted(set(starts.tolist())):
        places = np.flatnonzero(starts == start)
        assert places.tolist() == list(range(start, start + len(places))), "a part is in one piece"
        if (labels[places] == IGNORE_INDEX).any():  # padding
            assert (
                (labels[places] == IGNORE_INDEX).all() and (tokens[places] == 0).all() and places[-1] == len(starts) - 1
            )
            continue
        assert (tokens[places][1:] == labels[places][:-1]).all(), "the label is not the next token"
        parts.append([*tokens[places].tolist(), int(labels[places][-1])])
    return parts


@pytest.mark.parametrize("row_length", [1, 5, 16, 64])
@pytest.mark.costly
def test_every_document_is_there_once_whole_or_split_by_the_rule(tmp_path, row_length):
    """P06."""
    for seed in range(25):
        generator = random.Random(seed)
        store, documents = write_store(
            tmp_path / str(seed),
            generator,
            num_documents=generator.randint(1, 40),
            max_length=generator.choice([0, 3, 20, 70]),
        )
        rows = WholeDocuments(store, row_length=row_length, seed=seed)
        expected = sorted(
            document[begin : begin + row_length + 1]
            for document in documents
            for begin in range(0, len(document) - 1, row_length)
        )
        orders = []
        for epoch in range(2):
            first = epoch * rows.rows_per_epoch
            of_rows = [rows.row(index) for index in range(first, first + rows.rows_per_epoch)]
            found = [part for row in of_rows for part in parts_of(row)]
            assert sorted(found) == expected, f"{seed=} {epoch=}"
            orders.append(found)
            padding = sum(int((labels == IGNORE_INDEX).sum()) for _, labels, _ in of_rows)
            assert padding == pytest.approx(rows.padding_fraction * rows.rows_per_epoch * row_length, abs=1e-6)
            assert not of_rows or padding < rows.rows_per_epoch * row_length
        assert rows.num_longer == sum(len(document) - 1 > row_length for document in documents)
        if len({tuple(part) for part in expected}) > 20:
            assert orders[0] != orders[1], "epochs do not differ"


def test_documents_of_a_row_are_those_it_holds(tmp_path):
    store, documents = write_store(tmp_path, random.Random(1), num_documents=60, max_length=40)
    rows = WholeDocuments(store, row_length=16, seed=0)
    of = {token: number for number, ids in enumerate(documents) for token in ids if token}
    for index in range(2 * rows.rows_per_epoch):
        held = {of[token] for part in parts_of(rows.row(index)) for token in part if token}
        assert held <= set(rows.documents_of(index))
        assert all(number in held or len(documents[number]) == 2 or len(documents[number]) % 16 == 2
                   for number in rows.documents_of(index))  # fmt: skip


def test_a_row_is_a_pure_function_of_its_number(tmp_path):
    store, _ = write_store(tmp_path, random.Random(3), num_documents=900, max_length=12)  # several blocks
    rows = WholeDocuments(store, row_length=8, seed=5)
    order = list(range(3 * rows.rows_per_epoch))
    expected = [rows.row(index) for index in order]
    random.Random(0).shuffle(order)
    fresh = WholeDocuments(store, row_length=8, seed=5)
    for index in sorted(order[:400], key=lambda index: index // rows.rows_per_epoch):
        for found, wanted in zip(fresh.row(index), expected[index], strict=True):
            np.testing.assert_array_equal(found, wanted)
    other = WholeDocuments(store, row_length=8, seed=6)
    assert any((other.row(index)[0] != expected[index][0]).any() for index in range(9))


def test_companions_change_from_epoch_to_epoch(tmp_path):
    store, _ = write_store(tmp_path, random.Random(3), num_documents=300, max_length=12)
    rows = WholeDocuments(store, row_length=32, seed=0)
    epochs = [
        {tuple(sorted(rows.documents_of(epoch * rows.rows_per_epoch + index))) for index in range(rows.rows_per_epoch)}
        for epoch in range(2)
    ]
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 2


def test_fewer_documents_are_cut_than_by_concatenation(tmp_path):
    store, _ = write_store(tmp_path, random.Random(4), num_documents=400, max_length=60)
    whole, cut = (kind(store, row_length=64, seed=0) for kind in (WholeDocuments, PackedDocuments))
    begun_inside = {
        kind: sum(kind.row(index)[0][0] != END_OF_TEXT for index in range(kind.rows_per_epoch)) for kind in (whole, cut)
    }
    assert begun_inside[whole] == 0 and begun_inside[cut] > 100 and whole.num_longer == 0
    assert whole.padding_fraction < 0.03
