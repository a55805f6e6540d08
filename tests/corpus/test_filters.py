"""Filters: what each measures, by which name it drops, and that no input makes one slow."""

import time

import pytest

from groundup.corpus import filters
from groundup.corpus.config import CorpusConfig, FiltersConfig
from groundup.corpus.filters import reason_to_drop
from groundup.corpus.normalise import normalise


@pytest.mark.parametrize("text", ["", "  ", "\n\t\u2003", "\u200b", "\ufeff\u2060 \u200d", "\x00\x01", "\u3164\u2800"])
def test_nothing_to_see_is_empty(text):
    assert reason_to_drop(text, FiltersConfig()) == "empty"


@pytest.mark.parametrize("text", ["a", ".", "中", "\u200ba\u200b", "\U0001f600"])
def test_anything_to_see_is_kept_by_default(text):
    assert reason_to_drop(text, FiltersConfig()) is None


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({"min_characters": 4}, "a b c d", "a b c   "),
        ({"max_characters": 4}, "abcd", "abcde"),
        ({"max_symbol_fraction": 0.5}, "ab!!", "a!!!"),
        ({"max_digit_fraction": 0.5}, "ab12", "a123"),
        ({"max_repeated_line_fraction": 0.5}, "one\none\ntwo", "one\none\none"),
        ({"max_repeated_ngram_fraction": 0.5}, "a b c d e f g h", "a b c d e " * 4),
        ({"languages": ("en", "de")}, "This is a plain English sentence.", "Ceci est une phrase en français."),
    ],
)
def test_each_filter_drops_by_its_own_name(settings, kept, dropped):
    config = FiltersConfig(**settings)
    assert reason_to_drop(kept, config) is None
    assert reason_to_drop(dropped, config) == next(iter(settings))


def test_every_threshold_of_the_config_is_read():
    strict = {
        "min_characters": 10**9,
        "max_characters": 1,
        "max_symbol_fraction": 0,
        "max_digit_fraction": 0,
        "max_repeated_line_fraction": 0,
        "max_repeated_ngram_fraction": 0,
        "languages": ("xx",),
    }
    assert set(strict) == set(FiltersConfig.model_fields)
    text = "one 1! two three four five\n" * 3
    assert {reason_to_drop(text, FiltersConfig(**{name: value})) for name, value in strict.items()} == set(strict)


def test_measures():
    assert filters.repeated_line_fraction("aa\nb\naa\n\n\naa") == 4 / 7
    assert filters.repeated_ngram_fraction("a b c d e f a b c d e f") == pytest.approx(1 - 6 / 8)
    assert filters.symbol_fraction("a1 é中!") == pytest.approx(1 / 6)


MEGABYTES = {
    "a": "a" * 1_000_000,
    "spaces": " " * 999_999 + "x",
    "angles": "<" * 1_000_000,
    "lines": "\n" * 999_999 + "x",
    "quotes": "\\\"'" * 333_333,
    "digits": "1 " * 500_000,
    "accents": "e\u0301" * 333_333,
    "combining": "a" + "\u0301" * 499_999,
    "mojibake": "Ã©" * 250_000,
    "emoji": "\U0001f469\u200d" * 142_857,
    "mixed": "<a b='" * 166_666,
}
MEASURES = [
    filters.is_empty,
    filters.num_visible_characters,
    filters.symbol_fraction,
    filters.digit_fraction,
    filters.repeated_line_fraction,
    filters.repeated_ngram_fraction,
    filters.language_of,
]


@pytest.mark.parametrize("name", MEGABYTES)
def test_no_megabyte_takes_a_filter_a_second(name):
    filters.language_of("warm")
    for measure in MEASURES:
        started_at = time.process_time()
        measure(MEGABYTES[name])
        assert time.process_time() - started_at <= 1, measure.__name__


@pytest.mark.parametrize("name", MEGABYTES)
@pytest.mark.parametrize("fix_text", [False, True])
def test_no_megabyte_takes_normalising_a_second(name, fix_text):
    config = CorpusConfig(source="x", fix_text=fix_text)
    normalise("warm", config)
    started_at = time.process_time()
    normalise(MEGABYTES[name], config)
    assert time.process_time() - started_at <= 1
