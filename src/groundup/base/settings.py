"""Settings of config classes as their source tells them: a command's help costs no import of pydantic and yaml."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class _Field:
    name: str
    module: str
    annotation: ast.expr
    value: ast.expr | None
    help: str

    def default(self) -> str:
        value = self.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
            value = value.args[0] if value.args else None
        return "required" if value is None else str(_evaluate(self.module, value))

    def section(self) -> tuple[str, str] | None:
        """(module, name) of the config class that the field holds, None for a plain value."""
        names = [node.id for node in ast.walk(self.annotation) if isinstance(node, ast.Name)]
        return next((place for name in names if (place := _find_class(self.module, name))), None)


def section_help(module: str, name: str, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(option, default, help) of each field of the config class `name`, nested sections included."""
    for field in _fields(module, name).values():
        section = field.section()
        if section is not None:
            yield from section_help(*section, f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}", field.default(), field.help


def _fields(module: str, name: str) -> dict[str, _Field]:
    """A class's fields by name; those of its bases first, the last base's before the others', as pydantic has them."""
    node = _classes(module)[name]
    found: dict[str, _Field] = {}
    for base in reversed(node.bases):
        place = _find_class(module, ast.unparse(base))
        found |= _fields(*place) if place is not None else {}
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id
            found[name] = _Field(name, module, line.annotation, line.value, _docstring(after))
    return found


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _evaluate(module: str, node: ast.expr) -> Any:
    """Value of a literal, of a name that stands for one, or of a shift such as `64 << 20`."""
    if isinstance(node, ast.Name):
        return _evaluate(module, _constants(module)[node.id])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
        return _evaluate(module, node.left) << _evaluate(module, node.right)
    return ast.literal_eval(node)


def _find_class(module: str, name: str) -> tuple[str, str] | None:
    """(module, name) of a class of ours that `name` means in a module; None for anything else."""
    if name in _classes(module):
        return module, name
    for node in _body(module):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("groundup."):
            is_named = any(alias.name == name for alias in node.names)
            if is_named and name in _classes(node.module):
                return node.module, name
    return None


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _body(module) if isinstance(node, ast.ClassDef)}


@cache
def _constants(module: str) -> dict[str, ast.expr]:
    return {ast.unparse(node.targets[0]): node.value for node in _body(module) if isinstance(node, ast.Assign)}


@cache
def _body(module: str) -> list[ast.stmt]:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body
