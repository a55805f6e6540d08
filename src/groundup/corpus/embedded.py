"""The text that every Python has: the standard library's own sources, help topics, and chats made of its docstrings."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics.py"


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
