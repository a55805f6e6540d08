"""The network between ranks, tried before a run has to rely on it: meeting, latency, bandwidth, and which rank is wrong."""

import json
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from groundup.base.errors import DistributedError
from groundup.base.failpoints import reach
from groundup.parallel.connections import INTERFACES, missing_interfaces, no_interface
from groundup.parallel.rank import LAUNCHER_PID, LISTEN_FD
from groundup.parallel.world import World

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

SHARED_MEMORY = "/dev/shm"
LEAST_SHARED_MEMORY = 1 << 30
"""Below it NCCL and loaders of data that share tensors may fail; a container has 64 MiB where nobody asked for more."""
SMALL, LARGE = 8, 16 << 20
"""Bytes of the messages that show latency and bandwidth."""
NUM_SMALL, NUM_LARGE = 20, 5
MOST_PARTNERS = 3
"""Ranks that each rank exchanges messages with, besides what all do together."""
ROUNDS = 2
"""With each of them, each way: the best counts, so that a moment's other work on a machine does not."""
SLOW_RATIO = 4.0
"""Times the median of the other ranks' best exchange, from which on a rank is called slow."""
ANSWER_SECONDS = 5.0
"""For ranks that are there to say so, when one of them does not answer."""


@dataclass(frozen=True)
class Facts:
    """What a rank knows of its machine by itself."""

    host: str
    address: str
    """What the machine's own name resolves to; empty where it does not."""
    interfaces: Mapping[str, str]
    """Those that are asked for, by variable."""
    missing_interfaces: Sequence[str]
    """Those of them that this machine does not have."""
    shared_memory: int
    """Bytes of /dev/shm; 0 where there is none."""


@dataclass(frozen=True)
class NetReport:
    """What was found, the same on every rank."""

    facts: Sequence[Facts]
    meeting_seconds: float
    latency_seconds: float
    """Of an all-reduce of eight bytes, median."""
    bytes_a_second: float
    """Sent by each rank while a large tensor is summed, as a ring does it."""
    best_exchange: Sequence[float]
    """By rank: seconds to send a large message and get one, with the partner it was fastest with."""
    slow: Sequence[int]
    """Ranks whose best exchange is many times that of the others."""


