"""What no file of ours may contain: ways to run code from data, silenced errors, files that grew too long."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MAX_LINES = 500
EXPLAINED = {
    "src/groundup/cli.py": "a list of commands, a few lines each; one is looked up, never read with the others"
}
"""Files over the limit, with the reason why they are not split."""

BANNED_KEYWORDS = {
    ("weights_only", False): "a pickle can run code",
    ("allow_pickle", True): "a pickle can run code",
    ("trust_remote_code", True): "runs code from a model's folder",
    ("shell", True): "a file name can become a command",
    ("strict", False): "hides missing and left-over weights",
}
BANNED_CALLS = {
    **{
        f"{module}.{name}": "a pickle can run code"
        for module in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal")
        for name in ("load", "loads", "Unpickler")
    },
    **{f"yaml.{name}": "builds any Python object" for name in ("unsafe_load", "unsafe_load_all", "full_load")},
    "os.system": "a file name can become a command",
    "os.popen": "a file name can become a command",
    "eval": "runs data as code",
    "exec": "runs data as code",
}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def faults_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of every banned construct."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        if isinstance(node, ast.ExceptHandler) and [type(line) for line in node.body] == [ast.Pass]:
            caught = ast.unparse(node.type) if node.type else ""
            if caught in ("Exception", "BaseException"):
                yield node.lineno, f"{caught} swallowed"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if reason := BANNED_CALLS.get(f"{node.module}.{alias.name}"):
                    yield node.lineno, f"{node.module}.{alias.name}: {reason}"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, fault) for fault in faults_of_call(node))


def faults_of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
    if reason := BANNED_CALLS.get(name):
        yield f"{name}: {reason}"
    if last == "extractall":
        yield "extractall: a member's name can point out of the folder"
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [*call.args[1:], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader")]
        if not loaders or ast.unparse(loaders[0]).split(".")[-1] not in SAFE_LOADERS:
            yield f"{name} without a safe loader: builds any Python object"
    if last == "load_state_dict" and any(isinstance(arg, ast.Constant) and arg.value is False for arg in call.args[1:]):
        yield "load_state_dict(…, False): hides missing and left-over weights"
    for keyword in call.keywords:
        if not isinstance(keyword.value, ast.Constant) or name == "zip":
            continue
        if reason := BANNED_KEYWORDS.get((keyword.arg or "", keyword.value.value)):
            yield f"{keyword.arg}={keyword.value.value}: {reason}"


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert files, "looked in the wrong place"
    return files


def test_no_banned_construct():
    faults = [
        f"{path.relative_to(REPOSITORY)}:{line}: {fault}"
        for path in python_files("src", "trainer")
        for line, fault in faults_in(path.read_text())
    ]
    assert not faults, "\n".join(faults)


BANNED_WORDS = (
    *("pickle.load", "torch.load", "weights_only=False", "extractall", "trust_remote_code", "yaml.load(", "shell=True"),
    *("allow_pickle=True", "unsafe_load", "os.system", "os.popen"),
)
"""What stands nowhere in src/, not even in a comment: a grep finds it."""


READER_OF_PICKLES = {
    "src/groundup/checkpoint/pth_reader.py": (
        "torch.load",
        "`groundup convert` reads .pth files: here only, with weights_only=True, in a process of its own with limits",
    )
}
"""The one file that may hold a banned word, the word, and why."""


def test_no_banned_word_stands_in_the_source():
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {word}"
        for path in python_files("src")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in BANNED_WORDS
        if word in line and word != READER_OF_PICKLES.get(path.relative_to(REPOSITORY).as_posix(), ("",))[0]
    ]
    assert not found, "\n".join(found)


def test_the_reader_of_pickles_asks_for_tensors_only_and_is_imported_by_the_converter_alone():
    (name,) = READER_OF_PICKLES
    calls = [
        call
        for call in ast.walk(ast.parse((REPOSITORY / name).read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load"
    ]
    assert len(calls) == 1 and "weights_only=True" in ast.unparse(calls[0])
    users = [
        path.relative_to(REPOSITORY).as_posix()
        for path in python_files("src", "trainer")
        if "pth_reader" in path.read_text() and path.name != "pth_reader.py"
    ]
    assert users == ["src/groundup/stages/convert.py"]


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(REPOSITORY).as_posix(): len(path.read_text().splitlines())
        for path in python_files("src", "trainer", "tests")
    }
    long = {name: length for name, length in lengths.items() if length > MAX_LINES and name not in EXPLAINED}
    assert not long, f"split, or say why in EXPLAINED: {long}"


def shape_letters(source: str) -> set[str]:
    """Letters of the shapes in which names of a file end, as in `x_BTD`."""
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.arg)}
    return {letter for name in names if (match := re.fullmatch(r"[a-z]\w*?_([A-Z1]+)", name)) for letter in match[1]}


def test_shapes_use_the_letters_of_the_legend():
    legend = set(re.findall(r"^\| \*\*(.)\*\* \|", (REPOSITORY / "docs" / "shapes.md").read_text(), re.MULTILINE))
    assert len(legend) > 9, "the legend was not found"
    for path in python_files("src/groundup/model", "src/groundup/adapters", "src/groundup/parallel"):
        unknown = shape_letters(path.read_text()) - legend
        assert not unknown, f"{path}: {unknown} is not in docs/shapes.md"
    assert shape_letters("def f(x_BTQ): y_1Z = x_BTQ; LEFT_B = k_proj") == set("BTQ1Z")


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "pickle.loads(data)",
        "from pickle import loads",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "tarfile.open(path).extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "model.load_state_dict(state, strict=False)",
        "model.load_state_dict(state, False)",
        "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    pass",
        "eval(text)",
    ],
)
def test_banned_construct_is_found(source):
    assert list(faults_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "zip(a, b, strict=False)",
        "model.eval()",
        "try:\n    f()\nexcept OSError:\n    pass",
    ],
)
def test_harmless_construct_passes(source):
    assert not list(faults_in(source))
