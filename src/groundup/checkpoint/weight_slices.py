"""Pieces of the weights in a model directory: of each tensor only what is asked for is read."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from groundup.base.piece import Piece, Slices
from groundup.checkpoint.experts import places_on_disk
from groundup.checkpoint.huggingface import (
    EMBEDDING,
    HEAD,
    belonging,
    damage_named,
    refuse_not_finite,
    refuse_untied,
)
from groundup.checkpoint.weight_files import weight_files
from groundup.model.causal_lm import CausalLM


class FolderWeights:
    """Gives pieces of a model's parameters out of its directory, in the dtype they have there."""

    def __init__(self, folder: Path, model: CausalLM) -> None:
        """`model` is whole, be it on the meta device. Raises CheckpointError for weights that are not its own and for files
        that cannot be read; of the values nothing is read yet, but a head that is stored though it is tied."""
        self._folder, self._config = folder, model.config
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, Tensor] = {}
        for path in weight_files(folder):
            with damage_named(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    self._file_of[name] = path
                    shapes[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        belonging(model.config, dict(model.named_parameters()), shapes, folder)
        if model.config.tie_word_embeddings and HEAD in self._file_of:
            refuse_untied(self._whole(HEAD), self._whole(EMBEDDING), folder)

    def _whole(self, name: str) -> Tensor:
        with damage_named(self._file_of[name]), safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __call__(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
        """Each of the pieces by its parameter's name. Raises CheckpointError for values that are not finite and for a file
        that cannot be read any more."""
        with ExitStack() as opened:
            files: dict[Path, Any] = {}
            for name, piece in pieces.items():
                part = self._read(name, piece, files, opened)
                refuse_not_finite(name, part, self._folder)
                yield name, part
                del part  # before the next one is made

    def _read(self, name: str, piece: Piece, files: dict[Path, Any], opened: ExitStack) -> Tensor:
        if 0 in piece.shape:  # a shard that has nothing
            return torch.empty(piece.shape)
        if name in self._file_of:
            return self._slice(name, piece.slices, files, opened)
        found: Tensor | None = None
        for on_disk, here, there in places_on_disk(self._config, name, piece):
            part = self._slice(on_disk, there, files, opened)
            if found is None:
                found = torch.empty(piece.shape, dtype=part.dtype)
            found[here] = part
        assert found is not None, f"{name} lies nowhere"
        return found

    def _slice(self, name: str, place: Slices, files: dict[Path, Any], opened: ExitStack) -> Tensor:
        path = self._file_of[name]
        with damage_named(path):
            if path not in files:
                files[path] = opened.enter_context(safe_open(path, framework="pt"))
            part: Tensor = files[path].get_slice(name)[place]
        return part
