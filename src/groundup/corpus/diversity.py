"""How varied a corpus is: distinct word 5-grams and compressibility, measured on a fixed sample."""

import hashlib
import heapq
import zlib
from dataclasses import dataclass

from groundup.corpus.words import ngram_hashes, sorted_set

SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Diversity:
    """Figures of a sample; None where it holds no text to measure."""

    sample_documents: int
    sample_bytes: int
    distinct_ngram_fraction: float | None
    """Different word 5-grams over all of them."""
    compression_ratio: float | None
    """Bytes over their zlib-compressed bytes (level 1); repetition makes it larger."""


class Sample:
    """The documents with the smallest hashes of their places, as many as fit; the order they come in is no matter."""

    def __init__(self, max_bytes: int = SAMPLE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ceiling = 1 << 64
        """Smallest hash that did not fit: no larger one is taken again."""
        self._heap: list[tuple[int, bytes]] = []

    def add(self, place: str, text: str) -> None:
        """Offer a document; `place` names it, so that samples before and after cleaning hold the same documents."""
        hashed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest())
        if hashed >= self._ceiling:
            return
        data = text.encode()
        heapq.heappush(self._heap, (-hashed, data))
        self._num_bytes += len(data)
        while self._num_bytes > self._max_bytes and len(self._heap) > 1:
            largest, dropped = heapq.heappop(self._heap)
            self._ceiling = -largest
            self._num_bytes -= len(dropped)

    def measure(self) -> Diversity:
        """The figures of the documents held."""
        texts = [data for _, data in sorted(self._heap, reverse=True)]
        ngrams, _ = ngram_hashes([data.decode() for data in texts])
        whole = b"\n".join(texts)
        return Diversity(
            len(texts),
            len(whole),
            round(len(sorted_set(ngrams)) / len(ngrams), 4) if len(ngrams) else None,
            round(len(whole) / len(zlib.compress(whole, 1)), 3) if whole else None,
        )
