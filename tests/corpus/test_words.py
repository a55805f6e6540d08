"""Word and 5-gram hashes against a slow, plain reference."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus import words
from groundup.corpus.words import NGRAM, jaccard, ngram_hashes, sorted_set, unique_ngrams, word_hashes

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00010000-\U0010ffff"
WORD = re.compile(rf"[{SIGNS}]|[^\W{SIGNS}]+")
TEXTS = st.lists(st.text(alphabet="abA1_ .,\néΣİß中文か\U0001f600", max_size=60), max_size=6)


def plain_words(text: str) -> list[str]:
    return WORD.findall(text.lower())


@given(TEXTS)
def test_words_are_those_of_a_pattern(texts):
    hashes, counts = word_hashes(texts)
    expected = [word for text in texts for word in plain_words(text)]
    assert counts.tolist() == [len(plain_words(text)) for text in texts]
    pairs = set(zip(expected, hashes.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == len(set(hashes.tolist()))  # equal words, and only they, hash alike


@given(TEXTS)
def test_ngrams_cross_no_border_between_texts(texts):
    hashes, counts = ngram_hashes(texts)
    expected = [
        tuple(found[start : start + NGRAM])
        for found in map(plain_words, texts)
        for start in range(len(found) - NGRAM + 1)
    ]
    assert counts.tolist() == [max(0, len(plain_words(text)) - NGRAM + 1) for text in texts]
    pairs = set(zip(expected, hashes.tolist(), strict=True))
    assert len(pairs) == len(set(expected)) == len(set(hashes.tolist()))


def test_a_text_has_the_same_hashes_alone_and_among_others(monkeypatch):
    monkeypatch.setattr(words, "SLICE_CHARACTERS", 50)
    texts = ["short one", "a longer text of words that goes over slices " * 5, "", "the last text of all is here"]
    together, counts = ngram_hashes(texts)
    alone = [ngram_hashes([text])[0] for text in texts]
    assert together.tolist() == np.concatenate(alone).tolist()
    assert counts.tolist() == [len(hashes) for hashes in alone]


def test_jaccard_is_that_of_sets():
    one, other = "a b c d e f g h", "b c d e f g h i j"
    grams = [{tuple(text.split()[k : k + 5]) for k in range(len(text.split()) - 4)} for text in (one, other)]
    expected = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    assert jaccard(unique_ngrams(one), unique_ngrams(other)) == expected == 3 / 6
    assert jaccard(unique_ngrams("a"), unique_ngrams("b")) == 0.0


def test_sorted_set():
    values = np.array([3, 1, 3, 2, 1], np.uint64)
    assert sorted_set(values).tolist() == [1, 2, 3]
    assert sorted_set(values[:0]).tolist() == []
