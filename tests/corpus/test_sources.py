"""Finding sources: order, names, what is passed over, and what stops the stage before any work."""

import os
import tempfile
from pathlib import Path

import pytest

from groundup.base.errors import DataError
from groundup.corpus.sources import find_sources


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def names(source: str | list[str]) -> list[str]:
    return [file.name for file in find_sources(source).files]


def test_a_folder_is_read_in_the_order_of_its_paths_and_named_without_its_place(tmp_path):
    fill(tmp_path / "books", "b.txt", "a/z.md", "a/a.jsonl.zst", "c.PARQUET", "B.txt", "x.py", "n.csv.gz", "m.json")
    assert names(str(tmp_path / "books")) == [
        f"books/{name}"
        for name in ["B.txt", "a/a.jsonl.zst", "a/z.md", "b.txt", "c.PARQUET", "m.json", "n.csv.gz", "x.py"]
    ]
    assert {file.source for file in find_sources(str(tmp_path / "books")).files} == {"books"}


def test_file_glob_and_list(tmp_path):
    fill(tmp_path, "d/a.txt", "d/b.md", "d/sub/c.txt", "e/a.txt")
    assert names(str(tmp_path / "d/a.txt")) == ["a.txt"]
    assert names(str(tmp_path / "d/*.txt")) == ["d/a.txt"]
    assert names(str(tmp_path / "d/**/*.txt")) == ["d/a.txt", "d/sub/c.txt"]
    assert names(str(tmp_path / "d/**")) == ["d/a.txt", "d/b.md", "d/sub/c.txt"]
    assert names(str(tmp_path / "[de]/?.txt")) == [f"{tmp_path.name}/d/a.txt", f"{tmp_path.name}/e/a.txt"]
    # the same name twice is told apart; the same file twice is read once
    both = [str(tmp_path / "e/a.txt"), str(tmp_path / "d/a.txt"), str(tmp_path / "d")]
    assert names(both) == ["a.txt", "a.txt~2", "d/b.md", "d/sub/c.txt"]


def test_odd_entries_are_passed_over_with_a_reason(tmp_path):
    fill(tmp_path, "good.txt", ".DS_Store", "image.png", "__pycache__/x.py", "a.zip")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "linked.txt").symlink_to("good.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find_sources(str(tmp_path))
    assert [file.path.name for file in found.files] == ["good.txt"]
    root = tmp_path.name
    assert dict(found.skipped) == {
        ".DS_Store": "hidden",
        "__pycache__": "compiled code",
        "dangling.txt": "dangling link",
        "loop": "link to a folder",
        "pipe.txt": "not a file",
        "self.txt": "Too many levels of symbolic links",
        f"{root}/a.zip": "unknown format",
        f"{root}/image.png": "unknown format",
        f"{root}/linked.txt": "read already",
    }


def test_odd_names_are_escaped_and_read(tmp_path):
    fill(tmp_path, "new\nline.txt")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("text")
    assert names(str(tmp_path)) == [f"{tmp_path.name}/new\\nline.txt", f"{tmp_path.name}/\\xff.txt"]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: folder / "missing", "E-SOURCE-NONE"),
        (lambda folder: folder, "E-SOURCE-EMPTY"),
        (lambda folder: folder / "*.txt", "E-SOURCE-EMPTY"),
        (lambda folder: fill(folder, "a.zip") or folder / "a.zip", "E-FORMAT"),
        (lambda folder: fill(folder, "a.zip") or folder, "E-SOURCE-EMPTY"),
        (lambda folder: os.mkfifo(folder / "p.txt") or folder / "p.txt", "E-SOURCE-KIND"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path, make, code):
    with pytest.raises(DataError) as caught:
        find_sources(str(make(tmp_path)))
    assert caught.value.code == code and caught.value.next


@pytest.mark.parametrize("locked", ["file.txt", "folder"])
def test_what_cannot_be_read_stops_before_the_work(locked):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, "good.txt", "file.txt", "folder/x.txt")
        folder.chmod(0o755)
        (folder / locked).chmod(0)
        child = os.fork()
        if child == 0:  # root may read everything: ask as nobody
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                find_sources(name)
            except DataError as error:
                code = 42 if error.code == "E-SOURCE-READ" and locked in error.where else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        (folder / locked).chmod(0o755)


def test_a_changed_file_has_another_signature(tmp_path):
    fill(tmp_path, "a.txt")
    (file,) = find_sources(str(tmp_path)).files
    before = file.signature()
    assert file.signature() == before
    with file.path.open("a") as stream:
        stream.write("more")
    assert file.signature() != before
