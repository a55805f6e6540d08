"""Mixtures: weights kept within one row, every token of a source once a pass, the place a pure function."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from groundup.base.errors import ConfigError, DataError
from groundup.data import mixture
from groundup.data.config import SourceConfig
from groundup.data.mixture import MixedRows, interleave, quotas
from groundup.data.packing import PackedDocuments
from groundup.data.rows import read_batch
from groundup.data.token_store import TokenStore, TokenWriter
from groundup.model.loss import IGNORE_INDEX

VOCAB_SIZE = 1 << 20
END_OF_TEXT = VOCAB_SIZE - 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12))
@hypothesis_settings(max_examples=60, deadline=None)
def test_after_any_number_of_rows_each_source_is_within_one_of_its_share(counts):
    order, period = interleave(tuple(counts)), sum(counts)
    rows = np.arange(1, period + 1)
    # Tijdeman's bound, which no other order betters
    bound = 1 - 1 / max(1, 2 * len(counts) - 2) if len(counts) > 1 else 0
    for source, count in enumerate(counts):
        so_far = np.cumsum(order == source)
        assert np.abs(so_far - rows * count / period).max() <= bound + 1e-9
        assert so_far[-1] == count


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
@hypothesis_settings(max_examples=100, deadline=None)
def test_quotas_are_within_one_row_of_the_shares(shares):
    counts = quotas({str(number): share for number, share in enumerate(shares)})
    assert sum(counts) == mixture.PERIOD
    assert all(abs(c - mixture.PERIOD * s / sum(shares)) < 1 for c, s in zip(counts, shares, strict=True))


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="greater than 0"):
        SourceConfig(weight=0)
    with pytest.raises(ConfigError, match=r"E-CONFIG-MIXTURE.*'tiny'.*less than one row in 65536"):
        quotas({"large": 1.0, "tiny": 1e-6})


def make_source(folder, name, generator, *, num_documents, max_length, row_length, first_token, seed=0):
    """A source whose tokens occur nowhere else: first_token, first_token + 1 …"""
    (folder / name).mkdir(parents=True)
    writer = TokenWriter(
        folder / name, "train", vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT, max_shard_tokens=1 << 20
    )
    token = first_token
    for _ in range(num_documents):
        length = generator.randint(1, max_length)
        writer.add(range(token, token + length), {"source": name})
        token += length
    writer.close()
    store = TokenStore(folder / name, "train", vocab_size=VOCAB_SIZE)
    return PackedDocuments(store, row_length=row_length, seed=seed), range(first_token, token)


def make_mixture(folder, generator, *, sizes, weights, row_length=8, seed=0):
    """A mixture of sources with so many documents each, and the tokens of each source."""
    sources, tokens = {}, {}
    for number, size in enumerate(sizes):
        sources[f"s{number}"], tokens[f"s{number}"] = make_source(
            folder,
            f"s{number}",
            generator,
            num_documents=size,
            max_length=generator.choice([3, 20]),
            row_length=row_length,
            first_token=1 + number * 100_000,
            seed=seed + number,
        )
    return MixedRows(sources, {f"s{number}": weight for number, weight in enumerate(weights)}), tokens


def targets(rows, index):
    labels = rows.row(index)[1]
    return labels[(labels != IGNORE_INDEX) & (labels != END_OF_TEXT)].tolist()


def test_each_pass_of_each_source_has_every_token_as_a_target_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "PERIOD", 128)
    for seed in range(12):
        generator = random.Random(seed)
        sizes = [generator.choice([1, 4, 60]) for _ in range(generator.randint(1, 4))]
        rows, tokens = make_mixture(
            tmp_path / str(seed), generator, sizes=sizes, weights=[generator.uniform(0.2, 3) for _ in sizes], seed=seed
        )
        seen = {name: [] for name in rows.names}
        for index in range(6 * rows.rows_per_epoch):
            seen[rows.names[rows.source_of(index)]].append(targets(rows, index))
        num_passes = 0
        for name, of_rows in seen.items():
            per_pass = rows.sources[name].rows_per_epoch
            for begin in range(0, len(of_rows) - per_pass + 1, per_pass):
                found = [token for row in of_rows[begin : begin + per_pass] for token in row]
                assert sorted(found) == list(tokens[name]), f"{seed=} {name} pass {begin // per_pass}"
                num_passes += 1
        assert num_passes > 2


def test_tokens_follow_the_weights_though_rows_hold_padding(tmp_path):
    """A source of a row and a half is padded by a quarter: it gets more rows, and its share of the tokens all the same."""
    rows, _ = make_mixture(tmp_path, random.Random(3), sizes=[300, 9], weights=[3, 1], row_length=64)
    small = rows.sources["s1"]
    assert 0.2 < small.padding_fraction < 0.7
    places = Counter()
    for index in range(1200):
        places[rows.names[rows.source_of(index)]] += int((rows.row(index)[0] != 0).sum())
    assert places["s1"] / sum(places.values()) == pytest.approx(0.25, abs=0.006)
    share_of_rows = rows.rows_before(1200)["s1"] / 1200
    assert share_of_rows > 0.3, "as many rows as its weight would be too few tokens"


def test_a_row_is_a_pure_function_of_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "PERIOD", 64)  # several periods in a few rows
    rows, _ = make_mixture(tmp_path, random.Random(0), sizes=[2, 90, 7], weights=[1, 4.5, 0.7], seed=5)
    count = 5 * rows.rows_per_epoch
    assert count > 3 * 64
    expected = [rows.row(index) for index in range(count)]
    again = MixedRows(
        {name: PackedDocuments(part.store, row_length=8, seed=part.seed) for name, part in rows.sources.items()},
        {"s0": 1, "s1": 4.5, "s2": 0.7},
    )
    order = list(range(count))
    random.Random(1).shuffle(order)
    for index in order:  # as a run that is resumed at any row
        for found, wanted in zip(again.row(index), expected[index], strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert again.source_of(index) == rows.source_of(index)
    before = Counter()
    for index in range(count):
        assert rows.rows_before(index) == {name: before[name] for name in rows.names}
        assert rows.locate(index)[1] == before[rows.names[rows.source_of(index)]]
        before[rows.names[rows.source_of(index)]] += 1


def test_two_sources_of_very_different_sizes(tmp_path):
    rows, tokens = make_mixture(tmp_path, random.Random(4), sizes=[800, 1], weights=[0.5, 0.5], row_length=16)
    seen = Counter(token for index in range(800) for token in targets(rows, index))
    once = [seen[token] for token in tokens["s0"]]
    often = [seen[token] for token in tokens["s1"]]
    assert max(once) - min(once) <= 1 and max(often) - min(often) <= 1 and min(often) > 200


def test_rows_of_two_sources_share_a_batch(tmp_path):
    rows, tokens = make_mixture(tmp_path, random.Random(5), sizes=[40, 40], weights=[1, 1])
    batch = read_batch(rows, 3, 8)
    for place in range(8):
        np.testing.assert_array_equal(batch.tokens_BT[place].numpy(), rows.row(3 + place)[0])
    held = {name for token in batch.tokens_BT.flatten().tolist() for name in tokens if token in tokens[name]}
    assert held == {"s0", "s1"}
    assert batch.sources.names == ("s0", "s1") and batch.num_loss_tokens == sum(batch.source_tokens().values())
    of_row = [rows.source_of(index) for index in range(3, 11)]
    assert list(batch.sources.numbers) == batch.sources.numbers_B.tolist() == of_row and 0 < sum(of_row) < 8
    labels = batch.labels_BT != IGNORE_INDEX
    assert batch.source_tokens()["s1"] == int(labels[torch.tensor(of_row) == 1].sum())
    part = batch.slice(2, 5)
    assert part.sources.numbers == tuple(of_row[2:5]) and part.counts == batch.counts[2:5]
    assert part.num_loss_tokens == int(labels[2:5].sum()) == sum(part.source_tokens().values())
    assert read_batch(rows.sources["s0"], 0, 4).sources is None


def test_a_store_gives_the_documents_of_one_source(tmp_path):
    writer = TokenWriter(tmp_path, "train", vocab_size=VOCAB_SIZE, end_of_text_id=END_OF_TEXT, max_shard_tokens=30)
    generator, of = random.Random(0), {}
    for number in range(1, 60):
        source = generator.choice(["web.jsonl", "code"])
        writer.add([number] * generator.randint(1, 9), {"source": source, "file": f"{source}/{number}"})
        of[number] = source
    writer.close()
    store = TokenStore(tmp_path, "train", vocab_size=VOCAB_SIZE)
    assert len(store.paths) > 5
    parts = {source: store.only(source) for source in ("web.jsonl", "code")}
    assert sum(part.num_tokens for part in parts.values()) == store.num_tokens
    assert sorted(n for part in parts.values() for n in part.numbers().tolist()) == store.numbers().tolist()
    for source, part in parts.items():
        assert {int(ids[1]) for ids in part.documents()} == {n for n, name in of.items() if name == source}
        assert all(part.record(number)["source"] == source for number in part.numbers())
        packed = PackedDocuments(part, row_length=8, seed=0)
        found = Counter(token for index in range(packed.rows_per_epoch) for token in targets(packed, index))
        assert found == Counter(token for ids in part.documents() for token in ids.tolist() if token != END_OF_TEXT)
        assert all(store.record(d)["source"] == source for i in range(9) for d in packed.documents_of(i))
    with pytest.raises(DataError, match=r"E-SOURCE-NONE: no train document is of the source 'book'.*code, web.jsonl"):
        store.only("book")
