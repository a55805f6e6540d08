"""A model that is cut before it has weights: no rank holds more than its part and one tensor, and the bits are those of
one process."""

from pathlib import Path

import pytest
from parallel.tiny_shapes import DENSE, EXPERTS, shape_of

pytestmark = pytest.mark.costly
WORK = Path(__file__).with_name("work_fill.py")
UNTIED = DENSE | {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False, "vocab_size": 64}
BIASED_EXPERTS = EXPERTS | {"model_type": "dots1", "num_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
BIASED_EXPERTS |= {"router_aux_loss_coef": 0.0}
TWO = [
    (DENSE, {"data_shard": 2}),
    (DENSE, {"data_shard": 2, "shard": "gradients"}),
    (UNTIED, {"data_shard": 2}),
    (DENSE, {"tensor": 2}),
    (UNTIED, {"tensor": 2}),
    (DENSE, {"pipeline": 2}),
    (DENSE, {"pipeline": 2, "pipeline_schedule": "interleaved"}),
    (UNTIED, {"pipeline": 2}),
    (EXPERTS, {"expert": 2}),
    (BIASED_EXPERTS, {"data_shard": 2}),
    (DENSE, {"context": 2}),
    (DENSE, {"data_replicate": 2}),
]
FOUR = [
    (DENSE, {"data_shard": 4}),
    (BIASED_EXPERTS, {"data_shard": 4}),
    (DENSE, {"data_replicate": 2, "data_shard": 2}),
    (DENSE, {"data_shard": 2, "tensor": 2}),
    (UNTIED, {"pipeline": 2, "tensor": 2}),
    (EXPERTS, {"data_shard": 2, "expert": 2}),
    (DENSE, {"pipeline": 2, "data_shard": 2}),
]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
SMALL = 8_192
"""Bytes that are neither weights nor grow with them: what torch allocates to place them."""


def named(case):
    return " ".join(map(str, case[1].items())) if isinstance(case, tuple) else None


def check(run, case, way="drawn", *arguments):
    shape, parallel = case
    found = [answer["value"] for answer in run(WORK, way, shape_of(shape | WIDE), parallel, *arguments)]
    for rank in found:
        assert rank["differ"] == [] and rank["trained"]
        assert rank["own"] < rank["peak"] <= rank["formula"] + SMALL, f"{rank['peak']:,} bytes at once"
    if way == "drawn":  # the first stages stop drawing early
        assert max(rank["peak"] / rank["formula"] for rank in found) == pytest.approx(1, abs=0.05)
    if set(parallel) & {"data_shard", "tensor", "expert", "pipeline"}:
        assert all(rank["formula"] + SMALL < 0.9 * rank["whole"] for rank in found), "the bound says nothing"


@pytest.mark.parametrize("case", TWO, ids=named)
def test_two_ranks_hold_their_part_and_one_tensor(on_two_ranks, case):
    check(on_two_ranks, case)


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", FOUR, ids=named)
def test_four_ranks_hold_their_part_and_one_tensor(on_four_ranks, case):
    check(on_four_ranks, case)


@pytest.mark.parametrize("case", [TWO[0], TWO[4], TWO[5], TWO[8], TWO[9]], ids=named)
def test_two_ranks_read_their_part_of_a_directory(on_two_ranks, case, tmp_path):
    check(on_two_ranks, case, "read", str(tmp_path))


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", [FOUR[1], FOUR[3], FOUR[4], FOUR[5]], ids=named)
def test_four_ranks_read_their_part_of_a_directory(on_four_ranks, case, tmp_path):
    check(on_four_ranks, case, "read", str(tmp_path))


def test_a_model_that_is_built_whole_is_seen(on_two_ranks):
    with pytest.raises(AssertionError, match="bytes at once"):
        check(on_two_ranks, (DENSE, {"data_shard": 2}), way="built_whole")


@pytest.mark.parametrize("shape", [DENSE, UNTIED], ids=["tied", "untied"])
def test_two_ranks_read_their_part_of_an_adapters_base(on_two_ranks, shape, tmp_path):
    check(on_two_ranks, (shape, {"data_shard": 2}), "read", str(tmp_path), {})


@pytest.mark.parametrize("shape", [DENSE, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("more", [({"use_dora": True},), ({}, (3, 41))], ids=["dora", "tokens"])
def test_two_ranks_make_an_adapter_out_of_their_base(on_two_ranks, shape, more, tmp_path):
    check(on_two_ranks, (shape, {"data_shard": 2}), "read", str(tmp_path), *more)


def test_two_ranks_pack_a_base_matrix_by_matrix(on_two_ranks, tmp_path):
    """How much of it is there at a time: `tests/adapters/test_out_of_a_base.py`."""
    answers = on_two_ranks(WORK, "read", shape_of(DENSE | WIDE), {"data_shard": 2}, str(tmp_path), {"adapter": "qlora"})
    for answer in answers:
        assert answer["value"]["differ"] == [] and answer["value"]["trained"]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_masters_lie_where_the_weights_lay(on_two_ranks, parallel):
    for answer in on_two_ranks(WORK, "engine_made", shape_of(DENSE | WIDE), parallel):
        found = answer["value"]
        assert found["more"] == pytest.approx(found["own"] / 2, rel=0.05), "the copy in bf16 alone is new"
