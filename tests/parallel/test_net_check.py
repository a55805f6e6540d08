"""`groundup doctor net`: what it measures, and that the rank which is wrong is the one that is named."""

import os
import socket
import subprocess
import sys

import pytest

from groundup.parallel.net_check import Facts, NetReport, facts_of_machine, refuse_slow, report_lines, slow_ranks

pytestmark = pytest.mark.end_to_end
COMMAND = [sys.executable, "-P", "-m", "groundup", "doctor", "net"]


def doctor(*arguments, failpoint="", launcher=(), **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GROUNDUP_FAILPOINT": failpoint} | variables
    command = [*launcher, *(COMMAND[3:] if launcher else COMMAND), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.costly
def test_a_good_network_is_measured():
    done = doctor("--nproc", "3")
    assert done.returncode == 0, done.stderr
    assert all(f"  rank {rank} " in done.stdout for rank in range(3)) and socket.gethostname() in done.stdout
    assert "all-reduce of 8 bytes" in done.stdout and "SLOW" not in done.stdout


@pytest.mark.costly
def test_a_slow_rank_is_named():
    done = doctor("--nproc", "4", failpoint="net.message:slow:26:2")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 6 and last.startswith("ERROR E-NET-SLOW: rank 2 (on "), done.stderr
    assert done.stdout.count("SLOW") == 1


@pytest.mark.costly
@pytest.mark.parametrize(
    ("failpoint", "says"),
    [
        ("net.message:kill:3:1", "ERROR E-RANK-LOST: rank 1 (pid "),
        ("net.message:stall:3:1", "ERROR E-NET-RANK: rank 1 on "),
        ("net.meet:stall:1:1", "ERROR E-NET-RANK: rank 1 on "),
    ],
)
def test_a_rank_that_dies_or_says_nothing_is_named(failpoint, says):
    done = doctor("--nproc", "3", "--patience", "8", failpoint=failpoint)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 6 and last.startswith(says), done.stderr


@pytest.mark.slow
def test_under_torchrun_a_dead_rank_is_named_too():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]
    done = doctor("--patience", "4", launcher=launcher)
    assert done.returncode == 0 and "rank 2 " in done.stdout, done.stderr
    done = doctor("--patience", "4", launcher=launcher, failpoint="net.message:stall:3:2")
    assert done.returncode and "E-NET-RANK: rank 2 on " in done.stderr, done.stderr


@pytest.mark.costly
def test_a_rank_that_does_not_come_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = doctor("--patience", "2", RANK="0", LOCAL_RANK="0", **world)
    assert done.returncode == 6 and "E-NET-RANK: rank 1 does not answer in the rendezvous, for 2 s" in done.stderr
    done = doctor("--patience", "2", RANK="1", LOCAL_RANK="0", **world)
    assert done.returncode == 6 and "E-NET-MEET: rank 1 " in done.stderr and f"127.0.0.1:{port}" in done.stderr


@pytest.mark.costly
def test_an_interface_that_is_not_there_is_named_before_anything_is_sent():
    done = doctor("--nproc", "2", "--patience", "8", GLOO_SOCKET_IFNAME="nowhere0")
    host = socket.gethostname()
    assert done.returncode == 6 and done.stderr.splitlines() == [
        f"ERROR E-NET-INTERFACE: rank 0 (on {host}) has no interface GLOO_SOCKET_IFNAME=nowhere0. Name one that "
        "`ip link` shows there, or unset the variable"
    ]


def test_an_interface_that_is_not_there_is_seen():
    assert facts_of_machine({"GLOO_SOCKET_IFNAME": "nowhere0"}).missing_interfaces == ["GLOO_SOCKET_IFNAME"]
    for wanted in ("lo", "=lo", "^eth9", "eth9,lo"):
        assert facts_of_machine({"NCCL_SOCKET_IFNAME": wanted}).missing_interfaces == [], wanted


def test_slow_is_against_the_others():
    assert slow_ranks([0.01, 0.012, 0.5, 0.011]) == [2]
    assert slow_ranks([0.01, 0.03, 0.02, 0.011]) == [] and slow_ranks([0.01]) == []


def test_what_is_odd_about_a_machine_is_in_its_line():
    facts = [Facts("a", "10.0.0.1", {"GLOO_SOCKET_IFNAME": "eth0"}, [], 8 << 30), Facts("b", "", {}, [], 64 << 20)]
    said = []
    report_lines(NetReport(facts, 0.5, 1e-4, 2e9, [0.01, 0.1], [1]), said.append)
    assert "GLOO_SOCKET_IFNAME=eth0" in said[0] and "SMALL" not in said[0]
    assert "DOES NOT RESOLVE" in said[1] and "SMALL" in said[1] and said[1].endswith("SLOW")
    with pytest.raises(Exception, match=r"E-NET-SLOW: rank 1 \(on b\) takes 10x"):
        refuse_slow(NetReport(facts, 0.5, 1e-4, 2e9, [0.01, 0.1], [1]))
