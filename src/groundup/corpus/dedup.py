"""Exact and near duplicates: of equal or similar texts the first in source order is kept.

A document costs 16 bytes of its SHA-256 and 8 bytes a band while it is held, and about as much again while bands are
compared: under 300 bytes. Nothing depends on the number of workers: fingerprints are pure functions of a text, and
decisions are made in source order.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from groundup.corpus.config import DedupConfig
from groundup.corpus.words import jaccard, ngram_hashes

MINHASH_SEED = 42
DIGEST_BYTES = 16
MAX_COMPARED = 4
"""Survivors a document is compared with, those first that agree in most bands."""
CACHE_BYTES = 64 << 20
ENTRY_BYTES = 300
"""What a cached set costs beside its hashes."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)

ReadNgrams = Callable[[int], NDArray[np.uint64]]
"""The sorted set of 5-grams of the document with a given number."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is remembered of a text."""

    digest: bytes
    """First 16 bytes of the SHA-256 of its UTF-8."""
    bands: bytes
    """8 bytes a band of its MinHash signature; zeros for a text of fewer than 5 words."""


def fingerprints(texts: Sequence[str], config: DedupConfig) -> list[Fingerprint]:
    """Fingerprints of texts; without near duplicates in the config, bands are empty."""
    digests = [hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES] for text in texts]
    if not config.near:
        return [Fingerprint(digest, b"") for digest in digests]
    bands = band_hashes(*ngram_hashes(texts), config)
    return [Fingerprint(digest, row.tobytes()) for digest, row in zip(digests, bands, strict=True)]


def band_hashes(ngrams: NDArray[np.uint64], num_ngrams: NDArray[np.int64], config: DedupConfig) -> NDArray[np.uint64]:
    """One hash a band (column) and document (row); 0 only in rows of documents without 5-grams."""
    ends = np.concatenate([[0], np.cumsum(num_ngrams)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(ngrams, ends, config.num_permutations, MINHASH_SEED)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(
        len(num_ngrams), config.num_bands, config.num_permutations // config.num_bands
    )
    hashes = np.zeros((len(num_ngrams), config.num_bands), np.uint64)
    for column in range(signatures.shape[2]):
        hashes ^= signatures[:, :, column]
        hashes *= _FACTOR
        hashes ^= hashes >> np.uint64(29)
    hashes |= np.uint64(1)
    hashes[num_ngrams == 0] = 0
    return hashes


class FingerprintTable:
    """The fingerprints of all documents, in source order."""

    def __init__(self, config: DedupConfig) -> None:
        self._config = config
        self._digests, self._bands = bytearray(), bytearray()

    def add(self, fingerprint: Fingerprint) -> None:
        """Append the next document's."""
        self._digests += fingerprint.digest
        self._bands += fingerprint.bands

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def exact_duplicates(self) -> NDArray[np.bool_]:
        """Whether each document equals an earlier one."""
        duplicate = np.zeros(len(self), np.bool_)
        if self._config.exact:
            halves = np.frombuffer(self._digests, np.uint64).reshape(-1, 2)
            order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equals stays the first
            ordered = halves[order]
            duplicate[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
        return duplicate

    def near_duplicates(self, read_ngrams: ReadNgrams, leave_out: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether each document not left out is similar to an earlier one that stays. The table cannot be used again.

        Of each group of documents that share a band, the first and the latest survivor are candidates, and of all
        candidates of a document MAX_COMPARED are compared: the work is linear whatever the texts are.
        """
        duplicate = np.zeros(len(self), np.bool_)
        if not self._config.near or not len(self):
            return duplicate
        groups = np.frombuffer(self._bands, np.uint64).reshape(len(self), -1)
        groups[leave_out] = 0
        num_groups = _number_groups(groups)
        first, latest = np.full((2, num_groups + 1), -1, np.int32)
        cache = _NgramCache(read_ngrams)
        for number in np.flatnonzero(groups.any(axis=1)).tolist():
            mine = groups[number][groups[number] > 0].astype(np.int64)
            candidates = _most_shared(first[mine], latest[mine])
            if any(self._is_similar(cache.read(number), cache.read(other)) for other in candidates):
                duplicate[number] = True
            else:
                latest[mine] = number
                first[mine] = np.where(first[mine] < 0, number, first[mine])
        return duplicate

    def _is_similar(self, one: NDArray[np.uint64], other: NDArray[np.uint64]) -> bool:
        threshold = self._config.jaccard_threshold
        if min(len(one), len(other)) < threshold * max(len(one), len(other)):
            return False  # the smaller set is too small for its share of the union
        return jaccard(one, other) >= threshold


def _number_groups(bands: NDArray[np.uint64]) -> int:
    """Replace, in place, hashes that several documents share in a band by the group's number, others by 0."""
    num_groups = 0
    for column in range(bands.shape[1]):
        order = np.argsort(bands[:, column], kind="stable")
        hashes = bands[order, column]
        same = (hashes[1:] == hashes[:-1]) & (hashes[1:] != 0)
        begins = np.append(True, ~same)
        is_shared = np.append(same, False) | ~begins
        numbers = np.cumsum(begins & is_shared, dtype=np.int64)
        hashes[:] = 0
        hashes[is_shared] = (numbers[is_shared] + num_groups).astype(np.uint64)
        bands[order, column] = hashes
        num_groups += int(numbers[-1])
    return num_groups


def _most_shared(first: NDArray[np.int32], latest: NDArray[np.int32]) -> Iterator[int]:
    """Up to MAX_COMPARED survivors, those first that stand in most groups, then the earliest."""
    shares = Counter(first.tolist())
    shares.update(latest[latest != first].tolist())
    del shares[-1]
    ranked = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    return (number for number, _ in ranked[:MAX_COMPARED])


class _NgramCache:
    """The 5-gram sets read last, up to CACHE_BYTES."""

    def __init__(self, read_ngrams: ReadNgrams) -> None:
        self._read_ngrams = read_ngrams
        self._sets: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()
        self._num_bytes = 0

    def read(self, number: int) -> NDArray[np.uint64]:
        if number in self._sets:
            self._sets.move_to_end(number)
            return self._sets[number]
        ngrams = self._read_ngrams(number)
        self._sets[number] = ngrams
        self._num_bytes += ngrams.nbytes + ENTRY_BYTES
        while self._num_bytes > CACHE_BYTES and len(self._sets) > 1:
            self._num_bytes -= self._sets.popitem(last=False)[1].nbytes + ENTRY_BYTES
        return ngrams
