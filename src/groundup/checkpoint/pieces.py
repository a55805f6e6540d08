"""Tensors that several ranks wrote, each its pieces: what lies where, and reading any other cut of them.

`layout.json` of such a checkpoint has, by group and tensor, the shape of the whole and its pieces: file, first index,
shape. A checkpoint without one holds whole tensors. A run of a tensor's elements is a piece of it laid out in one dimension,
and pieces of both kinds are read as either. What cannot be cut otherwise than it was written (8-bit codes, whose
scales belong to blocks of the piece) is marked so, and is read as it stands or refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from groundup.base.errors import CheckpointError
from groundup.base.piece import Piece
from groundup.checkpoint.attempt import SUFFIX, Checkpoint

Layout = dict[str, dict[str, dict[str, Any]]]


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


class SavedGroup:
    """One group of a checkpoint's tensors, whoever wrote them; files are read once and let go with it."""

    def __init__(self, checkpoint: Checkpoint, group: str) -> None:
        self._checkpoint, self._group = checkpoint, group
        self._read: dict[str, dict[str, Tensor]] = {}
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
        entries = self._described() if self._entries is None else self._entries
        found = {}
        for key, entry in entries.items():
            name = _owner(key, pieces)
            if name in pieces:
                wanted = pieces[name] if entry["whole"] else Piece.of_whole(())
                found[key] = self._assembled(key, entry, wanted)
        self._read.clear()
        return found

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file(self._group) if self._entries is None else self._entries)

    def _described(self) -> dict[str, dict[str, Any]]:
        """The entries of a group of whole tensors."""
        return {
            key: {
                "whole": list(value.shape),
                "can_be_cut": value.is_floating_point(),
                "pieces": [[self._group, [0] * value.dim(), list(value.shape)]],
            }
            for key, value in self._file(self._group).items()
        }

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._read:
            self._read[name] = self._checkpoint.tensors(name)
        return self._read[name]

    def _assembled(self, key: str, entry: Mapping[str, Any], wanted: Piece) -> Tensor:
        written = [
            (file, Piece(tuple(entry["whole"]), tuple(begin), tuple(shape))) for file, begin, shape in entry["pieces"]
        ]
        for file, piece in written:
            if piece == wanted:
                return self._file(file)[key]
        if _is_laid_out_otherwise(tuple(entry["whole"]), wanted.whole) and entry["can_be_cut"]:
            return self._laid_out(key, entry, wanted)
        if not entry["can_be_cut"] or tuple(entry["whole"]) != wanted.whole:
            raise CheckpointError(
                "E-CKPT-RESHARD",
                what=f"{key} was written in pieces that this mesh does not have, and blocks of 8 bits cannot be cut anew",
                where=self._checkpoint.folder,
                next="go on with the same mesh, or begin again with `--restart`",
            )
        result: Tensor | None = None
        num_found = 0
        for file, piece in written:
            overlap = wanted.overlap(piece)
            if overlap is None:
                continue
            here, there = overlap
            source = self._file(file)[key][there]
            if result is None:
                result = torch.empty(wanted.shape, dtype=source.dtype)
            result[here] = source
            num_found += source.numel()
        if num_found != wanted.num_elements:
            raise CheckpointError(
                "E-CKPT-PIECES",
                what=f"{num_found:,} of {wanted.num_elements:,} elements of {key} are in the checkpoint",
                where=self._checkpoint.folder,
                next="begin again with `--restart`",
            )
        return torch.empty(wanted.shape) if result is None else result

    def _laid_out(self, key: str, entry: Mapping[str, Any], wanted: Piece) -> Tensor:
        """A box out of runs of elements, or a run out of boxes: by whole rows of which the one is a part."""
        whole = tuple(entry["whole"])
        if len(whole) == 1:
            row = prod(wanted.whole[1:])
            run = Piece(whole, (wanted.begin[0] * row,), (wanted.shape[0] * row,))
            rows = self._assembled(key, entry, run).view(wanted.shape[0], *wanted.whole[1:])
            inner = zip(wanted.begin[1:], wanted.shape[1:], strict=True)
            return rows[(slice(None), *(slice(at, at + size) for at, size in inner))]
        row, begin, end = prod(whole[1:]), wanted.begin[0], wanted.begin[0] + wanted.shape[0]
        first, last = begin // row, -(-end // row)
        rest = [0] * (len(whole) - 1)
        rows = self._assembled(key, entry, Piece(whole, (first, *rest), (last - first, *whole[1:])))
        return rows.reshape(-1)[begin - first * row : end - first * row]


def _is_laid_out_otherwise(whole: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one of two shapes of a tensor is the other laid out in one dimension."""
    return whole != wanted and 1 in (len(whole), len(wanted)) and prod(whole) == prod(wanted)
