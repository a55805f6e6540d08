"""Facts of the machine are complete and can be written as JSON."""

import json

import pytest

from groundup.base import machine


def test_description_can_be_written():
    facts = json.loads(json.dumps(machine.describe()))
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1 << 20
    assert "torch" in facts["packages"]
    assert {"cpu", "fast_bf16", "compiler", "system", "python"} <= facts.keys()


def test_peak_memory_grows_with_use():
    before = machine.peak_memory_bytes()
    block = bytearray(before)
    block[::4096] = b"x" * len(block[::4096])
    assert machine.peak_memory_bytes() > before


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1000)
    assert machine.memory_limit_bytes(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit_bytes(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("600\n")
    assert machine.memory_limit_bytes(tmp_path) == 600
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("500\n")
    assert machine.memory_limit_bytes(tmp_path) == 500


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"XDG_CACHE_HOME": "caches"}, "caches/groundup/compiled"),
        ({"HOME": "someone"}, "someone/.cache/groundup/compiled"),
        ({"HOME": "someone", "TORCHINDUCTOR_CACHE_DIR": "mine"}, "mine"),
        ({"HOME": "file"}, None),
        ({}, None),
    ],
)
def test_what_is_compiled_is_kept_with_the_users_caches(monkeypatch, tmp_path, settings, folder):
    """Where no folder can be made, torch's own choice stays."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine.os, "environ", {name: str(tmp_path / value) for name, value in settings.items()})
    machine.prepare_process()
    assert machine.os.environ.get("TORCHINDUCTOR_CACHE_DIR") == (folder and str(tmp_path / folder))
