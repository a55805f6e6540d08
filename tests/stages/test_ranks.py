"""Commands on two ranks: the same bits again, after a lost rank, and under torchrun."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groundup.base.files import read_json

from .conftest import Said, groundup, model_hashes
from .wires import connections_of, let_all_in, let_nothing_in

pytestmark = pytest.mark.end_to_end
COMMAND = [sys.executable, "-P", "-m", "groundup"]


@pytest.fixture(scope="module")
def tokens(way, tmp_path_factory):
    """A folder with a run in which everything before pretraining is done."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("corpus", "tokenizer", "tokens"):
        shutil.copytree(way / "runs" / "tiny" / name, folder / "tiny" / name)
    (folder / "tiny" / ".groundup-run").touch()
    return way / "tiny.yaml", folder


class Ranks:
    """Runs commands on two ranks, each in runs of its own."""

    def __init__(self, recipe: Path, made: Path, folder: Path) -> None:
        self.recipe, self.made, self.folder = recipe, made, folder

    def start(self, name, *settings, failpoint="", launcher=COMMAND, data="2"):
        runs = self.folder / name
        if not runs.exists():
            shutil.copytree(self.made, runs)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GROUNDUP_FAILPOINT": failpoint}
        ranks = ["--parallel.data_replicate", data] if data else []
        return subprocess.Popen(
            [*launcher, "pretrain", self.recipe, "--runs-dir", runs, *ranks, *settings],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, name, *settings, **how):
        process = self.start(name, *settings, **how)
        out, err = process.communicate(timeout=180)
        return Said(process.returncode, out, err)

    def bits(self, name):
        stage = self.folder / name / "tiny" / "pretrain"
        metrics = hashlib.sha256((stage / "metrics.jsonl").read_bytes()).hexdigest()
        hashes = model_hashes(self.folder / name / "tiny")
        assert "pretrain/model/model.safetensors" in hashes
        return metrics, hashes


@pytest.fixture
def ranks(tokens, tmp_path):
    return Ranks(*tokens, tmp_path)


@pytest.fixture(scope="module")
def unbroken(tokens, tmp_path_factory):
    """Bits of an unbroken run on two ranks."""
    ranks = Ranks(*tokens, tmp_path_factory.mktemp("unbroken"))
    said = ranks.run("runs")
    assert said.code == 0 and ", 2 ranks" in said.out and not said.err, said
    summary = read_json(ranks.folder / "runs" / "tiny" / "pretrain" / "summary.json")
    assert summary["ranks"] == 2 and summary["exact"] is True
    return ranks.bits("runs")


def test_a_killed_rank_is_named_and_the_end_has_the_bits_of_an_unbroken_run(ranks, unbroken):
    said = ranks.run("runs", failpoint="comm.pre:kill:5:1")
    assert said.code == 0, said
    assert "W-RESTART: E-RANK-LOST: rank 1 (pid " in said.err and ") signal 9 at step 4." in said.err
    assert "goes on from step 4 of 6" in said.out
    assert ranks.bits("runs") == unbroken


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install groundup[deepspeed]"
)
SHARDED = {
    "fsdp": ["--parallel.data_shard", "2"],
    "zero1": ["--parallel.data_shard", "2", "--parallel.engine", "deepspeed", "--parallel.shard", "optimizer"],
    "zero3": ["--parallel.data_shard", "2", "--parallel.engine", "deepspeed"],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(how, marks=() if how == "fsdp" else needs_deepspeed) for how in SHARDED])
