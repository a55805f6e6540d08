"""A run's store with tiny tensors."""

from collections import Counter

import pytest

from groundup.base import failpoints
from groundup.proof.tiny_store import TinyStore


@pytest.fixture(autouse=True)
def fresh_failpoints(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", Counter())


@pytest.fixture
def kit(tmp_path):
    return TinyStore(tmp_path / "run" / "checkpoints")
