"""Diversity figures and the sample they are measured on."""

import random

from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.diversity import Diversity, Sample


def filled(documents: list[tuple[str, str]], max_bytes: int = 1 << 20) -> Sample:
    sample = Sample(max_bytes)
    for place, text in documents:
        sample.add(place, text)
    return sample


def test_figures_of_varied_and_repeated_text():
    generator = random.Random(0)
    words = [f"w{generator.randrange(10**6)}" for _ in range(5_000)]
    varied = filled([("a", " ".join(words))]).measure()
    repeated = filled([("a", " ".join(words[:50] * 100))]).measure()
    assert varied.distinct_ngram_fraction == 1.0
    assert repeated.distinct_ngram_fraction == round(50 / 4_996, 4)
    assert repeated.compression_ratio > 10 > varied.compression_ratio > 1
    assert filled([]).measure() == Diversity(0, 0, None, None)
    assert filled([("a", "too short")]).measure().distinct_ngram_fraction is None


@given(st.lists(st.integers(1, 40), max_size=30), st.randoms())
def test_the_sample_is_the_same_in_any_order_and_small(sizes, generator):
    documents = [(f"file:{number}", "é" * size) for number, size in enumerate(sizes)]
    sample = filled(documents, 200).measure()
    shuffled = documents.copy()
    generator.shuffle(shuffled)
    assert filled(shuffled, 200).measure() == sample
    assert sample.sample_bytes - max(0, sample.sample_documents - 1) <= 200
    if sum(2 * size for size in sizes) <= 200:
        assert sample.sample_documents == len(documents)
