"""Numbers as people read them."""

import pytest

from groundup.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-3.14159, "-3.14"),
        (999, "999"),
        (999.9, "1k"),
        (1500, "1.5k"),
        (2_610_000, "2.61M"),
        (7e9, "7B"),
        (0.0025, "0.0025"),
        (3e-4, "3e-4"),
        (2.44e-5, "2.4e-5"),
    ],
)
def test_short(value, text):
    assert numbers.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3599.6, "1 h 0 min"), (7384, "2 h 3 min")]
)
def test_duration(value, text):
    assert numbers.duration(value) == text


def test_the_others():
    assert numbers.whole(3_164_000) == "3,164,000"
    assert numbers.percent(0.985) == "98.5 %"
    assert numbers.three_decimals(1.4) == "1.400"
    assert [numbers.size(value) for value in (12, 4096, 11_050_000, 8.6e9)] == [
        "12 bytes",
        "4.1 kB",
        "11.1 MB",
        "8.6 GB",
    ]
