"""Gradients of micro-batches that are computed at the same time, added up in the order of the micro-batches."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

CACHED_ELEMENTS = 1 << 16
"""Elements of a sum that stay in a core's own cache while two micro-batches are added to them."""


class GradientSums:
    """Takes each gradient where the backward pass makes it: the pass holds no set of them.

    A weight's gradient waits until those of earlier micro-batches are there, so that sums have the same bits each time.
    Two are added in one pass over the sum: adding costs memory's time, not arithmetic's.
    """

    def __init__(self, computing: Mapping[str, nn.Parameter], add: Callable[[str, list[Tensor]], None]) -> None:
        """`add` adds gradients of a weight, by its name, to their sum, in their order."""
        self._add = add
        self._changed = threading.Condition()
        self._own = threading.local()
        self._turn = dict.fromkeys(computing, 0)
        self._held: dict[str, list[Tensor]] = {name: [] for name in computing}
        self._num_parts, self._is_over = 0, False
        for name, parameter in computing.items():
            parameter.register_hook(partial(self._take, name))  # type: ignore[no-untyped-call]

    def begin(self, num_parts: int) -> None:
        """A step of so many micro-batches."""
        self._num_parts, self._is_over = num_parts, False
        for name, held in self._held.items():
            self._turn[name] = 0
            held.clear()

    @contextmanager
    def of_part(self, number: int, *, is_alone: bool = False) -> Iterator[None]:
        """Around the passes of a micro-batch, in its thread; weights without a gradient give up their turn at the end. The
        gradients of one that is alone wait for no second one: they would lie beside the next one's activations."""
        self._own.number, self._own.is_alone, self._own.missing = number, is_alone, set(self._turn)
        try:
            yield
            for name in list(self._own.missing):
                self._in_turn(name, None)
        except BaseException:
            self._end()
            raise
        finally:
            self._own.missing = set()

    def _take(self, name: str, gradient: Tensor) -> Tensor | None:
        """Hook of a weight: what it gives back is what `torch.autograd.grad` keeps, which is nothing."""
        if name not in getattr(self._own, "missing", ()):
            return None
        self._in_turn(name, gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    def _in_turn(self, name: str, gradient: Tensor | None) -> None:
        number, held = self._own.number, self._held[name]
        self._own.missing.discard(name)
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._turn[name] == number)
            if self._is_over:
                return
        if gradient is not None:
            held.append(gradient)
        if held and (len(held) == 2 or self._own.is_alone or number + 1 == self._num_parts):
            self._add(name, held)
            held.clear()
        with self._changed:
            self._turn[name] += 1
            self._changed.notify_all()

    def _end(self) -> None:
        """After an error nobody waits any more, and nothing more is added."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def add_all(total: Tensor, gradients: list[Tensor]) -> None:
    """Add gradients to their sum in fp32, one after another, with one pass over memory."""
    rows = max(1, CACHED_ELEMENTS * len(total) // max(1, total.numel())) if total.dim() else 0
    parts = torch.split(total, rows) if len(gradients) > 1 and rows else (total,)
    for number, part in enumerate(parts):
        for gradient in gradients:
            part += gradient[number * rows : (number + 1) * rows] if len(parts) > 1 else gradient
