"""One node's part of a run on several: torchrun's elastic agent starts the ranks here and meets the other nodes."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from groundup.base.errors import ConfigError, DistributedError, Preempted
from groundup.parallel.rank import PEER_LOST


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run, and this one among them."""

    num_nodes: int
    ranks_per_node: int
    rdzv_endpoint: str
    """HOST:PORT at which the nodes meet."""
    run_id: str
    """The same on every node, another for every run that meets there."""
    node_rank: int | None = None
    """0 on the node of the end point; None: torch finds by the host's name which that is."""
    max_restarts: int = 3

    def check(self) -> None:
        """Raise ConfigError for an end point that is none, or a node beyond the last."""
        host, colon, port = self.rdzv_endpoint.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(
                "E-CLI",
                what=f"--rdzv-endpoint {self.rdzv_endpoint!r} is no place where {self.num_nodes} nodes can meet",
                next="give HOST:PORT, the first node and a free port of it, the same on every node",
            )
        if self.node_rank is not None and not 0 <= self.node_rank < self.num_nodes:
            raise ConfigError(
                "E-CLI",
                what=f"--node-rank {self.node_rank} of --nnodes {self.num_nodes}",
                next=f"number the nodes from 0 to {self.num_nodes - 1}",
            )


def launch_node(arguments: Sequence[str], nodes: Nodes) -> int:
    """Run `groundup` with these arguments on this node's ranks to its end; returns the exit code.

    The cause of a failure is the last line on standard error. The agents start all ranks again, from the last
    checkpoint, when one is lost on any node. Raises ConfigError for nodes that cannot meet.
    """
    nodes.check()
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=nodes.num_nodes,
            max_nodes=nodes.num_nodes,
            nproc_per_node=nodes.ranks_per_node,
            run_id=nodes.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint=nodes.rdzv_endpoint,
            rdzv_configs={} if nodes.node_rank is None else {"is_host": str(nodes.node_rank == 0)},
            max_restarts=nodes.max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "groundup", *arguments)
        except ChildFailedError as failed:
            return _end_with(failed)
        except SignalException as stop:
            name = Signals(stop.sigval).name
            raise Preempted(
                "E-PREEMPTED", what=f"stopped by {name}", next="the same command on every node goes on"
            ) from None
        except RendezvousError as error:
            raise DistributedError(
                "E-NODES-MEET",
                what=f"the nodes do not meet ({str(error).splitlines()[0][:200]})",
                where=nodes.rdzv_endpoint,
                next=f"start the same command on all {nodes.num_nodes} nodes, with --node-rank 0 on that host, "
                "and see that its port can be reached",
            ) from None
    return 0


def _end_with(failed: BaseException) -> int:
    """Print the cause last: the first failure that is no mere loss of another rank; returns its exit code."""
    failures = sorted(failed.failures.items(), key=lambda item: (PEER_LOST in _words(item[1]), item[1].timestamp))  # type: ignore[attr-defined]
    rank, first = failures[0]
    if first.exitcode > 0:
        has_words = Path(first.error_file).is_file()
        print(
            _words(first) if has_words else f"ERROR rank {rank} ended with exit code {first.exitcode}", file=sys.stderr
        )
        return int(first.exitcode)
    lost = DistributedError(
        "E-RANK-LOST",
        what=f"rank {rank} (pid {first.pid}) signal {-first.exitcode}",
        next="the same command on every node goes on from the last checkpoint",
    )
    print(f"ERROR {lost.line()}", file=sys.stderr)
    return lost.exit_code


def _words(failure: object) -> str:
    return str(failure.message)  # type: ignore[attr-defined]
