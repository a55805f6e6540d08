"""What ranks say to each other, on two of them and on one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groundup.base.errors import ConfigError
from groundup.parallel.connections import watch_connections
from groundup.parallel.world import World

WORK = Path(__file__).with_name("work_of_ranks.py")
ODD_VALUES = [None, "", "三百首 \0", [1.5, {"a": [None]}], {"long": "x" * 70_000}, 0]


@pytest.mark.parametrize("index", range(len(ODD_VALUES)))
@pytest.mark.costly
def test_small_values_reach_every_rank(on_two_ranks, index):
    values = [ODD_VALUES[index], ODD_VALUES[-1 - index]]
    expected = {"broadcast": values[0], "gather": values, "any": True, "none": False, "sums": [1, 2, 1 << 41]}
    assert on_two_ranks(WORK, "say", values) == [{"value": expected}] * 2


@pytest.mark.parametrize("bucket_elements", [1, 7, 30, 1 << 20])
def test_gradients_are_summed_whatever_the_bucket(on_two_ranks, bucket_elements):
    shapes = [[3, 4], [5], [], [2, 3, 2], [40], [6, 2]]
    parts = []
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        parts.append([torch.randn(shape, generator=generator) for shape in shapes])
    expected = [(one + other).flatten().tolist() for one, other in zip(*parts, strict=True)]
    assert on_two_ranks(WORK, "reduce", shapes, bucket_elements) == [{"value": expected}] * 2


def test_ranks_that_run_other_things_are_named(on_two_ranks):
    same = {"lr": 1e-3, "torch": "2.13", "tokenizer": "ab"}
    assert on_two_ranks(WORK, "compare_facts", [same, same]) == [{"value": "same"}] * 2
    for other, key in (({**same, "lr": 2e-3}, "lr"), ({"lr": 1e-3, "torch": "2.13"}, "tokenizer")):
        for answer in on_two_ranks(WORK, "compare_facts", [same, other]):
            assert answer["error"].startswith(f"E-RANK-MISMATCH: rank 1 differs from rank 0 in '{key}': ")


def test_one_flipped_bit_is_found_and_named(on_two_ranks):
    assert on_two_ranks(WORK, "compare_weights", "") == [{"value": "same"}] * 2
    for answer in on_two_ranks(WORK, "compare_weights", "h.3.w"):
        assert answer["error"].startswith(
            "E-DIVERGED: rank 1 holds other weights than rank 0, first in h.3.w at step 300."
        )


MEETINGS = """
import time
from groundup.parallel.connections import watch_connections
from groundup.parallel.world import World
world = World.from_environment()
for number in range(4):
    time.sleep(0.5 * (number % 2 == world.rank))  # each comes first in its turn
    with world.connected():
        assert world.gather(world.rank) == [0, 1]
"""


@pytest.mark.costly
@pytest.mark.parametrize("has_agent_store", ["1", "0"])
def test_a_meeting_reads_no_addresses_of_an_earlier_one(tmp_path, has_agent_store):
    script = tmp_path / "meet.py"
    script.write_text(MEETINGS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": has_agent_store}
    ended = subprocess.run([*torchrun, script], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_one_rank_needs_no_group():
    world = World()
    with world.connected():
        assert world.is_first and world.broadcast([1]) == [1] and world.gather("a") == ["a"]
        assert world.sum_counts([3]) == [3] and world.any(True) and not world.any(False)
        gradient = torch.ones(2)
        world.all_reduce_gradients([gradient])
        world.barrier()
        assert gradient.tolist() == [1, 1] and not torch.distributed.is_initialized()


def test_the_world_is_read_from_torchruns_variables():
    whole = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    whole |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    world = World.from_environment(whole)
    assert (world.rank, world.size, world.local_rank, world.num_local, world.is_first) == (3, 4, 1, 2, False)
    assert World.from_environment({}).size == World.from_environment({"WORLD_SIZE": "1"}).size == 1
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(ConfigError, match=rf"E-CONFIG-WORLD: WORLD_SIZE=4 is set, but {name} is missing"):
            World.from_environment({key: value for key, value in whole.items() if key != name})
    with pytest.raises(ConfigError, match=r"E-CONFIG-WORLD.*'many'"):
        World.from_environment(whole | {"RANK": "many"})


@pytest.mark.skipif(sys.platform != "linux", reason="connections are found in /proc")
def test_connections_are_looked_at_where_nothing_is_under_way():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        watch_connections()
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        first, each, num = (one.getsockopt(socket.IPPROTO_TCP, option) for option in options)
        assert first + num * each == 120
