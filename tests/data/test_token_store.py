"""Token files."""

import random

import numpy as np
import pytest

from groundup.base.errors import DataError
from groundup.data.token_store import TokenStore, TokenWriter, token_dtype

UINT16_SIZE, UINT32_SIZE = 1 << 16, (1 << 16) + 1


def write(folder, documents, *, vocab_size, max_shard_tokens=1 << 20):
    writer = TokenWriter(folder, "train", vocab_size=vocab_size, end_of_text_id=7, max_shard_tokens=max_shard_tokens)
    for number, ids in enumerate(documents):
        writer.add(ids, {"file": f"файл-{number}", "offset": number * 10})
    writer.close()
    return writer


@pytest.mark.parametrize(("vocab_size", "dtype"), [(UINT16_SIZE, np.uint16), (UINT32_SIZE, np.uint32)])
@pytest.mark.parametrize("max_shard_tokens", [1, 20, 1 << 20])
def test_documents_come_back_from_their_shards(tmp_path, vocab_size, dtype, max_shard_tokens):
    generator = random.Random(0)
    documents = [[generator.randrange(vocab_size) for _ in range(generator.randint(0, 9))] for _ in range(25)]
    documents.append([vocab_size - 1, 0])
    writer = write(tmp_path, documents, vocab_size=vocab_size, max_shard_tokens=max_shard_tokens)
    store = TokenStore(tmp_path, "train", vocab_size=vocab_size)
    expected = [[7, *ids, 7] for ids in documents]
    assert [document.tolist() for document in store.documents()] == expected
    order = list(range(26))
    generator.shuffle(order)
    assert [store.document(index).tolist() for index in order] == [expected[index] for index in order]
    lengths = store.lengths(np.array(order, dtype=np.uint32))
    assert lengths.tolist() == [len(expected[index]) for index in order]
    assert (store.num_documents, store.num_tokens) == (26, sum(map(len, expected)))
    assert (writer.num_documents, writer.num_tokens) == (store.num_documents, store.num_tokens)
    assert [store.record(index)["offset"] for index in order] == [index * 10 for index in order]
    assert store.record(3)["file"] == "файл-3"
    assert (len(store.paths) > 1) == (max_shard_tokens < 1 << 20)
    assert store.document(0).dtype == token_dtype(vocab_size) == dtype
    assert sum(path.stat().st_size for path in store.paths) == store.num_tokens * np.dtype(dtype).itemsize


def test_a_shard_holds_no_more_than_it_may(tmp_path):
    write(tmp_path, [[1] * length for length in (3, 3, 3, 30, 3)], vocab_size=10, max_shard_tokens=10)
    store = TokenStore(tmp_path, "train", vocab_size=10)
    sizes = [path.stat().st_size // 2 for path in store.paths]
    assert sizes == [10, 5, 32, 5]  # a document longer than a shard gets one of its own


def test_an_id_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(OverflowError):
        write(tmp_path, [[1 << 16]], vocab_size=UINT16_SIZE)


def test_no_files_and_cut_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="E-TOKENS-NONE"):
        TokenStore(tmp_path, "train", vocab_size=10)
    write(tmp_path, [[1, 2, 3]], vocab_size=10)
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="E-TOKENS-SIZE: 4 tokens where 5"):
        TokenStore(tmp_path, "train", vocab_size=10)


def test_a_missing_record_is_an_error(tmp_path):
    write(tmp_path, [[1], [2]], vocab_size=10)
    (tmp_path / "train-00000.records.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="E-TOKENS-RECORD"):
        TokenStore(tmp_path, "train", vocab_size=10).record(1)
