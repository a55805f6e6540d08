"""Fullest-fit packing: every item once, each bin as full as what is left can make it."""

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from groundup.data.fullest_fit import fullest_fit


def sizes_of(bins, lengths):
    return [sum(lengths[item] for item in items) for items in bins]


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 90))
@hypothesis_settings(max_examples=200, deadline=None)
def test_every_item_is_in_one_bin_and_none_is_overfull(lengths, room):
    bins = fullest_fit(lengths, room)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(0 < size <= room for size in sizes_of(bins, lengths))
    assert bins == fullest_fit(lengths, room)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 30))
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_choice_of_the_others_fills_the_first_bin_better(lengths, room):
    first, *_ = sizes_of(fullest_fit(lengths, room), lengths)
    longest = max(lengths)
    others = sorted(lengths, reverse=True)[1:]
    choices = itertools.chain.from_iterable(itertools.combinations(others, count) for count in range(len(others) + 1))
    assert first == max(total for chosen in choices if (total := longest + sum(chosen)) <= room)


@pytest.mark.parametrize("seed", range(5))
def test_it_needs_no_more_bins_than_there_are_for_what_fits_exactly(seed):
    """Bins that were full before they were taken apart."""
    generator, lengths = random.Random(seed), []
    for _ in range(60):
        cuts = sorted(generator.sample(range(1, 200), 3))
        lengths += [end - begin for begin, end in itertools.pairwise((0, *cuts, 200))]
    generator.shuffle(lengths)
    assert len(fullest_fit(lengths, 200)) <= 61


def test_equal_items_keep_their_order():
    assert fullest_fit([5, 5, 5, 5, 3], 10) == [[0, 1], [2, 3], [4]]
    assert fullest_fit([], 10) == []


@pytest.mark.parametrize("lengths", [[11], [3, 0], [-1]])
def test_what_fits_no_bin_is_refused(lengths):
    with pytest.raises(ValueError, match="between 1 and 10"):
        fullest_fit(lengths, 10)


def test_many_items_take_seconds_and_leave_next_to_nothing():
    generator = random.Random(0)
    lengths = [min(512, int(generator.lognormvariate(4.5, 0.8)) + 1) for _ in range(50_000)]
    began = time.process_time()
    bins = fullest_fit(lengths, 512)
    assert time.process_time() - began < 10
    assert 1 - sum(lengths) / (512 * len(bins)) < 0.001
