"""Finding the files of a corpus: files, folders, globs and lists of these, in one fixed order."""

import fnmatch
import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from groundup.base.errors import DataError
from groundup.corpus.embedded import embedded_files

Format = Literal["text", "jsonl", "json", "csv", "parquet", "topics"]
Compression = Literal["gz", "zst"] | None

EMBEDDED = "embedded"
FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read; no machine's path stands in its names."""

    path: Path
    name: str
    """Name in ids, logs and keys: the path from the source's own name on, odd characters escaped."""
    source: str
    """Name of the source it belongs to: the file, folder or glob that the recipe names."""
    format: Format
    compression: Compression = None

    def signature(self) -> str:
        """Size, time of change and inode: equal signatures mean that the content was not changed."""
        facts = self.path.stat()
        return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ino}"


@dataclass
class Sources:
    """The files of a corpus in reading order, and what was passed over and why."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each entry of a folder or glob that is not read."""


def find_sources(source: str | list[str]) -> Sources:
    """The files that a recipe's `corpus.source` names. Raises DataError for what is missing, empty or unreadable."""
    found = Sources()
    paths: set[Path] = set()
    names: set[str] = set()
    for entry in [source] if isinstance(source, str) else source:
        before = len(found.files)
        for path, name, root in _candidates(entry, found):
            file = _as_source_file(path, name, root)
            if file is None:
                found.skipped.append((name, "unknown format"))
            elif path.resolve() in paths:
                found.skipped.append((name, "read already"))
            else:
                paths.add(path.resolve())
                found.files.append(_with_free_name(file, names))
        if len(found.files) == before and not any(reason == "read already" for _, reason in found.skipped):
            raise DataError(
                "E-SOURCE-EMPTY",
                what=f"no file to read{_first_reasons(found)}",
                where=escape_name(entry),
                next=f"known formats: {' '.join(FORMATS)}, each also as .gz or .zst",
            )
    for file in found.files:
        _check_readable(file.path)
    return found


def escape_name(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8 and control characters as escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _candidates(entry: str, found: Sources) -> Iterator[tuple[Path, str, str]]:
    """(path, name, source) of each file an entry of `corpus.source` stands for."""
    path = Path(entry).expanduser()
    if entry == EMBEDDED:
        for file, name in embedded_files():
            yield file, name, EMBEDDED
    elif path.is_dir():
        root = escape_name(path.resolve().name)
        for file in _walk(path, found):
            yield file, f"{root}/{escape_name(file.relative_to(path).as_posix())}", root
    elif path.exists():
        if not path.is_file():
            raise DataError("E-SOURCE-KIND", what="not a file or folder", where=escape_name(entry), next="name a file")
        if _as_source_file(path, path.name, path.name) is None:
            raise DataError(
                "E-FORMAT",
                what=f"cannot read a {path.suffix or 'file without an ending'}",
                where=escape_name(entry),
                next=f"known formats: {' '.join(FORMATS)}, each also as .gz or .zst; unpack archives first",
            )
        yield path, escape_name(path.name), escape_name(path.name)
    elif glob.has_magic(entry):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        pattern = path.relative_to(fixed).as_posix()
        matches = re.compile(_glob_regex(pattern)).fullmatch
        max_depth = None if "**" in pattern else pattern.count("/")
        root = escape_name(fixed.resolve().name)
        for file in _walk(fixed, found, max_depth):
            name = file.relative_to(fixed).as_posix()
            if matches(name):
                yield file, f"{root}/{escape_name(name)}", root
    else:
        raise DataError(
            "E-SOURCE-NONE",
            what="no such file or folder",
            where=escape_name(entry),
            next="check its path: corpus.source, or what the command was given",
        )


def _walk(folder: Path, found: Sources, max_depth: int | None = None) -> Iterator[Path]:
    """Regular files under a folder, sorted by their path's bytes; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(
            "E-SOURCE-READ",
            what=f"cannot read the folder: {error.strerror}",
            where=escape_name(str(error.filename)),
            next="change its permissions or leave it out",
        )

    files = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        for name in list(subfolders):
            path = Path(parent) / name
            reason = "hidden" if name.startswith(".") else "link to a folder" if path.is_symlink() else None
            if max_depth is not None and len(path.relative_to(folder).parts) > max_depth:
                reason = "below the glob"
            if name == "__pycache__":
                reason = "compiled code"
            if reason:
                subfolders.remove(name)
                found.skipped.append((escape_name(path.relative_to(folder).as_posix()), reason))
        for name in names:
            path = Path(parent) / name
            reason = _why_not(path)
            if reason:
                found.skipped.append((escape_name(path.relative_to(folder).as_posix()), reason))
            else:
                files.append(path)
    found.skipped.sort()
    yield from sorted(files, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


def _why_not(path: Path) -> str | None:
    """Why an entry found in a folder is passed over, None for a file to read."""
    if path.name.startswith("."):
        return "hidden"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "dangling link"
    except OSError as error:  # ELOOP: a link to itself
        return str(error.strerror)
    return None if stat.S_ISREG(mode) else "not a file"


def _as_source_file(path: Path, name: str, root: str) -> SourceFile | None:
    if root == EMBEDDED and path.name == "topics.py":
        return SourceFile(path, name, root, "topics")
    compression = COMPRESSIONS.get(path.suffix.lower())
    ending = Path(path.stem).suffix.lower() if compression else path.suffix.lower()
    return SourceFile(path, name, root, FORMATS[ending], compression) if ending in FORMATS else None


def _with_free_name(file: SourceFile, names: set[str]) -> SourceFile:
    """The file, its name made unique by `~2`, `~3`… where an earlier file has it."""
    name, number = file.name, 1
    while name in names:
        number += 1
        name = f"{file.name}~{number}"
    names.add(name)
    return SourceFile(file.path, name, file.source, file.format, file.compression)


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression of a relative path: only `**` crosses a folder's border."""
    parts = [
        "(?:[^/]+/)*" if part == "**" else fnmatch.translate(part).replace(".*", "[^/]*").removesuffix("\\Z") + "/"
        for part in pattern.split("/")
    ]
    return "".join(parts).removesuffix("/") + ("[^/]*" if pattern.endswith("**") else "")


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise DataError(
            "E-SOURCE-READ",
            what=f"cannot read: {error.strerror}",
            where=escape_name(str(path)),
            next="change its permissions or leave it out",
        ) from None


def _first_reasons(found: Sources) -> str:
    listing = ", ".join(f"{name}: {reason}" for name, reason in found.skipped[:3])
    return f" ({len(found.skipped)} passed over: {listing})" if listing else ""
