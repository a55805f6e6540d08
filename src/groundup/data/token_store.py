"""Token files: flat integers, memory-mapped, with the offset of every document and a record of where it came from."""

import copy
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from groundup.base.errors import DataError

Split = str
"""`train` or `validation`."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


class TokenWriter:
    """Writes the documents of one split into shards of at most `max_shard_tokens` tokens."""

    def __init__(
        self, folder: Path, split: Split, *, vocab_size: int, end_of_text_id: int, max_shard_tokens: int
    ) -> None:
        self.folder, self.split, self.max_shard_tokens = folder, split, max_shard_tokens
        self.dtype, self.end_of_text_id = token_dtype(vocab_size), end_of_text_id
        self.num_documents = self.num_tokens = 0
        self._shard = -1
        self._offsets: list[int] = []
        self._files: list[Any] = []

    def add(self, ids: Sequence[int] | NDArray[np.uint32], record: dict[str, Any]) -> None:
        """Append one document, an end-of-text before and after it."""
        length = len(ids) + 2
        if not self._files or self._offsets[-1] + length > self.max_shard_tokens:
            self._open_next()
        tokens, records = self._files
        document = np.full(length, self.end_of_text_id, dtype=self.dtype)
        document[1:-1] = ids
        tokens.write(document.data)
        records.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._offsets.append(self._offsets[-1] + length)
        self.num_documents += 1
        self.num_tokens += length

    def _open_next(self) -> None:
        self.close()
        self._shard += 1
        stem = self.folder / f"{self.split}-{self._shard:05d}"
        self._files = [stem.with_suffix(".tokens").open("wb"), stem.with_suffix(".records.jsonl").open("wb")]
        self._offsets = [0]

    def close(self) -> None:
        """Finish the shard at work."""
        if self._files:
            for file in self._files:
                file.close()
            stem = self.folder / f"{self.split}-{self._shard:05d}"
            np.save(stem.with_suffix(".offsets.npy"), np.array(self._offsets, dtype=np.int64))
            self._files = []


def _plain(mapped: NDArray[Any]) -> NDArray[Any]:
    return mapped.view(np.ndarray)


class TokenStore:
    """Documents of one split, or of one source of it, as arrays of ids. Costs no memory but the page cache."""

    def __init__(self, folder: Path, split: Split, *, vocab_size: int) -> None:
        self.folder, self.split = folder, split
        self.paths = sorted(folder.glob(f"{split}-*.tokens"))
        if not self.paths:
            raise DataError(
                "E-TOKENS-NONE", what=f"no {split}-*.tokens files", where=folder, next="run `groundup tokenize` first"
            )
        # as plain arrays: a slice of a memmap costs ten times as much as one of its view
        self._tokens = [_plain(np.memmap(path, dtype=token_dtype(vocab_size), mode="r")) for path in self.paths]
        self._offsets = [_plain(np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")) for path in self.paths]
        self._first_document = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        for path, tokens, offsets in zip(self.paths, self._tokens, self._offsets, strict=True):
            if len(tokens) != offsets[-1]:
                raise DataError(
                    "E-TOKENS-SIZE",
                    what=f"{len(tokens)} tokens where {int(offsets[-1])} were written",
                    where=path,
                    next="run `groundup tokenize` again",
                )
        self._chosen: NDArray[np.uint8] | None = None
        self.num_documents = int(self._first_document[-1])
        self.num_tokens = sum(len(tokens) for tokens in self._tokens)

    def only(self, source: str) -> "TokenStore":
        """The documents of one source of the corpus, numbered as here; 1/8 byte a document. Raises DataError for none."""
        is_chosen = np.zeros(int(self._first_document[-1]), dtype=bool)
        others: set[str] = set()
        for path, first in zip(self.paths, self._first_document.tolist(), strict=False):
            with path.with_suffix(".records.jsonl").open("rb") as file:
                for number, line in enumerate(file, start=first):
                    name = orjson.loads(line).get("source")
                    is_chosen[number] = name == source
                    others.add(str(name))
        if not is_chosen.any():
            raise DataError(
                "E-SOURCE-NONE",
                what=f"no {self.split} document is of the source {source!r}",
                where=self.folder,
                next=f"its sources: {', '.join(sorted(others)[:8])}",
            )
        part = copy.copy(self)
        part._chosen = np.packbits(is_chosen)
        part.num_documents = int(is_chosen.sum())
        part.num_tokens = int(self.lengths(np.flatnonzero(is_chosen)).sum())
        return part

    def numbers(self) -> NDArray[np.uint32]:
        """Numbers of the documents, in the order in which they were written."""
        if self._chosen is None:
            return np.arange(self.num_documents, dtype=np.uint32)
        return np.flatnonzero(np.unpackbits(self._chosen)).astype(np.uint32)

    def number_chunks(self, size: int) -> Iterator[NDArray[np.uint32]]:
        """As `numbers`, at most `size` at a time."""
        numbers = self.numbers()
        for begin in range(0, len(numbers), size):
            yield numbers[begin : begin + size]

    def lengths(self, documents: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Tokens of each document, its two end-of-text tokens included."""
        if len(self.paths) == 1:
            offsets, local = self._offsets[0], documents.astype(np.int64)
            return np.asarray(offsets[local + 1] - offsets[local], dtype=np.int64)
        lengths = np.empty(len(documents), dtype=np.int64)
        shards = np.searchsorted(self._first_document, documents, side="right") - 1
        for shard in np.unique(shards):
            chosen = shards == shard
            local = documents[chosen].astype(np.int64) - self._first_document[shard]
            offsets = self._offsets[shard]
            lengths[chosen] = offsets[local + 1] - offsets[local]
        return lengths

    def document(self, index: int) -> NDArray[Any]:
        """Ids of a document, its two end-of-text tokens included."""
        shard = bisect_right(self._first_document, index) - 1
        local = index - self._first_document[shard]
        offsets = self._offsets[shard]
        return self._tokens[shard][offsets[local] : offsets[local + 1]]

    def documents(self) -> Iterator[NDArray[Any]]:
        """All documents in the order in which they were written."""
        for index in self.numbers().tolist():
            yield self.document(index)

    def record(self, index: int) -> dict[str, Any]:
        """Where a document came from: source, file and byte offset."""
        shard = bisect_right(self._first_document, index) - 1
        local = index - int(self._first_document[shard])
        with self.paths[shard].with_suffix(".records.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                if number == local:
                    return dict(json.loads(line))
        raise DataError(
            "E-TOKENS-RECORD",
            what=f"no record of document {index}",
            where=self.paths[shard],
            next="run `groundup tokenize` again",
        )
