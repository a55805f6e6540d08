"""The text that every Python has: the standard library's own sources, help topics, and chats made of its docstrings."""

import ast
import functools
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics.py"

DOCSTRING_QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name}.",
    "Describe {name} in short.",
)
PARAMETER_QUESTIONS = (
    "List the parameters of `{line}`",
    "Which parameters does `{line}` take?",
    "Name the parameters of `{line}`",
)
MIN_ANSWER_CHARACTERS, MAX_ANSWER_CHARACTERS = 12, 200
MIN_PROSE_FRACTION = 0.85
"""Least share of letters, spaces, commas and full stops in an answer: signatures and tables have fewer."""
MIN_PARAMETERS, MAX_PARAMETERS = 2, 6
"""A single name is nearly always `self`, which could be learned without reading the question."""
MAX_LINE_CHARACTERS = 120


def embedded_files() -> Iterator[tuple[Path, str]]:
    """(path, name) of each source of the standard library without its tests, sorted, the help topics last."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(".")]
        names += [(Path(parent) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    for name in sorted(names):
        if name != TOPICS:
            yield root / name, f"python/{name}"
    if TOPICS in names:
        yield root / TOPICS, f"python/{TOPICS}"


def docstring_chats() -> Iterator[dict[str, Any]]:
    """Chats that ask what a public function, method or class does; the answer is its docstring's first paragraph."""
    names: set[str] = set()
    answers: set[str] = set()
    for found in _definitions():
        answer = " ".join(re.split(r"\n\s*\n", found.docstring.strip(), maxsplit=1)[0].split())
        if not found.is_public or found.name in names or answer in answers or not _is_prose(answer):
            continue
        names.add(found.name)
        answers.add(answer)
        yield _chat(found.name, _pick(DOCSTRING_QUESTIONS, found.name).format(name=found.name), answer)


def parameter_chats() -> Iterator[dict[str, Any]]:
    """Chats whose right answer follows from the question alone: the names in a `def` line, in their order."""
    names: set[str] = set()
    lines: set[str] = set()
    for found in _definitions():
        if not MIN_PARAMETERS <= len(found.parameters) <= MAX_PARAMETERS or found.name in names or found.line in lines:
            continue
        if len(found.line) > MAX_LINE_CHARACTERS or not found.line.isascii() or "`" in found.line:
            continue
        names.add(found.name)
        lines.add(found.line)
        question = _pick(PARAMETER_QUESTIONS, found.name).format(line=found.line)
        yield _chat(found.name, question, ", ".join(found.parameters))


def parameters_of(question: str) -> list[str]:
    """Names in the `def` line that stands between backquotes in a question. Raises ValueError without such a line."""
    _, quote, rest = question.partition("`")
    line, end_quote, _ = rest.partition("`")
    try:
        body = ast.parse(f"{line} pass").body
    except SyntaxError:
        body = []
    if not (quote and end_quote) or len(body) != 1 or not isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        raise ValueError(f"no def line in {question!r}")
    return list(_parameter_names(body[0].args))


@dataclass(frozen=True, slots=True)
class _Definition:
    name: str
    """Module, class and name, with dots."""
    line: str
    """The `def` line on one line; empty for a class."""
    parameters: tuple[str, ...]
    docstring: str
    is_public: bool


@functools.lru_cache(maxsize=1)
def _definitions() -> tuple[_Definition, ...]:
    """Functions, methods and classes of the public modules of the standard library, parsed and never imported."""
    found: list[_Definition] = []
    for path, name in embedded_files():
        module = name.removeprefix("python/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if name.endswith(TOPICS) or any(part.startswith("_") for part in module.split(".")):
            continue
        found += _definitions_in(ast.parse(path.read_bytes()), module)
    return tuple(found)


def _definitions_in(parent: ast.Module | ast.ClassDef, prefix: str, *, is_public: bool = True) -> Iterator[_Definition]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name, docstring = f"{prefix}.{node.name}", ast.get_docstring(node) or ""
            public = is_public and not node.name.startswith("_")
            if isinstance(node, ast.ClassDef):
                yield _Definition(name, "", (), docstring, public)
                yield from _definitions_in(node, name, is_public=public)
            else:
                keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
                line = f"{keyword} {node.name}({ast.unparse(node.args)}):"
                yield _Definition(name, line, tuple(_parameter_names(node.args)), docstring, public)


def _parameter_names(arguments: ast.arguments) -> Iterator[str]:
    for argument in [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]:
        if argument is not None:
            yield argument.arg


def _is_prose(answer: str) -> bool:
    if not MIN_ANSWER_CHARACTERS <= len(answer) <= MAX_ANSWER_CHARACTERS or not answer.isascii():
        return False
    num_plain = sum(char.isalpha() or char in " ,." for char in answer)
    return answer[0].isalpha() and num_plain >= MIN_PROSE_FRACTION * len(answer) and "->" not in answer


def _pick(wordings: tuple[str, ...], name: str) -> str:
    return wordings[zlib.crc32(name.encode()) % len(wordings)]


def _chat(name: str, question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "group": name, "messages": messages}
