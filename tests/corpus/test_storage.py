"""Shards: what goes in comes out, and equal lines give equal bytes."""

import errno
from collections import Counter
from pathlib import Path

import pytest

from groundup.base import failpoints
from groundup.base.errors import DataError
from groundup.corpus import storage
from groundup.corpus.storage import Document, ShardWriter, count_documents, read_documents, shard_paths

HARD_TEXTS = [
    "a\x00b",
    "line\u2028separator\x85",
    "\ufeffmid",
    "é\U0001f469\u200d\U0001f680",
    "\r\n\t",
    "x" * 3_000_000,
]


def write(folder: Path, documents: list[Document], **options: int) -> None:
    folder.mkdir()
    with ShardWriter(folder, **options) as writer:
        for document in documents:
            writer.write(document.as_line())


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(f"d#{k}", text, "d", {"file": "d", "offset": k}) for k, text in enumerate(texts)]


def test_documents_come_back_as_they_were(tmp_path):
    documents = documents_of(HARD_TEXTS)
    write(tmp_path / "a", documents)
    assert list(read_documents(tmp_path / "a")) == documents
    assert count_documents(tmp_path / "a") == len(documents)


def test_shards_stay_under_their_size_and_keep_the_order(tmp_path):
    documents = documents_of([f"text {k} " * 20 for k in range(200)])
    write(tmp_path / "a", documents, shard_bytes=4_000)
    shards = shard_paths(tmp_path / "a")
    assert len(shards) > 5
    assert all(sum(len(line) + 1 for line in storage.read_lines(path)) <= 4_000 for path in shards)
    assert list(read_documents(tmp_path / "a")) == documents


def test_equal_documents_give_equal_bytes(tmp_path):
    documents = documents_of([f"text {k} " * 500 for k in range(2_000)])
    for name in "ab":
        write(tmp_path / name, documents)
    assert [path.read_bytes() for path in shard_paths(tmp_path / "a")] == [
        path.read_bytes() for path in shard_paths(tmp_path / "b")
    ]


def test_full_disk_names_folder_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("GROUNDUP_FAILPOINT", "corpus.write:enospc:1")
    monkeypatch.setattr(failpoints, "_passages", Counter())
    with pytest.raises(DataError) as caught:
        write(tmp_path / "a", documents_of(["x" * 100]))
    assert caught.value.code == "E-DISK" and str(tmp_path / "a") in caught.value.line()
    assert "bytes more" in caught.value.line()


def test_other_write_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), storage.explain_full_disk(tmp_path, 1):
        raise PermissionError(errno.EACCES, "no")
