"""Words and their 5-grams, as 64-bit hashes: what repetition, near duplicates and diversity are measured in."""

import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NGRAM = 5

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_ASCII_WORDS = bytes(byte if chr(byte).isalnum() or byte == ord("_") else ord(" ") for byte in range(128)) + bytes(
    range(128, 256)
)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[bytes]:
    """Lower-case words in UTF-8: runs of letters, digits and underscores; a Chinese or Japanese sign is a word."""
    text = text.lower()
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).split()
    return " ".join(_WORD.findall(text)).encode().split()


def ngram_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the word 5-grams of all texts, in order, with repeats, and how many each text has."""
    words = [words_of(text) for text in texts]
    num_words = np.array([*map(len, words)], np.int64)
    hashes = np.fromiter(map(zlib.crc32, itertools.chain.from_iterable(words)), np.uint64, int(num_words.sum()))
    hashes *= _FACTOR
    hashes ^= hashes >> np.uint64(32)
    num_ngrams = np.maximum(num_words - (NGRAM - 1), 0)
    # all texts at once (many are short), then without the 5-grams that would cross from one into the next
    flat_length = max(0, len(hashes) - NGRAM + 1)
    ngrams = hashes[:flat_length].copy()
    for shift in range(1, NGRAM):
        ngrams *= _FACTOR
        ngrams ^= ngrams >> np.uint64(29)
        ngrams += hashes[shift : shift + flat_length]
    ngrams *= _FACTOR
    ngrams ^= ngrams >> np.uint64(32)
    words_left = np.repeat(np.cumsum(num_words), num_words) - np.arange(len(hashes))
    return ngrams[words_left[:flat_length] >= NGRAM], num_ngrams


def unique_ngrams(text: str) -> NDArray[np.uint64]:
    """The text's set of 5-grams, sorted."""
    return sorted_set(ngram_hashes([text])[0])


def sorted_set(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The different values, sorted; several times faster here than np.unique, which hashes."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets; 0 where both are empty."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - both
    return both / union if union else 0.0
