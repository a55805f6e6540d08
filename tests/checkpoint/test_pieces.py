"""Tensors that are read one at a time: the bits of the whole file, no more memory than asked for, and no byte unchecked."""

import random

import pytest
import torch
from checkpoint.test_store_faults import HOSTILE
from safetensors.torch import save

from groundup.base.errors import CheckpointError
from groundup.base.log import Log
from groundup.base.piece import Piece
from groundup.checkpoint.pieces import SavedGroup
from groundup.checkpoint.shard import parse_shard, stream_shard
from groundup.checkpoint.store import CheckpointStore
from groundup.proof.spread.held_bytes import HeldBytes

SHAPES = {f"layer.{number}": (40, 50) for number in range(30)} | {"head": (300, 40), "one": (), "none": (0, 4)}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of one file of whole tensors, and what is in it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    store = CheckpointStore(tmp_path, run_id="run", log=Log(quiet=True))
    store.save(1, {"model": tensors}, {"step": 1}, wait=True)
    return store.newest(), tensors


def chunks_of(data, draw):
    while data:
        size = draw.choice([1, 7, 8, 100, 1 << 20])
        yield data[:size]
        data = data[size:]


def test_a_stream_has_the_tensors_of_the_file_wherever_its_chunks_end():
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]
    for seed in range(40):
        draw = random.Random(seed)
        tensors = {
            f"{number}": (torch.randn([draw.randint(0, 4) for _ in range(draw.randint(0, 3))]) * 9).to(
                draw.choice(dtypes)
            )
            for number in range(draw.randint(1, 8))
        }
        data = save(tensors)
        wanted = {name for name in tensors if draw.random() < 0.7}
        found = dict(stream_shard(chunks_of(data, draw), len(data), wanted))
        assert found.keys() == wanted
        for name, tensor in parse_shard(data).items():
            if name in wanted:
                assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
                assert found[name].untyped_storage().tolist() == tensor.clone().untyped_storage().tolist(), f"{seed=}"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_plain_fault(name):
    data = HOSTILE[name]
    with pytest.raises(ValueError, match=r"."):
        list(stream_shard(iter([data]), len(data), {"w", "v"}))


def test_a_part_takes_its_own_memory_and_one_tensor(saved):
    checkpoint, tensors = saved
    pieces = {name: Piece.of_whole(tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces |= {name: Piece((40, 50), (10, 0), (10, 50)) for name in tensors if name.startswith("layer")}
    with HeldBytes() as held:
        found = SavedGroup(checkpoint, "model").read(pieces)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor[pieces[name].slices]), name
    own, largest = sum(tensor.nbytes for tensor in found.values()), tensors["head"].nbytes
    assert own < held.most < own + largest, f"{held.most:,} bytes for {own:,}"
    assert own + largest < 0.6 * sum(tensor.nbytes for tensor in tensors.values())


def test_names_are_read_from_the_header_alone(saved, monkeypatch):
    checkpoint, tensors = saved
    monkeypatch.setattr(type(checkpoint), "tensors", None)
    monkeypatch.setattr(type(checkpoint), "each_tensor", None)
    assert SavedGroup(checkpoint, "model").names() == tensors.keys()


def test_what_changes_between_verification_and_use_is_not_used(saved):
    checkpoint, _ = saved
    path = checkpoint.folder / "model.safetensors"
    whole = path.read_bytes()
    # in the data of a tensor that is not asked for, in the header, at the end
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for data in (bytes(flipped), whole[:20] + b"x" + whole[21:], whole[:-1], whole + b"x"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="E-CKPT-CORRUPT: step 1 changed since it was verified"):
            SavedGroup(checkpoint, "model").read({"layer.0": Piece.of_whole((40, 50))})
    path.unlink()
    with pytest.raises(CheckpointError, match="E-CKPT-CORRUPT"):
        SavedGroup(checkpoint, "model").read({"layer.0": Piece.of_whole((40, 50))})
