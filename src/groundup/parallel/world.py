"""The ranks of a run and what they say to each other. One rank is the same path without a process group."""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from groundup.base.errors import ConfigError, DistributedError
from groundup.base.failpoints import reach
from groundup.parallel.config import Dim, ParallelConfig
from groundup.parallel.connections import missing_interfaces, no_interface, watch_connections
from groundup.parallel.mesh import TOKEN_DIMS, Mesh, degrees_of
from groundup.parallel.rank import LAUNCHER_PID, LISTEN_FD, PEER_LOST, Reports, launcher_reports

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

BUCKET_ELEMENTS = 1 << 22
"""Gradients that travel together: 16 MiB."""
# rank 0 may clean text for a day while the others wait; a dead rank is seen by its closed connections, a silent one by
# its heartbeat, a lost machine or network by `watch_connections`
PATIENCE = timedelta(days=30)
RENDEZVOUS = timedelta(minutes=10)


class World:
    """This process among its equals. Small values travel over gloo, gradients over nccl where they lie on CUDA."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        num_local: int = 1,
        reports: Reports | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank, self.num_local = rank, size, local_rank, num_local
        self._reports = reports
        self.mesh = Mesh({"data_replicate": size}, rank=rank)
        """How the ranks share the work; without a recipe that says otherwise, each holds the whole model."""
        self.parallel = ParallelConfig()
        self._store: Store | None = None
        self._num_meetings = 0

    def spread(self, config: ParallelConfig) -> None:
        """Spread the ranks as a recipe's section says. Raises ConfigError where its degrees do not make so many."""
        device_type = "cuda" if self.size > 1 and self._has_cuda() else "cpu"
        self.parallel = config
        self.mesh = Mesh(
            degrees_of(config, self.size), rank=self.rank, device_type=device_type, zero_stage=config.zero_stage
        )

    def _has_cuda(self) -> bool:
        """Whether each rank of this machine has a GPU of its own: ranks that would share one train on the CPU."""
        import torch

        return torch.cuda.is_available() and self.num_local <= torch.cuda.device_count()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """The world that torchrun's variables tell of; without them, one rank. Raises ConfigError for half of them."""
        reports = launcher_reports()
        try:
            size = int(environment.get("WORLD_SIZE", "1"))
            if size == 1:
                return cls(reports=reports)
            rank = int(environment["RANK"])
            local_rank, num_local = int(environment["LOCAL_RANK"]), int(environment.get("LOCAL_WORLD_SIZE", size))
            missing = next((name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)), None)
        except KeyError as error:
            missing = str(error.args[0])
        except ValueError as error:
            missing = f"a number ({error})"
        if missing is not None:
            raise ConfigError(
                "E-CONFIG-WORLD",
                what=f"WORLD_SIZE={environment.get('WORLD_SIZE')} is set, but {missing} is missing",
                next="start with torchrun, or unset WORLD_SIZE and use --parallel.data_replicate",
            )
        return cls(rank, size, local_rank=local_rank, num_local=num_local, reports=reports)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, logs and decides for all."""
        return self.rank == 0

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Meet the other ranks, and part from them at the end. DeepSpeed wants a group even of one rank."""
        has_group = self.size > 1 or self.parallel.zero_stage > 0
        if has_group:
            for name in missing_interfaces():
                if name.startswith("GLOO") or self._has_cuda():  # NCCL's own is not looked at otherwise
                    raise no_interface(self.rank, socket.gethostname(), name, os.environ[name])
            with _peers():
                self._meet()
            if self.size > 1 and self._reports is not None:
                self._reports.met()
        yield
        if has_group:
            import torch.distributed as dist

            self.barrier()
            dist.destroy_process_group()

    def _meet(self) -> None:
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        self._store = self._store or self._meeting_place()
        self._num_meetings += 1
        has_cuda = self._has_cuda()  # the same on every rank
        if has_cuda:
            torch.cuda.set_device(self.local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
            # the addresses of an earlier meeting are still there: a rank that comes first must not read them
            store=PrefixStore(f"meeting {self._num_meetings}", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=PATIENCE,
        )
        watch_connections()

    def _meeting_place(self) -> "Store":
        """Where the ranks leave their addresses: the launcher's socket, or what torchrun's variables name."""
        from torch._C._distributed_c10d import HashStore, TCPStore
        from torch.distributed.rendezvous import rendezvous

        if self.size == 1:
            return HashStore()
        if LAUNCHER_PID not in os.environ:
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=RENDEZVOUS))
            return store
        listening = os.environ.pop(LISTEN_FD, None)
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.size,
            is_master=self.is_first,
            timeout=RENDEZVOUS,
            master_listen_fd=None if listening is None else int(listening),
        )

    def report(self, step: int) -> None:
        """Tell the launcher, if there is one, that so many steps are done."""
        if self._reports is not None:
            self._reports.reached(step)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_counts([1])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; anything that JSON can say."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        payload = _as_bytes(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        with _peers():
            dist.broadcast(length, src=0)
            if not self.is_first:
                payload = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(payload, src=0)
        return _from_bytes(payload)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; anything that JSON can say."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        payload = _as_bytes(value)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = payload.numel()
        with _peers():
            dist.all_reduce(lengths)
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: payload.numel()] = payload
            gathered = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(gathered, padded)
        return [_from_bytes(part[:length]) for part, length in zip(gathered, lengths.tolist(), strict=True)]

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Sums of counts over the ranks."""
        if self.size == 1:
            return list(counts)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(counts, dtype=torch.int64)
        with _peers():
            dist.all_reduce(sums)
        return [int(number) for number in sums.tolist()]

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum_counts([int(is_so)])[0] > 0

    def all_reduce_gradients(self, gradients: Sequence["Tensor"], dims: tuple[Dim, ...] = TOKEN_DIMS) -> None:
        """Replace each tensor by its sum over some dimensions of the mesh: fp32 buckets, filled in the order given."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        reach("comm.pre")
        groups = list(self.mesh.groups(dims)) if self.mesh.is_sharded else [dist.group.WORLD]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).float()
            for group in groups:
                with _peers():
                    dist.all_reduce(flat, group=group)
            begin = 0
            for gradient in bucket:
                gradient.copy_(flat[begin : begin + gradient.numel()].view_as(gradient))
                begin += gradient.numel()


def _buckets(gradients: Sequence["Tensor"]) -> Iterator[list["Tensor"]]:
    bucket: list[Tensor] = []
    num_elements = 0
    for gradient in gradients:
        if bucket and num_elements + gradient.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, num_elements = [], 0
        bucket.append(gradient)
        num_elements += gradient.numel()
    if bucket:
        yield bucket


def _as_bytes(value: Any) -> "Tensor":
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(payload: "Tensor") -> Any:
    return json.loads(payload.numpy().tobytes())


@contextmanager
def _peers() -> Iterator[None]:
    """What torch says of a broken connection, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise peer_lost(error) from error


def peer_lost(error: RuntimeError) -> DistributedError:
    """A broken connection, as an error of ours."""
    return DistributedError(
        PEER_LOST,
        what=f"another rank cannot be reached ({str(error).splitlines()[0][:200]})",
        next="the rank that failed first says why; the same command goes on from the last checkpoint",
    )
