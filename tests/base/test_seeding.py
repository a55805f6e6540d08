"""Named seeds."""

from groundup.base.seeding import derive_seed


def test_same_names_same_seed_on_every_machine():
    assert derive_seed(42, "dropout", 3) == derive_seed(42, "dropout", 3) == 4024730819942627942


def test_different_uses_have_different_seeds():
    uses = [
        (seed, *names) for seed in (0, 1) for names in [(), ("a",), ("a", "b"), ("ab",), ("a", 1), ("a", 11), ("b",)]
    ]
    assert len({derive_seed(*use) for use in uses}) == len(uses)


def test_seed_fits_in_63_bits():
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))
