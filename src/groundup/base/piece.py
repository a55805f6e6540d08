"""A part of a tensor that is spread over ranks or files: where it begins in the whole, and how far it reaches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor."""

    whole: tuple[int, ...]
    """Shape of the tensor it is a part of."""
    begin: tuple[int, ...]
    """Index of its first element."""
    shape: tuple[int, ...]

    @staticmethod
    def of_whole(shape: tuple[int, ...]) -> "Piece":
        """All of a tensor."""
        return Piece(shape, (0,) * len(shape), shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.whole

    @property
    def slices(self) -> Slices:
        """Its place in the whole, to index it with."""
        return tuple(slice(at, at + size) for at, size in zip(self.begin, self.shape, strict=True))

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def overlap(self, other: "Piece") -> tuple[Slices, Slices] | None:
        """Where what both hold lies in this piece, and where in the other; None if they share nothing."""
        mine, theirs = [], []
        for begin, size, other_begin, other_size in zip(self.begin, self.shape, other.begin, other.shape, strict=True):
            first, last = max(begin, other_begin), min(begin + size, other_begin + other_size)
            if first >= last:
                return None
            mine.append(slice(first - begin, last - begin))
            theirs.append(slice(first - other_begin, last - other_begin))
        return tuple(mine), tuple(theirs)


Weights = Callable[[Mapping[str, Piece]], "Iterable[tuple[str, Tensor]]"]
"""Where a model's values come from: given the piece of each parameter that is wanted, each by its name, one after the other."""
