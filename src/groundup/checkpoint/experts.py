"""Experts on disk: a tensor for each matrix of each expert, as Hugging Face checkpoints have them; stacked in memory."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from groundup.base.piece import Piece, Slices
from groundup.model.config import SPARSE_TYPES, ModelConfig

STACKED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


def _words(config: ModelConfig) -> tuple[str, str, str, str]:
    """What the checkpoints of a model type call the sparse MLP, and an expert's gate, up and down matrices."""
    if config.model_type == "mixtral":
        return "block_sparse_moe", "w1", "w3", "w2"
    return "mlp", "gate_proj", "up_proj", "down_proj"


def unstacked(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in a checkpoint, one for each matrix of each expert; a dense model's as they are."""
    if config.model_type not in SPARSE_TYPES:
        return dict(tensors)
    block, gate, up, down = _words(config)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            found[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            place = f"{match[1]}.{block}.experts.{expert}"
            if match[2] == "down_proj":
                found[f"{place}.{down}.weight"] = matrix
            else:
                found[f"{place}.{gate}.weight"], found[f"{place}.{up}.weight"] = matrix.chunk(2)
    return found


def stacked(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in memory. A layer that lacks an expert's matrix, or has matrices of several shapes,
    keeps its names on disk: whoever loads them says what is missing."""
    if config.model_type not in SPARSE_TYPES:
        return dict(tensors)
    assert config.num_experts is not None
    block, gate, up, down = _words(config)
    found = dict(tensors)
    for layer in range(config.num_hidden_layers):
        if not config.is_sparse(layer):
            continue
        place = f"model.layers.{layer}"
        parts = {
            word: [f"{place}.{block}.experts.{expert}.{word}.weight" for expert in range(config.num_experts)]
            for word in (gate, up, down)
        }
        if all(name in found for names in parts.values() for name in names) and all(
            len({found[name].shape for name in names}) == 1 for names in parts.values()
        ):
            gates, ups, downs = (torch.stack([found.pop(name) for name in parts[word]]) for word in (gate, up, down))
            found[f"{place}.mlp.experts.gate_up_proj"] = torch.cat((gates, ups), dim=1)
            found[f"{place}.mlp.experts.down_proj"] = downs
        if f"{place}.{block}.gate.weight" in found:
            found[f"{place}.mlp.gate.weight"] = found.pop(f"{place}.{block}.gate.weight")
    return found


def places_on_disk(config: ModelConfig, name: str, piece: Piece) -> Iterator[tuple[str, Slices, Slices]]:
    """Where a piece of a parameter lies in a checkpoint: a tensor's name there, its place in the piece, and the part of it."""
    match, everything = STACKED.fullmatch(name), (slice(None),) * len(piece.shape)
    if config.model_type not in SPARSE_TYPES:
        yield name, everything, piece.slices
        return
    block, gate, up, down = _words(config)
    if match is None:
        yield name.replace(".mlp.gate.", f".{block}.gate."), everything, piece.slices
        return
    _, rows, columns = piece.whole
    half = rows // 2
    matrices = [(down, 0, rows)] if match[2] == "down_proj" else [(gate, 0, half), (up, half, half)]
    for expert in range(piece.begin[0], piece.begin[0] + piece.shape[0]):
        for word, first, size in matrices:
            overlap = piece.overlap(Piece(piece.whole, (expert, first, 0), (1, size, columns)))
            if overlap is not None:
                here, there = overlap
                yield f"{match[1]}.{block}.experts.{expert}.{word}.weight", here, there[1:]
