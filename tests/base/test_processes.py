"""Work over processes: order, one process or two, and a worker that dies."""

import os
import signal

import pytest

from groundup.base.log import Log
from groundup.base.processes import map_in_order


def double(values):
    return [2 * value for value in values]


def die_in_a_worker(values):
    if os.environ.get("GROUNDUP_TEST_PARENT") != str(os.getpid()) and values == [3]:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(values)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_batches(num_workers):
    batches = [[number] for number in range(12)]
    found = list(map_in_order(double, iter(batches), num_workers, Log(quiet=True)))
    assert found == [([number], [2 * number]) for number in range(12)]


def test_a_worker_that_dies_loses_nothing(monkeypatch, capsys):
    monkeypatch.setenv("GROUNDUP_TEST_PARENT", str(os.getpid()))
    batches = [[number] for number in range(9)]
    found = [result for _, result in map_in_order(die_in_a_worker, batches, 2, Log())]
    assert found == [[2 * number] for number in range(9)]
    assert "W-WORKER-LOST" in capsys.readouterr().err


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(TypeError):
        list(map_in_order(double, [[1], [None]], 2, Log(quiet=True)))
