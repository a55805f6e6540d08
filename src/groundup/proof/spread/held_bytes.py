"""How many bytes of tensors exist at once while something is done: counted, not measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from groundup.parallel.shards import local


class HeldBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, memory that operators make is counted for as long as a tensor has it. Not what was there before, what is on the
    meta device, and files that are mapped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        """The most bytes at once so far."""
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and look at what is new."""
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._made = {place: made for place, made in self._made.items() if not _is_gone(made[0])}
        for storage in _storages(result):
            if storage.data_ptr() not in given and storage.data_ptr():
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[storage.data_ptr()] = reference, storage.nbytes()
        self.most = max(self.most, sum(num_bytes for _, num_bytes in self._made.values()))
        return result


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.UntypedStorage):  # of a mapped file, which a tensor is set to
            yield value
        elif isinstance(value, Tensor) and not value.is_meta:
            held = local(value)
            if not is_traceable_wrapper_subclass(held):  # packed: its parts are tensors that operators made
                yield held.untyped_storage()
