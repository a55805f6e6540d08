"""Micro-batches side by side: the same sums, the same bits, bounded memory."""

import threading
import time

import pytest
import torch

from groundup.train.lanes import Lanes


@pytest.fixture(autouse=True)
def threads_of_torch():
    """Lanes divide the process's compute threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_lanes_share_the_threads_and_leave_the_callers_alone():
    lanes = Lanes(2)
    assert torch.get_num_threads() == 4
    assert list(lanes.map(lambda _: torch.get_num_threads(), range(5))) == [2] * 5
    assert torch.get_num_threads() == 4


def test_results_come_in_order_whoever_is_done_first():
    lanes = Lanes(3)
    assert list(lanes.map(lambda part: time.sleep(0.02 * (3 - part % 3)) or part, range(9))) == list(range(9))


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_no_more_than_a_lane_each_is_at_work_or_waits(num_lanes):
    begun, taken = [], []
    for part in Lanes(num_lanes).map(lambda part: begun.append(part) or part, range(12)):
        time.sleep(0.005)
        taken.append(part)
        assert len(begun) - len(taken) < num_lanes + (num_lanes > 1)
    assert taken == list(range(12))


def test_lanes_work_at_the_same_time():
    meeting = threading.Barrier(2)
    assert sorted(Lanes(2).map(lambda _: meeting.wait(timeout=10), range(2))) == [0, 1]


def test_an_error_in_a_lane_is_raised_to_the_caller():
    def fail(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        list(Lanes(2).map(fail, range(3)))


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_merging_goes_in_order_one_at_a_time_in_the_lane_that_computed(num_lanes):
    merged, merging = [], threading.Lock()

    def compute(part):
        time.sleep(0.01 * (num_lanes - part % num_lanes))  # the first of each round is done last
        return part, threading.get_ident()

    def merge(found):
        part, thread = found
        assert thread == threading.get_ident() and merging.acquire(blocking=False)
        merged.append(part)
        merging.release()

    Lanes(num_lanes).fold(compute, merge, range(9))
    assert merged == list(range(9))


@pytest.mark.parametrize("failing", ["compute", "merge", "parts"])
def test_after_an_error_nothing_more_is_merged_and_nobody_waits(failing):
    merged, has_merged = [], threading.Event()

    def compute(part):
        if failing == "compute" and part == 1:
            assert has_merged.wait(10)  # or part 0 may find the turns over
            raise ValueError("at 1")
        return part

    def merge(part):
        if failing == "merge" and part == 1:
            raise ValueError("at 1")
        merged.append(part)
        has_merged.set()

    def parts():
        yield from (0, 1, 2)
        if failing == "parts":
            raise ValueError("at 1")
        yield from (3, 4, 5)

    with pytest.raises(ValueError, match="at 1"):
        Lanes(3).fold(compute, merge, parts())
    assert merged == ([0, 1, 2] if failing == "parts" else [0])
