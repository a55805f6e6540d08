"""The spool gives back its lines in order and one by one, and leaves nothing behind."""

from collections import Counter

import pytest

from groundup.base import failpoints
from groundup.base.errors import DataError
from groundup.corpus import spool as spool_module
from groundup.corpus.spool import Spool


def test_lines_come_back_and_the_file_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "BUFFER_BYTES", 100)
    lines = [bytes([number]) * number + b"\n" for number in range(60)]
    with Spool(tmp_path / "spool") as spool:
        for line in lines:
            spool.add(line)
        spool.flush()
        assert [spool.read(number) for number in (59, 0, 7)] == [lines[59], lines[0], lines[7]]
        assert list(spool) == lines
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_named_and_the_file_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "corpus.spool:enospc:1")
    monkeypatch.setattr(failpoints, "_passages", Counter())
    with pytest.raises(DataError) as caught, Spool(tmp_path / "spool") as spool:
        spool.add(b"x" * 10)
        spool.flush()
    assert caught.value.code == "E-DISK" and "10 bytes more" in caught.value.line()
    assert not any(tmp_path.iterdir())
