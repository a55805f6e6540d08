"""Tokens as they are shown: colours, marks without colours, and texts that would drive the terminal."""

from xml.etree import ElementTree

from groundup.report.token_view import MEANINGS, MarkedRow, MarkedText, for_terminal, legend, page, visible

PIECES = [MarkedText("ask\n", "ignored"), MarkedText("say", "supervised"), MarkedText("<end>", "end")]


def test_marks_stand_where_there_are_no_colours():
    assert for_terminal(PIECES, has_colour=False) == "ask\n«say»«<end>■»"


def test_every_line_has_its_own_colour():
    text = for_terminal([MarkedText("a\n\nb", "supervised")], has_colour=True)
    assert text == "\x1b[32ma\x1b[0m\n\n\x1b[32mb\x1b[0m"


def test_a_text_cannot_drive_the_terminal():
    hostile = "\x1b[2J\x07\x9b31m\u202eabc\r\n"
    for has_colour in (True, False):
        shown = for_terminal([MarkedText(hostile, "ignored")], has_colour=has_colour)
        assert "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown and "\r" not in shown
    assert visible("\x1b") == "\\x1b"


def test_the_legend_names_every_kind():
    assert all(meaning in legend(has_colour=False) for meaning in MEANINGS.values())


def test_the_page_is_whole_and_escapes():
    text = page("<title>", [MarkedRow("row & row", [MarkedText("</pre><script>alert(1)</script>", "supervised")])])
    assert "<script>" not in text
    ElementTree.fromstring(text.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
