"""The disk does each operation as it says."""

import os

import pytest

from groundup.base.disk import Disk


def test_a_file_is_written_whole_and_read_back(tmp_path, monkeypatch):
    disk, path = Disk(), tmp_path / "a"
    data = os.urandom(3_000_001)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, piece: write(descriptor, piece[:700_001]))
    descriptor = disk.create(path)
    disk.write(descriptor, memoryview(data))
    disk.sync(descriptor)
    disk.close(descriptor)
    disk.forget(path)
    assert disk.read(path) == b"".join(disk.chunks(path)) == data


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        Disk().create(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        Disk().create(tmp_path / "link")


def test_folders_names_and_room(tmp_path):
    disk = Disk()
    disk.make_folder(tmp_path / "folder")
    disk.sync_folder(tmp_path)
    (tmp_path / "folder" / "a").touch()
    with pytest.raises(OSError, match="not empty"):
        disk.remove_folder(tmp_path / "folder")
    disk.rename(tmp_path / "folder" / "a", tmp_path / "b")
    disk.remove_file(tmp_path / "b")
    disk.remove_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    assert disk.free_bytes(tmp_path / "not" / "there") > 0
    assert disk.name(tmp_path / "not" / "there").is_mount()
