"""Filters: each measures one thing of a text in linear time; a text outside its threshold is left out by name."""

import re
from collections.abc import Callable

from groundup.corpus.config import FiltersConfig
from groundup.corpus.words import ngram_hashes, sorted_set

EMPTY = "empty"
LANGUAGE_CHARACTERS = 20_000
"""The language is told from the text's beginning, so that a long text costs no more."""

_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def reason_to_drop(text: str, config: FiltersConfig) -> str | None:
    """Name of the first filter the text does not pass, which is its field in the config; None for a text to keep."""
    if is_empty(text):
        return EMPTY
    for name, measure in _AT_MOST.items():
        limit = getattr(config, name)
        if limit is not None and measure(text) > limit:
            return name
    # a text that is not empty has one
    if config.min_characters > 1 and num_visible_characters(text) < config.min_characters:
        return "min_characters"
    if config.languages and language_of(text) not in config.languages:
        return "languages"
    return None


def is_empty(text: str) -> bool:
    """Whether nothing can be seen: no character but white space, controls and zero-width signs."""
    return _VISIBLE.search(text) is None


def num_visible_characters(text: str) -> int:
    """Characters that are not white space."""
    return len("".join(text.split()))


def symbol_fraction(text: str) -> float:
    """Share of characters that are neither letters, digits nor white space."""
    num_plain = sum(map(str.isalnum, text)) + sum(map(str.isspace, text))
    return (len(text) - num_plain) / len(text)


def digit_fraction(text: str) -> float:
    """Share of characters that are digits."""
    return sum(map(str.isdigit, text)) / len(text)


def repeated_line_fraction(text: str) -> float:
    """Share of characters in lines that occurred before."""
    seen: set[str] = set()
    num_repeated = num_all = 0
    for line in text.split("\n"):
        line = line.strip()
        num_all += len(line)
        if line in seen:
            num_repeated += len(line)
        seen.add(line)
    return num_repeated / num_all if num_all else 0.0


def repeated_ngram_fraction(text: str) -> float:
    """Share of word 5-grams that occurred before."""
    ngrams, _ = ngram_hashes([text])
    return 1 - len(sorted_set(ngrams)) / len(ngrams) if len(ngrams) else 0.0


def language_of(text: str) -> str:
    """ISO 639-1 code of the language the text is most likely in."""
    import py3langid

    return str(py3langid.classify(text[:LANGUAGE_CHARACTERS])[0])


_AT_MOST: dict[str, Callable[[str], float]] = {
    "max_characters": len,
    "max_symbol_fraction": symbol_fraction,
    "max_digit_fraction": digit_fraction,
    "max_repeated_line_fraction": repeated_line_fraction,
    "max_repeated_ngram_fraction": repeated_ngram_fraction,
}
