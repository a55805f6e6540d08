"""What a rank sends, counted: every message that torch's distributed package is given while the counter is on, by the
dimension of the mesh that it goes over."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from groundup.parallel.config import DIMS
from groundup.parallel.mesh import Mesh

REST = "all ranks"
"""Messages of a group that is no single dimension's."""
SHARES: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda num: 2 * (num - 1) / num,
    "all_gather": lambda num: (num - 1) / num,
    "reduce_scatter": lambda num: (num - 1) / num,
    "all_to_all": lambda num: (num - 1) / num,
    "send": lambda num: 1.0,
    "broadcast": lambda num: 1.0,
}
"""Of a message's bytes, those that each of `num` ranks sends where they stand in a ring (Patarasuk & Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002); of an all-to-all where every rank gets as much."""
_KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "broadcast_": "broadcast",
}
_SILENT = {"recv_", "wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"}
"""What sends nothing of its own."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts. A kind of message that it does not know is an error, not a gap in the count."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.payload: Counter[tuple[str, str]] = Counter()
        """Bytes by dimension and kind: of a gather what every rank has then, of all else what it had before."""
        self.num_messages: Counter[tuple[str, str]] = Counter()
        # by the ranks: torch may send over a group of an earlier mesh that has the same
        self._dim_of = {_ranks(mesh.group(dim)): dim for dim in DIMS if mesh.has(dim)} if mesh.size > 1 else {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            name = func._schema.name.rpartition("::")[2]
            if name not in _SILENT:
                self._count(_KINDS[name], name, args, result)
        return result

    def _count(self, kind: str, name: str, args: tuple[Any, ...], result: Any) -> None:
        group = next(ranks for ranks in map(_ranks_of, args) if ranks)
        tensors = _tensors(result if name == "all_gather_into_tensor" else args[0])
        if name in ("_reduce_scatter_base_", "alltoall_base_"):  # the first is where the result goes
            tensors = _tensors(args[1])
        key = (self._dim_of.get(group, REST), kind)
        self.payload[key] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.num_messages[key] += 1


def sent_bytes(payload: Mapping[tuple[str, str], float], degrees: Mapping[Any, int]) -> dict[str, float]:
    """Bytes that a rank sends over each dimension, of what it hands to each kind of message."""
    sent: dict[str, float] = {}
    for (dim, kind), num_bytes in payload.items():
        if dim in degrees:
            sent[dim] = sent.get(dim, 0.0) + SHARES[kind](degrees[dim]) * num_bytes
    return sent


def _ranks_of(argument: Any) -> tuple[int, ...]:
    """The ranks of a group, which functional messages give by its name and the others as an object; none of other arguments."""
    if isinstance(argument, str):
        is_name = argument.isdigit() or argument.startswith("default")
        return _ranks(_resolve_process_group(GroupName(argument))) if is_name else ()
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return _ranks(dist.ProcessGroup.unbox(argument))
    return ()


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)]
