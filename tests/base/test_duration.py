"""Lengths in words."""

import pytest
from pydantic import BaseModel, ValidationError

from groundup.base.duration import Duration, in_steps, parse


class Section(BaseModel):
    """A section with a length."""

    duration: Duration


SIZES = {"batch_rows": 4, "row_length": 16, "rows_per_epoch": 10}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500 steps", (500.0, "steps")),
        ("1 step", (1.0, "steps")),
        ("2e9 tokens", (2e9, "tokens")),
        ("2.5E3tokens", (2500.0, "tokens")),
        (" 1000  rows ", (1000.0, "rows")),
        ("0.5 epochs", (0.5, "epochs")),
        ("1 epoch", (1.0, "epochs")),
    ],
)
def test_good_lengths(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "500", "steps", "5 seconds", "5 minutes", "-5 steps", "0 steps", "0.0 epochs", "1e999 steps", "nan steps",
     "1.2.3 steps", ". steps", "5 steps 6", "five steps", "5 Steps", "1e steps"],
)  # fmt: skip
def test_bad_lengths(text):
    with pytest.raises(ValueError, match=r"length|float"):
        parse(text)
    with pytest.raises(ValidationError):
        Section(duration=text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7),
        ("64 tokens", 1),
        ("65 tokens", 2),
        ("6400 tokens", 100),
        ("1 rows", 1),
        ("9 rows", 3),
        ("1 epochs", 3),  # 10 rows are 2.5 batches
        ("2 epochs", 5),
        ("0.1 epochs", 1),
        ("1e-9 epochs", 1),
    ],
)
def test_lengths_in_steps(text, steps):
    assert in_steps(text, **SIZES) == steps


def test_rounding_of_floats_adds_no_step():
    assert in_steps("0.3 epochs", batch_rows=3, row_length=16, rows_per_epoch=10) == 1


def test_nothing_is_a_length_only_where_it_may_be():
    assert parse("0 tokens", may_be_zero=True) == (0.0, "tokens")
    with pytest.raises(ValueError, match="greater than 0"):
        parse("0 tokens")
    with pytest.raises(ValueError, match="finite"):
        parse("1e999 tokens", may_be_zero=True)
