"""A finished stage stands in a second run without being made, or copied, again."""

import errno

import pytest

from groundup.base.artifact import ChangePolicy, RunFolder, StageKey, read_manifest, verify
from groundup.insight import taken_over
from groundup.insight.taken_over import take_over


def made(run, text):
    """A committed stage with a file in a folder."""
    attempt = run.begin(StageKey("tokens", 1, {"text": text}), ChangePolicy())
    if attempt is not None:
        (attempt.folder / "parts").mkdir()
        (attempt.folder / "parts" / "a.tokens").write_text(text)
        (attempt.folder / "summary.json").write_text("{}")
        run.commit(attempt)
    return run.path / "tokens"


@pytest.fixture
def two(tmp_path):
    return RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")


def test_it_is_the_same_file_and_stands_for_its_key(two):
    one, other = two
    folder = made(one, "some text")
    take_over("tokens", one.path, other)
    taken = other.path / "tokens"
    assert (taken / "parts" / "a.tokens").stat().st_ino == (folder / "parts" / "a.tokens").stat().st_ino
    assert read_manifest(taken) == read_manifest(folder) and (taken / "summary.json").is_file()
    verify(taken, read_manifest(taken))
    assert other.begin(StageKey("tokens", 1, {"text": "some text"}), ChangePolicy()) is None, "it is not made again"
    (taken / "mark").touch()
    take_over("tokens", one.path, other)
    assert (taken / "mark").exists() and not (other.path / ".attempts").exists()


def test_another_text_takes_its_place_and_nothing_is_nothing(two):
    one, other = two
    take_over("tokens", one.path, other)
    assert not (other.path / "tokens").exists()
    made(one, "some text")
    take_over("tokens", one.path, other)
    made(one, "another text")
    take_over("tokens", one.path, other)
    assert (other.path / "tokens" / "parts" / "a.tokens").read_text() == "another text"


def test_a_disk_without_links_gets_copies(two, monkeypatch):
    one, other = two
    folder = made(one, "some text")

    def refuse(*paths):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(taken_over.os, "link", refuse)
    take_over("tokens", one.path, other)
    copy = other.path / "tokens" / "parts" / "a.tokens"
    assert copy.read_text() == "some text" and copy.stat().st_ino != (folder / "parts" / "a.tokens").stat().st_ino
