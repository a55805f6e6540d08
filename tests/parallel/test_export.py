"""One directory of what many ranks hold: the first one has its part and the tensor in hand, never the model."""

import importlib.util
from pathlib import Path

import pytest
from parallel.test_fill import FOUR, SMALL, TWO, WIDE, named
from parallel.tiny_shapes import DENSE, shape_of

from groundup.parallel.config import ZERO_STAGES
from groundup.proof.rank_server import RankGroup

pytestmark = pytest.mark.costly
WORK = Path(__file__).with_name("work_export.py")


def check(run, case, tmp_path, tokenizer, way="streamed"):
    shape, parallel = case
    arguments = shape_of(shape | WIDE), parallel, str(tmp_path / "model"), str(tokenizer)
    first, *others = [answer["value"] for answer in run(WORK, way, *arguments)]
    assert first["differ"] == []
    # a piece that does not lie in one run of the whole is received beside it
    bound = 1.5 * first["largest"] + SMALL
    assert first["made"] <= bound, f"{first['made']:,} bytes were made"
    assert all(rank["made"] <= bound for rank in others)
    assert bound < 0.6 * first["whole"], "the bound says nothing"


@pytest.mark.parametrize("case", [TWO[0], TWO[4], TWO[5], TWO[8]], ids=named)
def test_the_first_of_two_ranks_has_one_tensor_more(on_two_ranks, case, tmp_path, tokenizer_folder):
    check(on_two_ranks, case, tmp_path, tokenizer_folder())


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", [FOUR[1], FOUR[3], FOUR[4], FOUR[5]], ids=named)
def test_the_first_of_four_ranks_has_one_tensor_more(on_four_ranks, case, tmp_path, tokenizer_folder):
    check(on_four_ranks, case, tmp_path, tokenizer_folder())


def test_a_model_that_is_gathered_first_is_seen(on_two_ranks, tmp_path, tokenizer_folder):
    with pytest.raises(AssertionError, match="bytes were made"):
        check(on_two_ranks, (DENSE, {"data_shard": 2}), tmp_path, tokenizer_folder(), way="gathered")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.slow
def test_deepspeed_too(tmp_path, tokenizer_folder):
    with RankGroup(tmp_path / "meet") as ranks:
        for stage, shard in enumerate(ZERO_STAGES, 1):
            parallel = {"engine": "deepspeed", "shard": shard, "data_shard": 2}
            check(ranks.run, (DENSE, parallel), tmp_path / str(stage), tokenizer_folder())
