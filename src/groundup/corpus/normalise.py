"""One form for equal texts: line ends, control characters, NFC. Nothing else of a text is changed or stripped."""

import re
import unicodedata

from groundup.corpus.config import CorpusConfig

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]+")
_ASCII_CONTROLS = bytes([*range(9), *range(11, 32), 127])


def normalise(text: str, config: CorpusConfig) -> str:
    """The text with LF line ends, in NFC, mended and without controls where the config says so; idempotent.

    White space stays as it is, at both ends too. CR and CRLF become LF; of the other C0 and C1 controls, tab and line
    feed stay and the rest is stripped, or all stay with `control_characters: keep`.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if config.fix_text:
        text = _fix(text)
    # controls first: one between a letter and its accent would keep NFC from joining them
    if config.control_characters == "strip":
        text = _strip_controls(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return text


def _strip_controls(text: str) -> str:
    if text.isascii():  # ten times faster than the pattern
        return text.encode().translate(None, _ASCII_CONTROLS).decode()
    return _CONTROLS.sub("", text)


def _fix(text: str) -> str:
    """Mend mojibake, line by line; ftfy's other habits (HTML entities, quotes, widths) would change right text."""
    import ftfy
    from ftfy.badness import is_bad

    if text.isascii() or not is_bad(text):
        return text
    lines = text.split("\n")
    fixed = {line: ftfy.fix_encoding(line) for line in set(lines) if not line.isascii() and is_bad(line)}
    return "\n".join(fixed.get(line, line) for line in lines)
