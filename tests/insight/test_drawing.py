"""Numbers in words and drawings."""

from groundup.insight.drawing import bar, bytes_words, count_words, curve, span_words


def test_bars_are_as_long_as_their_share():
    assert bar(0, 4) == "    " and bar(1, 4) == "████" and bar(2, 4) == "████"
    assert bar(0.5, 4) == "██  " and bar(0.53125, 4) == "██▏ "
    assert bar(1e-9, 4) == "▏   ", "what is not nothing is seen"


def test_curves_rise_and_fall():
    assert curve([0, 0.5, 1.0, 0.5], width=4, height=2) == ["  █ ", " ███"]
    assert curve([0.0] * 4, width=2, height=1) == ["  "]
    assert curve([1.0], width=5, height=1) == ["█"]
    assert curve([1.0, 1e-6], width=2, height=1) == ["█▁"]


def test_numbers_in_words():
    assert [count_words(n) for n in (7, 999, 1_310_720, 999_600, 1e18)] == ["7", "999", "1.31 M", "1.00 M", "1.00 E"]
    assert [span_words(s) for s in (0.0012, 0.1154, 0.99, 3, 100, 6000, 1e6)] == [
        "1.2 ms",
        "115 ms",
        "990 ms",
        "3.0 s",
        "1.7 minutes",
        "1.7 hours",
        "11.6 days",
    ]
    assert bytes_words(1.5e6) == "1.5 MB" and bytes_words(2.5e9) == "2.50 GB"
