"""Failpoints fail at the passage that was asked for, and never without being asked."""

import errno
import subprocess
import sys

import pytest

from groundup.base import failpoints
from groundup.base.failpoints import VARIABLE, reach


@pytest.fixture(autouse=True)
def no_passages_yet(monkeypatch):
    monkeypatch.setattr(failpoints, "_passages", type(failpoints._passages)())
    monkeypatch.delenv(VARIABLE, raising=False)


def test_nothing_happens_unasked():
    assert reach("x") is False


def test_only_the_named_point_fails_at_its_nth_passage(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x:raise:2")
    reach("y")
    reach("x")
    with pytest.raises(RuntimeError, match="failpoint x"):
        reach("x")
    reach("x")


def test_enospc_is_a_full_disk(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x:enospc:1")
    with pytest.raises(OSError, match="No space") as caught:
        reach("x")
    assert caught.value.errno == errno.ENOSPC


def test_stall_sleeps(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv(VARIABLE, "x:stall:1")
    reach("x")
    assert slept == [3600]


def test_unknown_action_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x:explode:1")
    with pytest.raises(ValueError, match="explode"):
        reach("x")


def test_kill_is_sigkill():
    program = "from groundup.base.failpoints import reach; reach('x'); print('alive')"
    answer = subprocess.run([sys.executable, "-c", program], env={VARIABLE: "x:kill:1"}, capture_output=True)
    assert (answer.returncode, answer.stdout) == (-9, b"")


def test_a_rank_can_be_named(monkeypatch):
    monkeypatch.setenv(VARIABLE, "x:raise:1:1")
    reach("x")
    monkeypatch.setenv("RANK", "0")
    reach("x")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="failpoint x"):
        reach("x")
