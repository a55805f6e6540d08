"""Errors are one line for a person, with an exit code of their own."""

import pytest

from groundup.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    DoesNotFit,
    GroundupError,
    NumericsError,
    Preempted,
)

EXIT_CODES = {
    ConfigError: 2,
    DataError: 3,
    CheckpointError: 4,
    NumericsError: 5,
    DistributedError: 6,
    DoesNotFit: 7,
    GroundupError: 70,
    Preempted: 75,
}


def test_exit_codes_are_those_of_the_design():
    assert {kind: kind.exit_code for kind in EXIT_CODES} == EXIT_CODES
    assert set(GroundupError.__subclasses__()) | {GroundupError} == EXIT_CODES.keys()


def test_line_says_what_where_and_what_to_do():
    error = DataError(
        "E-TOKENS-NONE", what="no tokens in folder='x'", where="recipe.yaml:3", next="run `groundup tokenize`"
    )
    assert str(error) == "E-TOKENS-NONE: no tokens in folder='x' at recipe.yaml:3. Run `groundup tokenize`"


def test_line_without_place_and_advice():
    assert ConfigError("E-X", what="wrong").line() == "E-X: wrong"


@pytest.mark.parametrize("char", ["\n", "\r", "\t", "\x1b[31m", "\x00", "\x7f", "\x9b", "\u2028", "\u202e", "\udc80"])
def test_control_characters_are_escaped(char):
    line = DataError("E-X", what=f"a{char}b", where=f"c{char}d", next=f"e{char}f").line()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    assert line.encode("utf-8")


def test_letters_of_any_script_stay():
    assert "naïve 語 → ✓" in DataError("E-X", what="naïve 語 → ✓").line()
