"""Words and their 5-grams, as 64-bit hashes: what repetition, near duplicates and diversity are measured in.

A word is a run of letters, digits and underscores, in lower case; a Chinese or Japanese sign, and any character above
U+FFFF, is a word of its own. All of it is done on arrays of code points: a list of words would be several times slower.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

NGRAM = 5
SLICE_CHARACTERS = 1 << 17
"""Longer texts are hashed in slices of this length, so that arrays stay in the cache; a word that crosses a cut counts as two."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.multiply.accumulate(np.full(1024, _FACTOR))
"""A character's factor by its place in the word; words of more than 1,024 characters begin again."""
_LETTER, _SIGN = 1, 2
_SIGNS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFFFF, 0xFFFF))
_KINDS = np.fromiter((chr(code).isalnum() or chr(code) == "_" for code in range(1 << 16)), np.uint8, 1 << 16)
for _first, _last in _SIGNS:
    _KINDS[_first : _last + 1] = _SIGN


def ngram_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the word 5-grams of all texts, in order, with repeats, and how many each text has."""
    num_words = np.zeros(len(texts), np.int64)
    parts = [np.zeros(0, np.uint64)]
    for numbers, slices in _slices(texts):
        hashes, counts = word_hashes(slices)
        parts.append(hashes)
        np.add.at(num_words, numbers, counts)
    hashes = np.concatenate(parts)
    # all texts at once (many are short), then without the 5-grams that would cross from one into the next
    num_windows = max(0, len(hashes) - NGRAM + 1)
    ngrams = hashes[:num_windows].copy()
    for shift in range(1, NGRAM):
        ngrams *= _FACTOR
        ngrams ^= ngrams >> np.uint64(29)
        ngrams += hashes[shift : shift + num_windows]
    ngrams = _mixed(ngrams)
    stays = np.ones(num_windows, np.bool_)
    crossing = np.subtract.outer(np.cumsum(num_words), np.arange(1, NGRAM))
    stays[crossing[(crossing >= 0) & (crossing < num_windows)]] = False
    return ngrams[stays], np.maximum(num_words - (NGRAM - 1), 0)


def word_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the words of all texts, in order, and how many each text has."""
    lowered = [text.lower() for text in texts]
    codes = np.frombuffer("\n".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _KINDS[np.minimum(codes, 0xFFFF)]
    begins = kinds == _LETTER
    begins[1:] &= kinds[:-1] != _LETTER
    begins |= kinds == _SIGN
    starts = np.flatnonzero(begins)
    place = np.arange(len(codes))
    place -= np.repeat(np.append(0, starts), np.diff(np.concatenate([[0], starts, [len(codes)]])))
    terms = _POWERS[place & (len(_POWERS) - 1)]
    terms *= codes
    terms[kinds == 0] = 0
    hashes = _mixed(np.add.reduceat(terms, starts)) if len(starts) else np.zeros(0, np.uint64)
    ends = np.cumsum([len(text) + 1 for text in lowered])
    return hashes, np.diff(np.searchsorted(starts, ends), prepend=0)


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


def _slices(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Slices of the texts and their texts' numbers, in groups of about SLICE_CHARACTERS."""
    numbers: list[int] = []
    slices: list[str] = []
    num_characters = 0
    for number, text in enumerate(texts):
        for start in range(0, len(text), SLICE_CHARACTERS):
            numbers.append(number)
            slices.append(text[start : start + SLICE_CHARACTERS])
            num_characters += len(slices[-1])
            if num_characters >= SLICE_CHARACTERS:
                yield numbers, slices
                numbers, slices, num_characters = [], [], 0
    if slices:
        yield numbers, slices


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    hashes *= _FACTOR
    hashes ^= hashes >> np.uint64(32)
    return hashes
