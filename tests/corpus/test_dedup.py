"""Duplicates: which are found, which one stays, and what adversaries cost."""

import random
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.corpus import dedup
from groundup.corpus.config import DedupConfig
from groundup.corpus.dedup import Fingerprint, FingerprintTable, fingerprints
from groundup.corpus.words import jaccard, unique_ngrams

CONFIG = DedupConfig()


def survivors(texts: list[str], config: DedupConfig = CONFIG) -> list[int]:
    exact, near = duplicates(texts, config)
    return [number for number in range(len(texts)) if not exact[number] and not near[number]]


def duplicates(texts: list[str], config: DedupConfig = CONFIG) -> tuple[list[bool], list[bool]]:
    table = FingerprintTable(config)
    for fingerprint in fingerprints(texts, config):
        table.add(fingerprint)
    exact = table.exact_duplicates()
    return exact.tolist(), table.near_duplicates(lambda number: unique_ngrams(texts[number]), exact).tolist()


def words(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(10_000)}" for _ in range(count)]


def changed(text: list[str], *places: int) -> str:
    return " ".join("changed" if place in places else word for place, word in enumerate(text))


def test_the_first_of_equal_texts_stays():
    texts = ["a", "b", "a", "c", "b", "a", "", ""]
    assert duplicates(texts) == ([False, False, True, False, True, True, False, True], [False] * 8)
    assert survivors(texts, DedupConfig(exact=False)) == list(range(8))  # too short for near duplicates


def test_copies_and_short_texts_are_not_compared():
    texts = [" ".join(words(0, 50)), "too short", "short too", " ".join(words(0, 50)), " ".join(words(0, 50))]
    table = FingerprintTable(CONFIG)
    for fingerprint in fingerprints(texts, CONFIG):
        table.add(fingerprint)
    num_read: list[int] = []
    near = table.near_duplicates(lambda number: num_read.append(number) or unique_ngrams(""), table.exact_duplicates())
    assert not near.any() and not num_read


def test_similar_texts_are_near_duplicates_of_the_first():
    base = words(0, 200)
    similar, other = changed(base, 100), changed(base, *range(0, 200, 4))
    assert jaccard(unique_ngrams(" ".join(base)), unique_ngrams(similar)) > 0.9
    texts = [similar, " ".join(base), other, " ".join(words(1, 200))]
    assert duplicates(texts) == ([False] * 4, [False, True, False, False])
    assert survivors(texts, DedupConfig(near=False)) == [0, 1, 2, 3]
    assert survivors(texts, DedupConfig(jaccard_threshold=0.99)) == [0, 1, 2, 3]


def test_a_shared_band_alone_drops_nothing(monkeypatch):
    texts = [" ".join(words(seed, 50)) for seed in range(20)]
    real = dedup.band_hashes
    monkeypatch.setattr(dedup, "band_hashes", lambda *args: np.full_like(real(*args), 7))
    assert survivors(texts) == list(range(20))  # all compared, none similar
    assert survivors([*texts, changed(words(0, 50), 3)]) == list(range(20))  # and the true check still finds one


def test_almost_all_pairs_over_the_threshold_are_found():
    found = 0
    for seed in range(50):
        base = words(seed, 300)
        pair = [" ".join(base), changed(base, 20, 150, 250)]
        assert jaccard(*map(unique_ngrams, pair)) > 0.9
        found += len(survivors(pair)) == 1
    assert found >= 49


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 59), max_size=8)), max_size=25))
def test_twice_is_once(makings):
    texts = [changed(words(seed, 60), *places) for seed, places in makings]
    once = [texts[number] for number in survivors(texts)]
    assert survivors(once) == list(range(len(once)))


@settings(max_examples=30)
@given(st.lists(st.text(alphabet="ab cd", max_size=60), max_size=12), st.integers(1, 5))
def test_fingerprints_do_not_depend_on_the_batch(texts, batch):
    parts = [fingerprints(texts[start : start + batch], CONFIG) for start in range(0, len(texts), batch)]
    assert [each for part in parts for each in part] == fingerprints(texts, CONFIG)


@pytest.mark.parametrize("exact", [True, False])
def test_a_hundred_thousand_equal_texts_leave_one(exact):
    config = DedupConfig(exact=exact)
    (fingerprint,) = fingerprints([" ".join(words(0, 100))], config)
    ngrams = unique_ngrams(" ".join(words(0, 100)))
    num_read = 0

    def read(number: int) -> np.ndarray:
        nonlocal num_read
        num_read += 1
        return ngrams

    count = 100_000 if exact else 10_000
    table = FingerprintTable(config)
    for _ in range(count):
        table.add(fingerprint)
    copies = table.exact_duplicates()
    near = table.near_duplicates(read, copies)
    assert int((~copies & ~near).sum()) == 1 and not copies[0] and not near[0]
    assert num_read <= count


def adversary(count: int, bands: np.ndarray) -> FingerprintTable:
    table = FingerprintTable(CONFIG)
    for number in range(count):
        table.add(Fingerprint(number.to_bytes(16, "little"), bands[number].tobytes()))
    return table


def test_comparisons_stay_linear_when_all_share_every_band(monkeypatch):
    count = 3_000
    compared = 0

    def count_comparison(one: np.ndarray, other: np.ndarray) -> float:
        nonlocal compared
        compared += 1
        return 0.0

    monkeypatch.setattr(dedup, "jaccard", count_comparison)
    for kind in ("same", "few"):
        bands = np.full((count, 16), 7, np.uint64)
        if kind == "few":
            bands = np.random.default_rng(0).integers(1, 30, (count, 16)).astype(np.uint64)
        table = adversary(count, bands)
        near = table.near_duplicates(lambda number: np.arange(3, dtype=np.uint64), table.exact_duplicates())
        assert not near.any()
    assert count < compared <= 2 * count * dedup.MAX_COMPARED


@pytest.mark.costly
def test_a_document_costs_under_300_bytes(monkeypatch):
    monkeypatch.setattr(dedup, "CACHE_BYTES", 0)  # a fixed sum, which would hide the rest of so few documents
    count = 10_000
    pairs = np.random.default_rng(0).integers(1, 1 << 63, (count // 2, 16)).astype(np.uint64)
    tracemalloc.start()
    table = FingerprintTable(CONFIG)
    for number in range(count):  # every document shares every band with one other: the most groups there can be
        table.add(Fingerprint(number.to_bytes(16, "little"), pairs[number % len(pairs)].tobytes()))
    near = table.near_duplicates(lambda number: np.arange(1) + np.uint64(number), table.exact_duplicates())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not near.any()
    assert peak < 300 * count


def test_time_grows_with_the_number_of_documents():
    def seconds(count: int) -> float:
        bands = np.full((count, 16), 7, np.uint64)
        table = adversary(count, bands)
        started_at = time.process_time()
        table.near_duplicates(
            lambda number: np.arange(100, dtype=np.uint64) * np.uint64(number + 1), table.exact_duplicates()
        )
        return time.process_time() - started_at

    assert seconds(4_000) < 3 * 4 * max(0.05, seconds(1_000))
