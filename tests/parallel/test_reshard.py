"""A run that goes on on another mesh: the same losses and weights, out of the pieces that other ranks wrote."""

import json
from pathlib import Path

import pytest
from parallel import work_reshard

from groundup.base.errors import CheckpointError
from groundup.base.piece import Piece
from groundup.parallel.world import World
from groundup.proof.tiny_job import SPLITS, write_tiny_tokens

pytestmark = pytest.mark.costly

WORK = Path(work_reshard.__file__)
ONE, SHARDS, STAGES = {}, {"data_shard": 2}, {"pipeline": 2}


@pytest.fixture
def train(on_two_ranks, tmp_path):
    """Steps up to a number, in one folder, on one rank or on two."""
    for split in SPLITS:
        write_tiny_tokens(tmp_path, split)

    def run(steps, parallel, *, folder="run", **changes):
        arguments = [str(tmp_path), str(tmp_path / folder), steps, parallel, changes]
        if parallel == ONE:
            return work_reshard.train(World(), *arguments)
        answers = on_two_ranks(WORK, "train", *arguments)
        assert [answer.get("error") for answer in answers] == [None, None], answers
        return answers[0]["value"]

    run.folder = tmp_path / "run"
    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_two_to_one_to_two(train, optimizer):
    options = {"optimizer": optimizer, "muon_lr": 0.01, "ema_decay": 0.5}
    whole = train(8, ONE, folder="alone", **options)
    train(3, SHARDS, **options)
    train(5, ONE, **options)
    found = train(8, SHARDS, **options)
    rel = 1e-5 if optimizer == "adamw" else 1e-3
    assert found["losses"] == pytest.approx(whole["losses"], rel=rel)
    assert found["val"] == pytest.approx(whole["val"], rel=rel)
    assert found["weights"] == pytest.approx(whole["weights"], rel=10 * rel)
    assert found["step"] == 8 and not found["is_exact"]
    events = [json.loads(line) for line in (train.folder / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("world") == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stages_to_one_to_shards(train, optimizer):
    options = {"optimizer": optimizer, "muon_lr": 0.01, "ema_decay": 0.5}
    whole = train(6, ONE, folder="alone", **options)
    train(2, STAGES, **options)
    train(3, ONE, **options)
    train(4, SHARDS, **options)
    found = train(6, STAGES, **options)
    rel = 1e-5 if optimizer == "adamw" else 1e-3
    assert found["losses"] == pytest.approx(whole["losses"], rel=rel)
    assert found["val"] == pytest.approx(whole["val"], rel=rel)
    assert found["weights"] == pytest.approx(whole["weights"], rel=10 * rel)


def test_the_same_mesh_ends_in_the_same_bits(train):
    whole = train(6, SHARDS, folder="alone")
    train(4, SHARDS)
    assert train(6, SHARDS) == whole and whole["is_exact"]


def test_eight_bits_go_on_as_they_were_cut_and_nowhere_else(train):
    options = {"optimizer": "adamw_8bit", "adamw_8bit_maker": "torchao"}
    whole = train(6, SHARDS, folder="alone", **options)
    train(4, SHARDS, **options)
    with pytest.raises(CheckpointError, match=r"E-CKPT-RESHARD.*8 bits cannot be cut anew"):
        train(6, ONE, **options)
    assert train(6, SHARDS, **options) == whole


def test_every_rank_writes_its_own_and_a_lost_piece_is_seen(train):
    train(2, SHARDS)
    (attempt,) = (train.folder / "checkpoints").glob("step-000002/attempt-*")
    files = {path.name: path.stat().st_size for path in attempt.glob("*.safetensors")}
    assert set(files) == {f"{group}-0000{rank}.safetensors" for group in ("model", "optimizer") for rank in (0, 1)}
    assert (
        0.4
        < files["model-00000.safetensors"] / (files["model-00000.safetensors"] + files["model-00001.safetensors"])
        < 0.6
    )
    (attempt / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="E-CKPT-NONE-LOADABLE"):
        train(4, ONE)


def test_overlaps_of_pieces():
    upper, lower = Piece((4, 6), (0, 0), (2, 6)), Piece((4, 6), (2, 0), (2, 6))
    assert upper.overlap(lower) is None
    middle = Piece((4, 6), (1, 2), (2, 3))
    assert middle.overlap(upper) == ((slice(0, 1), slice(0, 3)), (slice(1, 2), slice(2, 5)))
    assert middle.overlap(lower) == ((slice(1, 2), slice(0, 3)), (slice(0, 1), slice(2, 5)))
