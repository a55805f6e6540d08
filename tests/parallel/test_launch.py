"""Who starts the ranks and watches them: causes named, the others ended, no process left. The ranks here are scripts."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from groundup.base.log import Log
from groundup.parallel import launch as launching
from groundup.parallel.config import ParallelConfig
from groundup.parallel.launch import launch
from groundup.parallel.rank import BEAT_SECONDS

pytestmark = pytest.mark.end_to_end  # whole processes, seconds each

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from groundup.parallel.rank import launcher_reports
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
reports = launcher_reports()
begun = len(list(folder.glob(f"{rank}-*")))
(folder / f"{rank}-{os.getpid()}").write_text(" ".join(sys.argv[2:]))
reports.reached(4)
"""
WAIT = "\ntime.sleep(60)\n"
DEAF = """
if rank == {rank}:  # holds Python's lock: its heartbeat cannot see that nobody listens any more
    (folder / f"ready{{rank}}").touch()
    sys.setswitchinterval(60)
    end = time.time() + 15
    while time.time() < end: pass
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Launches a script on ranks; returns exit code, standard error and the seconds it took."""
    monkeypatch.setattr(launching, "BACKOFF_SECONDS", 0.05)

    def run(body, *, data=2, max_restarts=0, arguments=(), has_begun=True):
        prelude = PRELUDE if has_begun else PRELUDE.replace("reports.reached(4)", "reports.met()")
        command = [sys.executable, "-P", "-c", prelude + textwrap.dedent(body), str(tmp_path), *arguments]
        config = ParallelConfig(data_replicate=data, max_restarts=max_restarts)
        began = time.monotonic()
        code = launch(command, config, Log())
        return code, capfd.readouterr().err, time.monotonic() - began

    return run


def pids(folder: Path, rank: object = "*") -> list[int]:
    return [int(path.name.split("-")[1]) for path in sorted(folder.glob(f"{rank}-*"), key=os.path.getmtime)]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def assert_nobody_left(folder: Path) -> None:
    assert pids(folder)
    assert not [pid for pid in pids(folder) if is_there(pid)], "a rank, or its zombie, is left"


def test_ranks_that_end_well_end_the_launcher_well(run, tmp_path):
    code, err, _ = run("", data=3)
    assert (code, err) == (0, "") and len(pids(tmp_path)) == 3
    assert_nobody_left(tmp_path)


def test_a_killed_rank_is_named_and_the_others_are_ended(run, tmp_path):
    ends = """
    if rank == 1:
        while not (folder / "ready2").exists(): time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code, err, seconds = run(textwrap.dedent(ends) + DEAF.format(rank=2) + WAIT, data=3)
    (pid,) = pids(tmp_path, 1)
    assert code == 6 and err.startswith(f"ERROR E-RANK-LOST: rank 1 (pid {pid}) signal 9 at step 4. ")
    assert err.count("\n") == 1 and seconds < 5
    assert_nobody_left(tmp_path)


def test_workers_of_a_lost_rank_are_ended_too(run, tmp_path):
    body = """
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / f"worker-{child.pid}").touch()
    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    run(body)
    workers = pids(tmp_path, "worker")
    until = time.monotonic() + 5
    # they are nobody's children now: whoever adopts them may leave them as zombies
    while time.monotonic() < until and any(state_of(pid) not in ("Z", "") for pid in workers):
        time.sleep(0.05)
    assert workers and all(state_of(pid) in ("Z", "") for pid in workers)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_lost_ranks_begin_again_without_restart_and_only_so_often(run, tmp_path):
    body = "if rank == 1 and begun < 2: os.kill(os.getpid(), signal.SIGKILL)\nif rank == 0: time.sleep(begun < 2)"
    code, err, _ = run(body, max_restarts=3, arguments=("--restart", "--seed", "1"))
    assert code == 0 and err.count("WARNING W-RESTART: E-RANK-LOST: rank 1") == 2 and "(2 of 3)" in err
    given = [(tmp_path / f"1-{pid}").read_text() for pid in pids(tmp_path, 1)]
    assert given == ["--restart --seed 1", "--seed 1", "--seed 1"]
    body = "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)" + WAIT
    code, err, _ = run(body, max_restarts=2)
    assert code == 6 and err.count("W-RESTART") == 2 and err.splitlines()[-1].startswith("ERROR E-RANK-LOST: rank 1")
    assert_nobody_left(tmp_path)


@pytest.mark.slow
def test_twenty_kills_in_a_minute_leave_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "BACKOFF_SECONDS", 1e-7)
    body = """
    if rank == 1 and begun < 20: os.kill(os.getpid(), signal.SIGKILL)
    while len(list(folder.glob("1-*"))) < 21: time.sleep(0.05)
    """
    code, err, seconds = run(body, max_restarts=20)
    assert code == 0 and err.count("WARNING W-RESTART: E-RANK-LOST: rank 1") == 20 and "(20 of 20)" in err
    assert len(pids(tmp_path, 1)) == 21 and seconds < 60
    assert_nobody_left(tmp_path)


def test_restart_is_asked_again_of_ranks_that_had_not_begun(run, tmp_path):
    """Else a first start that fails would leave what an earlier run made, and go on from it."""
    early = "if begun == 0 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.5 * (begun == 0))"
    code, _, _ = run(early, max_restarts=3, arguments=("--restart",), has_begun=False)
    assert code == 0 and [(tmp_path / f"1-{pid}").read_text() for pid in pids(tmp_path, 1)] == ["--restart"] * 2


