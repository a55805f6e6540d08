"""Counts what a computation reads back from its device: each is a wait on CUDA, though a CPU shows none."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "bincount")
WAITING_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
"""Of a CPU's tensor these reach no operator; the operators behind `item`, `float` and `bool` are seen below."""


class DeviceReads:
    """While entered, keeps the names of all that waits for a device, in order; this thread's only."""

    def __init__(self):
        self.names = []
        self._modes = (_Methods(self.names), _Operators(self.names))

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self.names

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in WAITING_METHODS:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING_OPERATORS or by_mask:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))
