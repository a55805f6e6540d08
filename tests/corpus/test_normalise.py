"""One form for equal texts, and nothing changed that no rule names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.config import CorpusConfig
from groundup.corpus.normalise import normalise

STRIP = CorpusConfig(source="x")
KEEP = CorpusConfig(source="x", control_characters="keep")
FIX = CorpusConfig(source="x", fix_text=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\n\r\nd", "a\nb\nc\n\nd"),
        ("e\u0301", "é"),
        ("e\x01\u0301", "é"),
        ("a\x00b\x0c\x7f\x9f\x85é\tc", "abé\tc"),
        ("a\x00b\x0c\x7f\tc", "ab\tc"),
        ("a\u2028b \ufeff\u200b ", "a\u2028b \ufeff\u200b "),
        ("\n\n a \n\n", "\n\n a \n\n"),
        ("sÃ© “q” &amp; ﬁ", "sÃ© “q” &amp; ﬁ"),
    ],
)
def test_rules(text, expected):
    assert normalise(text, STRIP) == expected


def test_controls_may_stay():
    assert normalise("a\x00b\x0c\r\n\x85", KEEP) == "a\x00b\x0c\n\x85"


def test_fixing_mends_mojibake_and_nothing_else():
    assert normalise("sÃ© Ã¼ber", FIX) == "sé über"
    assert normalise("“q” &amp; ﬁ Ａ \x1b[1m", FIX) == "“q” &amp; ﬁ Ａ [1m"


@pytest.mark.parametrize("config", [STRIP, KEEP])
@given(text=st.text())
@pytest.mark.costly
def test_twice_is_once(config, text):
    once = normalise(text, config)
    assert normalise(once, config) == once


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_ascii_is_untouched(text):
    assert normalise(text, STRIP) == text
