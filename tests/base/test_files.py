"""A write leaves the old file or the new one."""

import json

import pytest

from groundup.base.errors import DataError
from groundup.base.files import atomic_write, read_json, sha256_of, write_json


def test_new_file_is_whole(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_writer_that_raises_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_writer_that_raises_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_write(tmp_path / "a"):
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())


def test_value_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"loss": 1.5}


def test_json_keeps_order_and_letters(tmp_path):
    write_json(tmp_path / "a.json", {"b": "語", "a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": "語",\n  "a": 1\n}\n'
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[1]", json.dumps("x").encode()])
def test_damaged_json_is_a_data_error(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="E-JSON"):
        read_json(path)


def test_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
