"""Pieces of the weights in a model directory: each the same bits as of the whole, and what is wrong with a directory is said."""

import random

import pytest
import torch
from checkpoint.test_experts import MOE, save
from safetensors.torch import load_file, save_file

from groundup.base.errors import CheckpointError
from groundup.base.piece import Piece
from groundup.checkpoint.huggingface import load_model
from groundup.checkpoint.weight_slices import FolderWeights
from groundup.model.causal_lm import CausalLM

SHAPES = {"tied": {}, "untied": {"tie_word_embeddings": False, "model_type": "qwen2"}, **MOE}


def random_piece(draw, shape):
    begin = tuple(draw.randrange(size) for size in shape)
    return Piece(shape, begin, tuple(draw.randint(0, size - first) for size, first in zip(shape, begin, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_any_piece_has_the_bits_of_the_whole(tmp_path, make_model, tokenizer, name, dtype):
    model = make_model(**SHAPES[name])
    save(tmp_path, model, tokenizer, dtype=dtype)
    whole = load_model(tmp_path)
    weights = FolderWeights(tmp_path, CausalLM.without_memory(whole.config))
    for seed in range(30):
        draw = random.Random(seed)
        pieces = {name: random_piece(draw, tuple(weight.shape)) for name, weight in whole.named_parameters()}
        found = {name: part.float().clone() for name, part in weights(pieces)}
        assert found.keys() == pieces.keys()
        for name, part in found.items():
            assert torch.equal(part, whole.get_parameter(name).detach()[pieces[name].slices]), f"{seed=} {name}"


def test_experts_that_a_directory_has_stacked(tmp_path, make_model, tokenizer):
    model = make_model(**MOE["qwen3_moe"])
    save(tmp_path, model, tokenizer)
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    piece = Piece(tuple(tensors[name].shape), (3, 20, 1), (4, 9, 30))
    found = dict(FolderWeights(tmp_path, CausalLM.without_memory(model.config))({name: piece}))
    assert torch.equal(found[name], tensors[name][piece.slices])


def test_several_files(tmp_path, make_model, tokenizer):
    model = make_model()
    save(tmp_path, model, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, tmp_path / f"part-{number}.safetensors")
    pieces = {name: Piece.of_whole(tuple(weight.shape)) for name, weight in model.named_parameters()}
    found = {name: part.clone() for name, part in FolderWeights(tmp_path, model)(pieces)}
    assert all(torch.equal(found[name], weight) for name, weight in model.named_parameters())


def test_what_does_not_belong_is_said_before_a_value_is_read(tmp_path, make_model, tokenizer):
    model = make_model(**MOE["mixtral"])
    path = save(tmp_path, model, tokenizer) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.ones(31)}, path)
    with pytest.raises(CheckpointError, match=r"E-SHAPE: model.norm.weight is \[31\], the config says \[32\]"):
        FolderWeights(tmp_path, model)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"E-KEYS.*missing 2: \['model.layers.0.mlp.experts.down_proj'"):
        FolderWeights(tmp_path, model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="E-MODEL-DAMAGED"):
        FolderWeights(tmp_path, model)


def test_a_number_that_is_none_is_seen_in_the_piece_that_has_it(tmp_path, make_model, tokenizer):
    model = make_model()
    path = save(tmp_path, model, tokenizer) / "model.safetensors"
    tensors = load_file(path)
    name, shape = "model.layers.1.mlp.up_proj.weight", (48, 32)
    tensors[name][40, 3] = float("nan")
    save_file(tensors, path)
    weights = FolderWeights(tmp_path, model)
    assert dict(weights({name: Piece(shape, (0, 0), (24, 32))}))
    with pytest.raises(CheckpointError, match=rf"E-NONFINITE: {name}"):
        list(weights({name: Piece(shape, (24, 0), (24, 32))}))
