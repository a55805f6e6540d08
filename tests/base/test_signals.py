"""Signals: an interrupt, a wish, or an end at the deadline."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from groundup.base.signals import SIGNALS, StopRequest, stop_request


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.costly
def test_where_nothing_polls_a_signal_interrupts(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_request() as stop:
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_where_work_polls_it_is_a_wish(number):
    with stop_request() as stop, stop.polled(lambda: ""):
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.is_asked()


def test_a_second_interrupt_is_not_polled():
    with pytest.raises(KeyboardInterrupt), stop_request() as stop, stop.polled(lambda: ""):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_the_outer_request_is_the_process_s():
    with stop_request() as outer, stop_request() as inner:
        assert inner is outer
    with stop_request() as another:
        assert another is not outer


def run_deaf(work, *, grace=0.3, save=60.0, send=(signal.SIGTERM,)):
    """A process whose main thread sits in one long call; (exit code, stderr, seconds from the signal to the end)."""
    code = f"""
    import ctypes, os, signal, sys, time
    from groundup.base.signals import StopRequest
    def sit():
        print("sits", flush=True)
        while True:
            ctypes.CDLL(None).poll(None, 0, 60000)  # no bytecode until it returns, and then at once again
    with StopRequest(grace_seconds={grace}, save_seconds={save}) as stop:
        {work}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "sits\n"
    began = time.monotonic()
    for number in send:
        process.send_signal(number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors, time.monotonic() - began


POLLED = "with stop.polled(lambda: 'everything is saved'): sit()"


def test_what_does_not_end_in_time_is_saved_and_ended():
    code, errors, seconds = run_deaf(POLLED)
    assert code == 75 and 0.25 < seconds < 10
    assert errors == "E-PREEMPTED: stopped by SIGTERM; everything is saved. Run the same command again to go on\n"


def test_a_rescue_that_fails_does_not_keep_the_process():
    code, errors, _ = run_deaf("with stop.polled(lambda: 1 / 0): sit()")
    assert code == 75 and "the last save stands, another was not possible (division by zero)" in errors


@pytest.mark.costly
def test_a_save_that_takes_longer_is_waited_for():
    rescue = "lambda: time.sleep(1.5) or 'everything is saved'"
    code, errors, seconds = run_deaf(f"with stop.polled({rescue}): sit()", grace=0.2, save=20)
    assert code == 75 and "everything is saved" in errors and 1.5 < seconds < 10


def test_a_save_that_never_ends_is_left():
    code, errors, seconds = run_deaf("with stop.polled(lambda: time.sleep(60)): sit()", grace=0.2, save=0.5)
    assert code == 75 and "took more than 0.5 s; the last one stands" in errors and 0.6 < seconds < 10


def test_a_rescue_that_waits_for_others_ends_with_the_work():
    with StopRequest(grace_seconds=0.05, save_seconds=30) as stop, stop.polled(lambda: stop.wait_until_over() or ""):
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # the rescue waits by now, for a barrier to be passed
    assert time.monotonic() - began < 5


def test_a_second_interrupt_ends_a_deaf_process_without_a_rescue():
    work = "with stop.polled(lambda: time.sleep(60)): sit()"
    code, _, seconds = run_deaf(work, grace=60, send=(signal.SIGINT, signal.SIGINT))
    assert code in (75, 1, -signal.SIGINT) and seconds < 5


def test_repeated_signals_do_not_move_the_deadline():
    code, _, seconds = run_deaf(POLLED, grace=0.6, send=(signal.SIGTERM,) * 12)
    assert code == 75 and seconds < 2


def test_a_hangup_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stop.is_asked()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_ends_in_time_is_left_alone():
    with StopRequest(grace_seconds=0.05) as stop, stop.polled(lambda: pytest.fail("was rescued")):
        os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.1)
    assert stop.name == "SIGHUP"
