"""The shuffle without memory."""

from itertools import pairwise

import pytest

from groundup.data.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_permutation_is_a_bijection(size):
    assert sorted(map(Permutation(size, 1, "rows", 0), range(size))) == list(range(size))


def test_seeds_names_and_epochs_give_different_orders():
    orders = [
        tuple(map(Permutation(50, *key), range(50)))
        for key in [(0, "rows", 0), (1, "rows", 0), (0, "rows", 1), (0, "x", 0)]
    ]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(map(Permutation(50, 0, "rows", 0), range(50)))


def test_neighbours_are_pulled_apart():
    order = list(map(Permutation(4096, 3, "rows", 0), range(4096)))
    close = sum(abs(one - other) < 64 for one, other in pairwise(order))
    assert close < 4096 * 0.06  # a random order has 3.1 %
