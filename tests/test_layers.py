"""Imports point down the floors, files of a room import each other without a loop, config.py stays light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "groundup"
FLOORS = [
    {"base"},
    {"corpus", "tokenizer", "model", "adapters", "optim"},
    {"data", "parallel", "checkpoint", "generate"},
    {"train", "eval", "report", "serve"},
    {"stages"},
    {"insight", "proof"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NAMES_WITHOUT_MEANING = {"utils", "util", "common", "helpers", "helper", "misc", "core"}


def imported_names(path: Path) -> set[str]:
    """Dotted names a file imports, late imports and those for the type checker included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):  # walks into functions: a late import is an import
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from the root"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names.update(str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("groundup.")}


def files_of(root: Path) -> list[Path]:
    files = sorted(root.rglob("*.py"))
    assert files, "looked in the wrong place"  # a test that checks nothing must not pass
    return files


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def check_imports_point_down(root: Path) -> None:
    for path in files_of(root):
        room = room_of(path, root)
        assert room in FLOOR_OF or path == root / "__init__.py", f"{path} stands on no floor"
        for other in rooms_imported(path) - {room}:
            assert other in FLOOR_OF, f"{path} imports {other}, which stands on no floor"
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path} may not import {other}"


def check_no_loops(root: Path) -> None:
    names_in: dict[str, dict[str, set[str]]] = {}
    for path in files_of(root):
        module = ".".join(("groundup", *path.relative_to(root).with_suffix("").parts))
        names_in.setdefault(room_of(path, root), {})[module] = imported_names(path)
    for modules in names_in.values():
        graph = {
            module: {other for other in modules if other != module and imports(names, other)}
            for module, names in modules.items()
        }
        TopologicalSorter(graph).prepare()


def imports(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


def check_init_files_hold_a_docstring(root: Path) -> None:
    for path in (path for path in files_of(root) if path.name == "__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} needs a docstring"
        assert len(tree.body) == 1, f"{path} may hold a docstring and nothing else"


def check_names_mean_something(root: Path) -> None:
    for path in files_of(root):
        vague = NAMES_WITHOUT_MEANING & {part.removesuffix(".py") for part in path.relative_to(root).parts}
        assert not vague, f"{path}: {vague} says nothing; a part without a home has no name yet"


def check_configs_are_light(root: Path) -> None:
    for path in (path for path in files_of(root) if path.name == "config.py"):
        heavy = {name for name in imported_names(path) if name.split(".")[0] in ("torch", "transformers", "peft")}
        assert not heavy, f"{path} may not import {heavy}"


CHECKS = [
    check_imports_point_down,
    check_no_loops,
    check_init_files_hold_a_docstring,
    check_names_mean_something,
    check_configs_are_light,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_source_keeps_the_rule(check):
    check(ROOT)


BROKEN = {
    "upward import": (check_imports_point_down, {"base/a.py": "from groundup.train.loop import x"}),
    "late upward import": (check_imports_point_down, {"model/a.py": "def f():\n    import groundup.data.loader"}),
    "upward import for types": (
        check_imports_point_down,
        {"optim/a.py": "if TYPE_CHECKING:\n    from groundup import checkpoint"},
    ),
    "upward import by a string": (check_imports_point_down, {"eval/a.py": "import_module('groundup.stages.run')"}),
    "sideways import": (check_imports_point_down, {"report/a.py": "from groundup.train.loop import x"}),
    "relative import": (check_imports_point_down, {"base/a.py": "from .errors import DataError"}),
    "unknown room": (check_imports_point_down, {"garage/a.py": ""}),
    "loop of two": (
        check_no_loops,
        {"base/a.py": "from groundup.base.b import x", "base/b.py": "def f():\n    from groundup.base import a"},
    ),
    "code in __init__": (check_init_files_hold_a_docstring, {"base/__init__.py": '"""Doc."""\nimport os'}),
    "empty __init__": (check_init_files_hold_a_docstring, {"base/__init__.py": ""}),
    "vague name": (check_names_mean_something, {"train/utils.py": ""}),
    "torch in a config": (check_configs_are_light, {"train/config.py": "def f():\n    from torch import nn"}),
    "nothing to check": (check_imports_point_down, {"README.md": ""}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_rule_goes_red(case, tmp_path):
    check, sources = BROKEN[case]
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    with pytest.raises((AssertionError, CycleError)):
        check(tmp_path)


def test_configs_load_no_torch_by_way_of_others():
    modules = [
        ".".join(("groundup", *path.relative_to(ROOT).with_suffix("").parts))
        for path in files_of(ROOT)
        if path.name == "config.py"
    ]
    assert "groundup.base.config" in modules
    program = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
