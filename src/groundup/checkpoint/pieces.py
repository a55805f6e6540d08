"""Tensors that several ranks wrote, each its pieces: what lies where, and reading any other cut of them.

`layout.json` of such a checkpoint has, by group and tensor, the shape of the whole and its pieces: file, first index,
shape. A checkpoint without one holds whole tensors. A run of a tensor's elements is a piece of it laid out in one dimension,
and pieces of both kinds are read as either. What cannot be cut otherwise than it was written (8-bit codes, whose
scales belong to blocks of the piece) is marked so, and is read as it stands or refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from groundup.base.errors import CheckpointError
from groundup.base.piece import Piece, Slices
from groundup.checkpoint.attempt import SUFFIX, Checkpoint

Entries = dict[str, dict[str, Any]]
Layout = dict[str, Entries]


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor."""

    tensor: Tensor
    piece: Piece
    can_be_cut: bool = True
    """Whether the tensor has the piece's shape, and any part of it means the same alone."""


def parts_of(tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]) -> dict[str, Part]:
    """Parts of tensors by name; `NAME:KEY` belongs to the parameter NAME, of which this rank holds `pieces[NAME]`."""
    by_owner: dict[str, list[str]] = {}
    for key in tensors:
        by_owner.setdefault(_owner(key, pieces), []).append(key)
    found: dict[str, Part] = {}
    for name, keys in by_owner.items():
        piece = pieces[name]
        can_be_cut = all(_can_be_cut(tensors[key], piece.shape) for key in keys)
        for key in keys:
            whole = Piece.of_whole(()) if tensors[key].dim() == 0 else piece
            found[key] = Part(tensors[key], whole, can_be_cut or tensors[key].dim() == 0)
    return found


def _owner(key: str, pieces: Mapping[str, Piece]) -> str:
    return key if key in pieces else key.rpartition(":")[0]