def test_a_killed_rank_of_shards_is_named_and_the_end_is_that_of_an_unbroken_run(ranks, how):
    """Both hold parts of every weight: what the one saved is worth nothing without what the other did."""
    settings = [*SHARDED[how], "--pretrain.optimizer", "adamw"]
    assert (said := ranks.run("whole", *settings, data="")).code == 0 and not said.err, said
    said = ranks.run("runs", *settings, failpoint="comm.pre:kill:5:1", data="")
    assert said.code == 0 and "W-RESTART: E-RANK-LOST: rank 1 (pid " in said.err, said
    assert ranks.bits("runs") == ranks.bits("whole")
    process = ranks.start("late", *settings, "--parallel.max_restarts", "0", failpoint="run.validate:slow:1", data="")
    metrics = ranks.folder / "late" / "tiny" / ".attempts" / "pretrain" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    began = time.monotonic()
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6 and "E-RANK-LOST: rank 1" in err and time.monotonic() - began < 5
    assert ranks.run("late", *settings, data="").code == 0
    assert ranks.bits("late") == ranks.bits("whole")


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_alone_on_one_rank(ranks):
    """Its offload is for one GPU too."""
    settings = ["--pretrain.optimizer", "adamw"]
    zero = ["--parallel.engine", "deepspeed", "--parallel.cpu_offload", "true"]
    said = ranks.run("zero", *settings, *zero, data="")
    assert said.code == 0 and not said.err, said
    assert ranks.run("plain", *settings, data="1").code == 0
    losses = [
        [json.loads(line)["loss"] for line in (ranks.folder / name / "tiny" / "pretrain" / "metrics.jsonl").open()]
        for name in ("zero", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_ranks_that_share_the_weights_begin_again_from_their_pieces(ranks):
    mesh = ["--parallel.data_replicate", "1", "--parallel.data_shard", "2", "--pretrain.precision", "fp32"]
    assert ranks.run("whole", *mesh, data="").code == 0
    said = ranks.run("runs", *mesh, data="", failpoint="comm.pre:kill:5:1")
    assert said.code == 0 and "W-RESTART: E-RANK-LOST: rank 1 (pid " in said.err, said
    assert re.search("goes on from step [24] of 6", said.out), "the save at step 4 may not have been through"
    assert ranks.bits("runs") == ranks.bits("whole")


@pytest.mark.slow
def test_an_error_of_a_rank_is_the_last_line_and_the_only_one(ranks):
    said = ranks.run("runs", failpoint="comm.pre:raise:2:1")
    assert said.code == 1 and said.err.splitlines()[-1] == "RuntimeError: failpoint comm.pre", said
    assert "E-RANK" not in said.err and said.err.count("Traceback") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint",
    [
        *("engine.forward:kill:5:1", "engine.forward:kill:5:0", "comm.pre:kill:5:0"),
        *("ckpt.before_manifest:kill:2:0", "ckpt.after_manifest:kill:2:0", "run.validate:kill:2:0"),
        *("artifact.before_rename:kill:1:0", "artifact.after_rename:kill:1:0"),
    ],
)
def test_wherever_a_rank_is_killed_the_bits_are_the_same(ranks, unbroken, failpoint):
    said = ranks.run("runs", "--parallel.max_restarts", "0", failpoint=failpoint)
    assert said.code == 6 and said.err.startswith(f"ERROR E-RANK-LOST: rank {failpoint[-1]} (pid "), said
    assert ranks.run("runs").code == 0
    assert ranks.bits("runs") == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("where", ["ckpt.before_manifest", "run.validate"])
def test_the_other_rank_is_killed_while_rank_0_saves_or_looks(ranks, unbroken, where):
    process = ranks.start("runs", "--parallel.max_restarts", "0", failpoint=f"{where}:stall:1:0")
    metrics = ranks.folder / "runs" / "tiny" / ".attempts" / "pretrain" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    time.sleep(1)
    began = time.monotonic()
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6 and "E-RANK-LOST: rank 1" in err and time.monotonic() - began < 5
    assert ranks.run("runs").code == 0
    assert ranks.bits("runs") == unbroken


@pytest.mark.slow
def test_a_stopped_rank_is_named_within_15_seconds(ranks, unbroken):
    process = ranks.start("runs", "--parallel.max_restarts", "0", failpoint="run.validate:stall:1:0")
    metrics = ranks.folder / "runs" / "tiny" / ".attempts" / "pretrain" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    began = time.monotonic()
    os.kill(children_of(process.pid)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6 and "E-RANK-HUNG: rank 1" in err and time.monotonic() - began < 15
    assert ranks.run("runs").code == 0
    assert ranks.bits("runs") == unbroken


@pytest.fixture
def begun(ranks):
    """Starts a run on two ranks; gives its process and rank 1's once the first steps are done."""

    def begin(*settings):
        process = ranks.start("runs", *settings, failpoint="run.validate:slow:1")
        metrics = ranks.folder / "runs" / "tiny" / ".attempts" / "pretrain" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        return process, children_of(process.pid)[1], metrics

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("how", ["network", "rank"])
def test_what_stands_still_and_comes_back_costs_time_alone(ranks, unbroken, begun, how):
    process, rank, metrics = begun("--parallel.max_restarts", "0")
    with connections_of(rank) as connections:
        for connection in connections:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if how == "network":
                let_nothing_in(connection)
        if how == "rank":
            os.kill(rank, signal.SIGSTOP)
        time.sleep(2)
        before = metrics.read_bytes()
        time.sleep(3)
        assert metrics.read_bytes() == before and process.poll() is None, "it went on without the other rank"
        os.kill(rank, signal.SIGCONT)
        if how == "network":
            for connection in connections:
                let_all_in(connection)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "E-RANK" not in err, err
    assert ranks.bits("runs") == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "away for good"])
