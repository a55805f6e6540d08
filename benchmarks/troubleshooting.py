"""docs/troubleshooting.md: every error of groundup with its next step, read off the very calls that raise it.

python -m benchmarks.troubleshooting
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from groundup.base import errors

KINDS: tuple[type[errors.GroundupError], ...] = (errors.GroundupError, *errors.GroundupError.__subclasses__())
SOURCE, PAGE = Path("src/groundup"), Path("docs/troubleshooting.md")
CLASSES: dict[str, type[errors.GroundupError]] = {kind.__name__: kind for kind in KINDS}
HEAD = """# Troubleshooting

Each error of groundup is one line: a code, what is wrong, where, and what to do next. This page is the list of them, made
from the source by `python -m benchmarks.troubleshooting`; … stands for a value. What a run's curves show is told by
`groundup doctor RUN` (diagnosis.md). `--debug` adds the traceback.
"""


@dataclass(frozen=True, order=True)
class Advice:
    """An error as it stands in the source."""

    kind: str
    code: str
    what: str
    next: str


def advice_in(source: str) -> Iterator[Advice]:
    """Every error that is made with a code of its own and a next step."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in CLASSES or not node.args:
            continue
        code = node.args[0]
        told = {keyword.arg: _words(keyword.value) for keyword in node.keywords}
        if isinstance(code, ast.Constant) and isinstance(code.value, str) and told.get("next"):
            kind = ast.unparse(node.func).split(".")[-1]
            yield Advice(kind, code.value, told.get("what", ""), told["next"])


def _words(node: ast.expr) -> str:
    """A text of the source, … for each value in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    return "…"


def page() -> str:
    """The whole page."""
    found = {advice for path in sorted(SOURCE.rglob("*.py")) for advice in advice_in(path.read_text(encoding="utf-8"))}
    lines = [HEAD]
    for name, kind in CLASSES.items():
        rows = sorted(advice for advice in found if advice.kind == name)
        if rows:
            lines += [f"## Exit code {kind.exit_code}: {_title(kind)}", ""]
            lines += ["| code | what | next |", "|---|---|---|"]
            lines += [f"| `{row.code}` | {_cell(row.what)} | {_cell(row.next)} |" for row in rows] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _title(kind: type[errors.GroundupError]) -> str:
    if kind is errors.GroundupError:
        return "A fault of groundup itself."
    return (kind.__doc__ or "").splitlines()[0]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
