"""Amounts as people write and read them."""

import pytest

from groundup.base.amounts import counted, parse_bytes
from groundup.base.errors import ConfigError


def test_memory_is_read_as_people_write_it():
    assert parse_bytes("8GB") == 8 * 10**9 and parse_bytes(" 512 MiB ") == 512 << 20 and parse_bytes("1.5e3 b") == 1500
    for text in ("8", "GB", "-8GB", "0GB", "8 parsecs", ""):
        with pytest.raises(ConfigError, match="8GB"):
            parse_bytes(text)


def test_one_is_singular():
    assert [counted(n, "thread") for n in (0, 1, 2, 1000)] == ["0 threads", "1 thread", "2 threads", "1,000 threads"]
    assert [counted(n, "micro-batch", "micro-batches") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]