def _can_be_cut(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dim() == 0 or (tuple(tensor.shape) == shape and tensor.is_floating_point())


def describe(parts: Mapping[str, Mapping[str, Part]], file_of: Mapping[str, str]) -> Layout:
    """What one rank writes, as JSON values: by group and tensor; `file_of[group]` is the file."""
    return {
        group: {
            name: {
                "whole": list(part.piece.whole),
                "can_be_cut": part.can_be_cut,
                "pieces": [[file_of[group], list(part.piece.begin), list(part.piece.shape)]],
            }
            for name, part in members.items()
        }
        for group, members in parts.items()
    }


def merge(layouts: Sequence[Layout]) -> Layout:
    """One layout of what all ranks write."""
    whole: Layout = {}
    for layout in layouts:
        for group, members in layout.items():
            into = whole.setdefault(group, {})
            for name, entry in members.items():
                if name in into:
                    into[name]["pieces"] += entry["pieces"]
                else:
                    into[name] = {**entry, "pieces": list(entry["pieces"])}
    return whole


@dataclass
class _Wish:
    """A piece to be read, of the tensor as it was written."""

    piece: Piece
    finish: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Makes of it what was asked for."""
    found: Tensor | None = None

    def take(self, tensor: Tensor, here: Slices, there: Slices) -> None:
        """A part of a tensor in a file, to its place in the piece."""
        if self.found is None:
            self.found = torch.empty(self.piece.shape, dtype=tensor.dtype)
        self.found[here] = tensor[there]

    def granted(self) -> Tensor:
        return self.finish(torch.empty(self.piece.shape) if self.found is None else self.found)


class SavedGroup:
    """One group of a checkpoint's tensors, whoever wrote them: beside the pieces that are asked for one tensor is in memory."""

    def __init__(self, checkpoint: Checkpoint, group: str) -> None:
        self._checkpoint, self._group = checkpoint, group
        layout = checkpoint.layout()
        self._entries = None if layout is None else layout.get(group, {})

    @property
    def is_there(self) -> bool:
        """Whether the checkpoint has this group at all."""
        return bool(self._entries) or f"{self._group}{SUFFIX}" in self._checkpoint.files

    def read(self, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Every saved tensor of the parameters in `pieces`, of each the piece that is named there.

        Raises CheckpointError for a piece that nobody wrote, and for what was cut otherwise and cannot be cut anew.
        """
        wishes: dict[str, _Wish] = {}
        takes: dict[str, dict[str, tuple[Slices, Slices] | None]] = {}
        """By file and tensor: where it goes and what of it; None takes it as it stands."""
        for key, entry in self._described().items():
            name = _owner(key, pieces)
            if name in pieces:
                wanted = pieces[name] if entry["whole"] else Piece.of_whole(())
                wishes[key], sources = self._plan(key, entry, wanted)
                for file, take in sources.items():
                    takes.setdefault(file, {})[key] = take
        for file, own in takes.items():
            for key, tensor in self._checkpoint.each_tensor(file, own):
                take = own[key]
                if take is None:
                    wishes[key].found = tensor
                else:
                    wishes[key].take(tensor, *take)
                del tensor  # before the next one is made
        return {key: wish.granted() for key, wish in wishes.items()}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._described())

    def _described(self) -> Entries:
        """The entries of the group; of one whose tensors are whole, made from its file's header."""
        if self._entries is not None:
            return self._entries
        return {
            key: {
                "whole": list(shape),
                "can_be_cut": dtype.is_floating_point,
                "pieces": [[self._group, [0] * len(shape), list(shape)]],
            }
            for key, (shape, dtype) in self._checkpoint.shapes(self._group).items()
        }

    def _plan(
        self, key: str, entry: Mapping[str, Any], wanted: Piece
    ) -> tuple[_Wish, dict[str, tuple[Slices, Slices] | None]]:
        """What has to be read for a piece, and by file which part of the tensor there goes where."""
        whole = tuple(entry["whole"])
        written = {file: Piece(whole, tuple(begin), tuple(shape)) for file, begin, shape in entry["pieces"]}
        for file, piece in written.items():
            if piece == wanted:
                return _Wish(wanted), {file: None}
        if _is_laid_out_otherwise(whole, wanted.whole) and entry["can_be_cut"]:
            laid_out, finish = _laid_out(whole, wanted)
            wish, sources = self._plan(key, entry, laid_out)
            wish.finish = finish
            return wish, sources
        if not entry["can_be_cut"] or whole != wanted.whole:
            raise CheckpointError(
                "E-CKPT-RESHARD",
                what=f"{key} was written in pieces that this mesh does not have, and blocks of 8 bits cannot be cut anew",
                where=self._checkpoint.folder,
                next="go on with the same mesh, or begin again with `--restart`",
            )
        overlaps = {file: wanted.overlap(piece) for file, piece in written.items()}
        found = {file: overlap for file, overlap in overlaps.items() if overlap is not None}
        num_found = sum(prod(part.stop - part.start for part in here) for here, _ in found.values())
        if num_found != wanted.num_elements:
            raise CheckpointError(
                "E-CKPT-PIECES",
                what=f"{num_found:,} of {wanted.num_elements:,} elements of {key} are in the checkpoint",
                where=self._checkpoint.folder,
                next="begin again with `--restart`",
            )
        return _Wish(wanted), dict(found)


def _laid_out(whole: tuple[int, ...], wanted: Piece) -> tuple[Piece, Callable[[Tensor], Tensor]]:
    """A box out of runs of elements, or a run out of boxes: by whole rows of which the one is a part."""
    if len(whole) == 1:
        row = prod(wanted.whole[1:])
        inner = (slice(None), *wanted.slices[1:])
        run = Piece(whole, (wanted.begin[0] * row,), (wanted.shape[0] * row,))
        # a copy, so that the rows are let go of
        return run, lambda rows: rows.view(wanted.shape[0], *wanted.whole[1:])[inner].clone()
    row, begin, end = prod(whole[1:]), wanted.begin[0], wanted.begin[0] + wanted.shape[0]
    first, last = begin // row, -(-end // row)
    box = Piece(whole, (first, *[0] * (len(whole) - 1)), (last - first, *whole[1:]))
    return box, lambda rows: rows.reshape(-1)[begin - first * row : end - first * row]


def _is_laid_out_otherwise(whole: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one of two shapes of a tensor is the other laid out in one dimension."""
    return whole != wanted and 1 in (len(whole), len(wanted)) and prod(whole) == prod(wanted)
