"""Best-fit packing by groups of equal bins."""

import random
from bisect import bisect_left, insort

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from groundup.data.best_fit import BestFit


def best_fit(lengths, room):
    """Items by bin. Of equal items the first in the list comes first."""
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    plan = BestFit(np.bincount(np.array(lengths, dtype=np.int64), minlength=1), room)
    return [[order[rank] for rank in plan.ranks(number)] for number in range(plan.num_bins)]


def one_by_one(lengths, room):
    """The same packing, one item after the other."""
    bins, free = [], []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(free, (lengths[item], -1))
        if at == len(free):
            bins.append([])
            left, number = room, len(bins) - 1
        else:
            left, number = free.pop(at)
        bins[number].append(item)
        insort(free, (left - lengths[item], number))
    return bins


@given(st.lists(st.integers(1, 64), max_size=80), st.integers(64, 100))
@hypothesis_settings(max_examples=200, deadline=None)
def test_best_fit_holds_every_item_once_and_overfills_no_bin(lengths, room):
    bins = best_fit(lengths, room)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in items) for items in bins]
    assert all(0 < size <= room for size in sizes)
    # best-fit decreasing never needs more than 11/9 of the best number of bins + 1 (Johnson 1974)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // room) * 1.5 + 1


@given(st.lists(st.integers(1, 30), max_size=120), st.integers(30, 70))
@hypothesis_settings(max_examples=200, deadline=None)
def test_groups_give_the_bins_of_one_item_after_the_other(lengths, room):
    assert best_fit(lengths, room) == one_by_one(lengths, room)


def test_many_small_items_fill_a_bin_to_its_end():
    for seed in range(40):
        generator = random.Random(seed)
        lengths = [generator.choice([1, 2, 3, 7, 50]) for _ in range(400)]
        assert best_fit(lengths, 50) == one_by_one(lengths, 50)


def test_best_fit_leaves_little_padding():
    generator = random.Random(0)
    lengths = [generator.randint(5, 200) for _ in range(2000)]
    bins = best_fit(lengths, 512)
    assert 1 - sum(lengths) / (512 * len(bins)) < 0.01
    assert best_fit([], 10) == []


def test_best_fit_takes_the_fullest_bin_that_holds_the_item():
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_a_plan_is_as_small_as_its_lengths_are_few():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5, 1.2, 1_000_000).astype(np.int64) + 1, 1, 512)
    plan = BestFit(np.bincount(lengths), 512)
    assert len(plan._firsts) < 4 * 512
    ranks = [rank for number in range(0, plan.num_bins, 997) for rank in plan.ranks(number)]
    ordered = -np.sort(-lengths)
    assert len(ranks) == len(set(ranks)) > 500
    assert all(ordered[plan.ranks(number)].sum() <= 512 for number in range(0, plan.num_bins, 997))
    assert 1 - lengths.sum() / (512 * plan.num_bins) < 0.001