def facts_of_machine(environment: Mapping[str, str] = os.environ) -> Facts:
    """Facts of this machine, none of which needs another rank."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    asked = {name: environment[name] for name in INTERFACES if environment.get(name)}
    missing = missing_interfaces(environment)
    try:
        shared = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        shared = 0
    return Facts(host, address, asked, missing, shared)


def check_net(world: World, *, patience_seconds: float) -> NetReport:
    """Meet the other ranks and measure. Raises DistributedError, on every rank that is there, naming those that do not come,
    do not answer in time, or ask for an interface that their machine does not have. Collective."""
    import torch.distributed as dist

    facts = facts_of_machine()
    began = time.perf_counter()
    store = _meet(world, facts, patience_seconds)
    with _named(store, world, "the rendezvous", patience_seconds):
        reach("net.meet")
        everyone = [Facts(**json.loads(store.get(f"facts/{rank}"))) for rank in range(world.size)]
    _refuse_interfaces(everyone)  # before anything is sent over one
    with _named(store, world, "the rendezvous", patience_seconds):
        dist.init_process_group(
            "gloo", store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=patience_seconds)
        )
    try:
        meeting = max(world.gather(time.perf_counter() - began))
        with _named(store, world, "the all-reduce", patience_seconds):
            latency, rate = _all_reduce(world)
        with _named(store, world, "messages of pairs", patience_seconds):
            best = [float(seconds) for seconds in world.gather(_best_exchange(world))]
        return NetReport(everyone, meeting, latency, rate, best, slow_ranks(best))
    finally:
        dist.destroy_process_group()


def _meet(world: World, facts: Facts, patience_seconds: float) -> Any:
    """The store at which ranks meet, once all are there."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    listening = os.environ.pop(LISTEN_FD, None) if LAUNCHER_PID in os.environ else None
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = TCPStore(
            address,
            int(port),
            world.size,
            is_master=world.is_first and not has_agent,
            wait_for_workers=False,
            timeout=timedelta(seconds=patience_seconds),
            master_listen_fd=None if listening is None else int(listening),
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            "E-NET-MEET",
            what=f"rank {world.rank} ({facts.host}) does not reach the meeting place ({str(error).splitlines()[0][:160]})",
            where=f"{address}:{port}",
            next="see that the first machine is up, that its name resolves here and that no firewall closes the port",
        ) from None
    prefixed = PrefixStore(f"net-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _answer(prefixed, world, "facts", json.dumps(asdict(facts)))
    _answer(prefixed, world, "arrival", f"on {facts.host}")
    missing = _silent(prefixed, world, "arrival", patience_seconds)
    if missing:
        raise _does_not_answer(prefixed, missing, f"the rendezvous, for {patience_seconds:g} s")
    return prefixed


def _answer(store: "Store", world: World, phase: str, words: str = "") -> None:
    store.set(f"{phase}/{world.rank}", words or "here")


def _silent(store: "Store", world: World, phase: str, seconds: float) -> list[int]:
    """Ranks that have not answered after so long."""
    until = time.monotonic() + seconds
    missing = list(range(world.size))
    while missing:
        missing = [rank for rank in missing if not store.check([f"{phase}/{rank}"])]
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return missing


@contextmanager
def _named(store: "Store", world: World, phase: str, seconds: float) -> Iterator[None]:
    """A message that fails or takes too long inside: whoever is still there says so, the others are named."""
    try:
        yield
    except (RuntimeError, DistributedError) as error:
        try:
            _answer(store, world, phase)
            missing = _silent(store, world, phase, min(seconds, ANSWER_SECONDS))
            raise _does_not_answer(store, missing, phase) if missing else error
        except RuntimeError as lost:  # the store lies with the first rank, or with its agent
            if lost is error:
                raise
            time.sleep(ANSWER_SECONDS)  # it may have gone because it has named another: those words come first
            raise _does_not_answer(None, [0], phase) from None


def _does_not_answer(store: "Store | None", ranks: Sequence[int], phase: str) -> DistributedError:
    names = []
    for rank in ranks:
        key = f"arrival/{rank}"
        is_known = store is not None and store.check([key])
        names.append(f"rank {rank}" + (f" {store.get(key).decode()}" if is_known and store is not None else ""))
    return DistributedError(
        "E-NET-RANK",
        what=f"{', '.join(names)} does not answer in {phase}",
        next="look at that machine: whether the process runs there, its interface, its firewall",
    )


def _refuse_interfaces(everyone: Sequence[Facts]) -> None:
    for rank, facts in enumerate(everyone):
        for name in facts.missing_interfaces:
            raise no_interface(rank, facts.host, name, facts.interfaces[name])


def _all_reduce(world: World) -> tuple[float, float]:
    """Seconds of a small sum, and bytes that a rank sends a second in large ones."""
    import torch
    import torch.distributed as dist

    def seconds(num_bytes: int, times: int) -> float:
        tensor = torch.zeros(num_bytes // 4)
        dist.all_reduce(tensor)
        took = []
        for _ in range(times):
            reach("net.message")
            began = time.perf_counter()
            dist.all_reduce(tensor)
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    small, large = (max(world.gather(seconds(*sizes))) for sizes in ((SMALL, NUM_SMALL), (LARGE, NUM_LARGE)))
    return small, 2 * (world.size - 1) / world.size * LARGE / large


def _best_exchange(world: World) -> float:
    """Seconds to send a large message and get one, with the partner that it goes fastest with."""
    import torch

    mine, theirs = torch.zeros(LARGE // 4), torch.empty(LARGE // 4)
    best = float("inf")
    for distance in range(1, 1 + min(MOST_PARTNERS, world.size - 1)):
        to, source = (world.rank + distance) % world.size, (world.rank - distance) % world.size
        for partners in ROUNDS * (((to, mine), (source, theirs)), ((source, mine), (to, theirs))):
            best = min(best, _exchange(world, *partners))
    return best


def _exchange(world: World, send: "tuple[int, Tensor]", receive: "tuple[int, Tensor]") -> float:
    import torch.distributed as dist

    world.barrier()
    began = time.perf_counter()
    coming = dist.irecv(receive[1], receive[0])
    reach("net.message")
    going = dist.isend(send[1], send[0])
    own = _wait(going) - began
    assert coming is not None
    coming.wait()
    return max(own, 1e-9)


def _wait(work: Any) -> float:
    work.wait()
    return time.perf_counter()


def slow_ranks(best_exchange: Sequence[float]) -> list[int]:
    """Ranks that are many times slower than the median of the others, even with the partner that suits them best."""
    found = []
    for rank, seconds in enumerate(best_exchange):
        others = [other for number, other in enumerate(best_exchange) if number != rank]
        if others and seconds > SLOW_RATIO * statistics.median(others):
            found.append(rank)
    return found


def report_lines(report: NetReport, say: Callable[[str], None]) -> None:
    """The report in lines, warnings among them."""
    for rank, facts in enumerate(report.facts):
        chosen = ", ".join(f"{name}={value}" for name, value in facts.interfaces.items()) or "interface: torch's choice"
        address = facts.address or "ITS OWN NAME DOES NOT RESOLVE"
        say(
            f"  rank {rank:<4} {facts.host} ({address}), {chosen}, {SHARED_MEMORY} {facts.shared_memory / (1 << 30):.1f} GiB"
            f"{'' if facts.shared_memory >= LEAST_SHARED_MEMORY else ', SMALL: give the container more (--shm-size)'}"
            f", best exchange {1e3 * report.best_exchange[rank]:.1f} ms{'  SLOW' if rank in report.slow else ''}"
        )
    say(
        f"  met in {report.meeting_seconds:.1f} s; all-reduce of {SMALL} bytes {1e6 * report.latency_seconds:,.0f} µs, of "
        f"{LARGE >> 20} MiB {report.bytes_a_second / 1e9:.2f} GB/s sent by each rank, over gloo"
    )


def refuse_slow(report: NetReport) -> None:
    """Raise DistributedError that names the ranks that are slow."""
    if report.slow:
        rank = report.slow[0]
        others = [seconds for number, seconds in enumerate(report.best_exchange) if number not in report.slow]
        raise DistributedError(
            "E-NET-SLOW",
            what=f"rank {rank} (on {report.facts[rank].host}) takes {report.best_exchange[rank] / statistics.median(others):.0f}x "
            "the median of the others for a message",
            next="look at that machine: its link, its interface, who else uses it; a run waits for the slowest rank",
        )