def test_a_network_that_does_not_come_back_is_a_lost_rank(ranks, unbroken, begun, how):
    process, rank, _ = begun()
    with connections_of(rank) as connections:
        for connection in connections:
            if how == "cut":
                connection.shutdown(socket.SHUT_RDWR)
            else:
                # the time is the kernel's to keep: here it has less
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3_000)
                let_nothing_in(connection)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "W-RESTART: E-RANK-GONE: another rank cannot be reached" in err and err.count("W-RESTART") == 1
    assert ranks.bits("runs") == unbroken


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(ranks, unbroken):
    process = ranks.start("runs", failpoint="run.validate:stall:2:0")
    # rank 0 stalls at the last look: until then, the signal comes at some step
    metrics = ranks.folder / "runs" / "tiny" / ".attempts" / "pretrain" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.count("\n") == 1, err
    assert ranks.run("runs").code == 0
    assert ranks.bits("runs") == unbroken


ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", *ACCELERATE, "--dynamo_backend", "no"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_give_the_same_bits(ranks, unbroken, launcher):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "groundup"]
    said = ranks.run("runs", launcher=command, data="")
    assert said.code == 0 and ", 2 ranks" in said.out, said
    assert ranks.bits("runs") == unbroken


@pytest.mark.slow
def test_ranks_with_other_settings_are_named_before_the_first_step(ranks):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shutil.copytree(ranks.made, ranks.folder / "runs")
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                *COMMAND,
                "pretrain",
                ranks.recipe,
                "--runs-dir",
                ranks.folder / "runs",
                "--pretrain.lr",
                str(1e-3 + rank),
            ],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 6 and "E-RANK-MISMATCH: rank 1 differs from rank 0 in 'pretrain.lr': 1.001" in err
    assert not (ranks.folder / "runs" / "tiny" / ".attempts").exists()


@pytest.mark.slow
def test_the_whole_way_on_two_ranks_and_then_on_one(way, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "run", way / "tiny.yaml", "--runs-dir", tmp_path, "--parallel.data_replicate", "2"]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode == 0
    said = groundup("run", way / "tiny.yaml", "--runs-dir", tmp_path)
    assert said.code == 0 and said.out.count("unchanged") == 10, "the number of ranks is no key"


def test_a_recipe_fault_is_told_once_and_before_any_rank(way, tmp_path):
    said = groundup("pretrain", way / "tiny.yaml", "--runs-dir", tmp_path, "--parallel.data_replicate", "0")
    assert said.code == 2 and "parallel.data_replicate" in said.err and said.err.count("\n") == 1


def children_of(pid: int) -> list[int]:
    """Processes that a launcher started, in their order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