@pytest.mark.slow
def test_a_rank_that_hangs_after_a_signal_was_stopped_by_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "SILENT_SECONDS", 1.0)
    body = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if rank == 0 else os.kill(os.getpid(), signal.SIGSTOP))
    if rank == 0: time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM)
    """
    code, err, _ = run(textwrap.dedent(body) + WAIT)
    assert code == 75, err
    assert_nobody_left(tmp_path)


def test_a_stopped_rank_is_named(run, tmp_path, monkeypatch):
    assert launching.SILENT_SECONDS + launching.IDLE_SECONDS + BEAT_SECONDS < 15
    monkeypatch.setattr(launching, "SILENT_SECONDS", 2.0)
    code, err, seconds = run("if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)" + WAIT)
    (pid,) = pids(tmp_path, 1)
    assert code == 6 and err.startswith(f"ERROR E-RANK-HUNG: rank 1 (pid {pid}) no sign of life for ") and seconds < 10
    assert_nobody_left(tmp_path)


def test_a_rank_at_work_is_not_taken_for_dead(run, monkeypatch):
    """The heartbeat's thread waits for Python's lock, which a library may hold for long."""
    monkeypatch.setattr(launching, "SILENT_SECONDS", 1.2)
    monkeypatch.setattr(launching, "IDLE_SECONDS", 0.6)
    # the lock goes to another thread after so many seconds: here it does not
    code, err, seconds = run("sys.setswitchinterval(60)\nend = time.time() + 3\nwhile time.time() < end: pass")
    assert (code, err) == (0, "") and seconds > 3


def test_only_the_words_of_the_first_to_fail_are_shown(run, tmp_path):
    body = """
    if rank == 1:
        reports.last_words("Traceback …\\nRuntimeError: rank 1 broke", has_lost_peer=False)
        sys.exit(1)
    time.sleep(0.3)
    reports.last_words("ERROR E-RANK-GONE: another rank cannot be reached", has_lost_peer=True)
    sys.exit(6)
    """
    for early in ("", "\nif rank == 1: time.sleep(1)\n"):  # also where the one that lost its peer is seen first
        code, err, _ = run(early + textwrap.dedent(body), max_restarts=3)
        assert (code, err) == (1, "Traceback …\nRuntimeError: rank 1 broke\n")
    assert_nobody_left(tmp_path)


def test_what_a_rank_wrote_before_it_died_is_not_lost(run):
    code, err, _ = run("if rank == 1: print('terminate called', file=sys.stderr, flush=True); os.abort()" + WAIT)
    assert code == 6 and "signal 6 at step 4 (terminate called)" in err
    code, err, _ = run("if rank == 1: sys.exit('no words')" + WAIT)
    assert (code, err) == (1, "no words\n")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_reaches_every_rank_once(tmp_path, number):
    body = """
    received = []
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, frame: received.append(number))
    (folder / f"ready{rank}").touch()
    while not received: time.sleep(0.05)
    time.sleep(0.3 + 0.5 * (rank == 0))
    (folder / f"got{rank}").write_text(str(received))
    reports.last_words(f"E-PREEMPTED: rank {rank}", has_lost_peer=False)
    sys.exit(75)
    """
    launcher = start_launcher(tmp_path, body)
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 75 and err.count("E-PREEMPTED") == 1 and err.count("\n") == 1
    assert all((tmp_path / f"got{rank}").read_text() == f"[{int(number)}]" for rank in range(2))
    assert_nobody_left(tmp_path)


def test_a_rank_that_a_signal_ends_without_saving_is_no_loss(tmp_path):
    launcher = start_launcher(tmp_path, "(folder / f'ready{rank}').touch()" + WAIT)
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=20)
    assert launcher.returncode == 75 and err.startswith("E-PREEMPTED: stopped by SIGTERM.")
    assert_nobody_left(tmp_path)


def test_ranks_die_with_their_launcher(tmp_path):
    launcher = start_launcher(tmp_path, DEAF.format(rank=1) + "(folder / f'ready{rank}').touch()" + WAIT)
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    launcher.kill()
    began = time.monotonic()
    launcher.wait()
    wait_for(lambda: all(state_of(pid) in ("Z", "") for pid in pids(tmp_path)))
    assert time.monotonic() - began < 5


def start_launcher(folder: Path, body: str) -> subprocess.Popen[str]:
    program = (
        "import sys\nfrom groundup.base.log import Log\nfrom groundup.parallel.config import ParallelConfig\n"
        "from groundup.parallel.launch import launch\n"
        "sys.exit(launch(sys.argv[1:], ParallelConfig(data_replicate=2), Log()))"
    )
    command = [sys.executable, "-P", "-c", PRELUDE + textwrap.dedent(body), str(folder)]
    return subprocess.Popen([sys.executable, "-P", "-c", program, *command], stderr=subprocess.PIPE, text=True)


def wait_for(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def test_ranks_meet_at_a_port_that_was_free(run, tmp_path):
    """The launcher holds the socket before any rank exists and hands it to rank 0."""
    body = """
    import socket
    (folder / f"port{rank}").write_text(os.environ["MASTER_PORT"])
    if rank == 0:
        found = socket.socket(fileno=int(os.environ["GROUNDUP_LISTEN_FD"]))
        assert found.getsockname()[1] == int(os.environ["MASTER_PORT"])
        found.accept()
    else:
        socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    """
    code, err, _ = run(body)
    assert (code, err) == (0, "") and (tmp_path / "port0").read_text() == (tmp_path / "port1").read_text()


def test_the_launcher_imports_no_torch():
    program = "import sys, groundup.parallel.launch, groundup.parallel.world; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
