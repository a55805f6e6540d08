"""What the model really sees: tokens with what each is to the training, for a terminal and as a page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["supervised", "end", "ignored", "border", "cut", "padding"]
MEANINGS: dict[Kind, str] = {
    "supervised": "learned: the model is trained to produce it",
    "end": "learned, and ends the turn or the text",
    "ignored": "seen, not learned",
    "border": "first token of a document: nothing before it is seen",
    "cut": "the document was cut here",
    "padding": "no document",
}
_ANSI: dict[Kind, str] = {
    "supervised": "32",
    "end": "1;30;42",
    "ignored": "2",
    "border": "1;36",
    "cut": "1;37;41",
    "padding": "2;9",
}
_MARKS: dict[Kind, tuple[str, str]] = {
    "supervised": ("«", "»"),
    "end": ("«", "■»"),
    "ignored": ("", ""),
    "border": ("│", ""),
    "cut": ("✂", ""),
    "padding": ("⟨", "⟩"),
}


@dataclass(frozen=True)
class MarkedText:
    """A piece of a row: the text of one or more tokens of one kind."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class MarkedRow:
    """A row or a chat, with a line about it."""

    title: str
    pieces: Sequence[MarkedText]


def visible(text: str) -> str:
    """Control characters as escapes, so that a text can neither drive a terminal nor hide; line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def for_terminal(pieces: Sequence[MarkedText], *, has_colour: bool) -> str:
    """Pieces as one text, coloured by kind, or with «» around what is learned where there are no colours."""
    parts = []
    for piece in pieces:
        text = visible(piece.text)
        if has_colour:
            # each line has its own colour: a pager shows lines one by one
            parts.append(
                "\n".join(f"\x1b[{_ANSI[piece.kind]}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
            )
        else:
            before, after = _MARKS[piece.kind]
            parts.append(f"{before}{text}{after}")
    return "".join(parts)


def legend(*, has_colour: bool) -> str:
    """The kinds, each shown as itself."""
    return "\n".join(
        f"  {for_terminal([MarkedText(kind, kind)], has_colour=has_colour)}  {meaning}"
        for kind, meaning in MEANINGS.items()
    )


def page(title: str, rows: Sequence[MarkedRow]) -> str:
    """A self-contained HTML page of rows."""
    key = "".join(f'<li><span class="{kind}">{kind}</span> {meaning}</li>' for kind, meaning in MEANINGS.items())
    body = "".join(
        f"<h2>{html.escape(visible(row.title))}</h2><pre>"
        + "".join(f'<span class="{piece.kind}">{html.escape(visible(piece.text))}</span>' for piece in row.pieces)
        + "</pre>"
        for row in rows
    )
    return (
        f"{_HEAD.replace('TITLE', html.escape(title))}<h1>{html.escape(title)}</h1><ul>{key}</ul>{body}</body></html>\n"
    )


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.4rem}h2{font-size:1rem;margin-top:2rem;color:#555;font-weight:600}
ul{list-style:none;padding:0;columns:2}pre{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid #ddd;
padding:.6rem .8rem;background:#fafafa;font:13px/1.6 ui-monospace,monospace}
.supervised{background:#d8f3dc}.end{background:#52b788;font-weight:600}.ignored{color:#777}
.border{background:#cfe8ff;font-weight:600}.cut{background:#ffb3b3;font-weight:600}.padding{color:#bbb;text-decoration:line-through}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}pre{background:#1e1e1e;border-color:#444}
.supervised{background:#1b4332}.end{background:#2d6a4f}.ignored{color:#999}.border{background:#123a5a}.cut{background:#7a1f1f}
.padding{color:#555}h2{color:#aaa}}
</style></head><body>"""
