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


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.4, 0.4025, 0.405], ["0.4000", "0.4025", "0.4050"]),
        ([0, 8e-4, 1.6e-3], ["0", "0.0008", "0.0016"]),
        ([0, 1.5e-4, 3e-4], ["0", "1.5e-4", "3e-4"]),
        ([0, 400, 800, 1200, 2000], ["0", "400", "800", "1.2k", "2k"]),
        ([1_002_500, 1_005_000], ["1.0025M", "1.0050M"]),
        ([-1.5, 0, 1.5], ["-1.5", "0", "1.5"]),
        ([10, 20], ["10", "20"]),
        ([0.0], ["0"]),
        ([], []),
    ],
)
def test_labels_of_an_axis_are_what_its_ticks_are(values, texts):
    assert numbers.ticks(values) == texts
