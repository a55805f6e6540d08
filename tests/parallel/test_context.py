"""Context parallel: a rank that has part of a row's tokens computes what one process does."""

from pathlib import Path

import pytest
import torch

from groundup.model.segments import Segments
from groundup.parallel.context import local_part
from groundup.parallel.mesh import Mesh

pytestmark = pytest.mark.costly

WORK = Path(__file__).with_name("work_of_token_ranks.py")
EQUAL = 1e-5
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BALANCE = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}


def check_equal(answers, length):
    for answer in answers:
        found = answer["value"]
        assert max(found["totals"].values()) < EQUAL, found["totals"]
        assert max(found["gradients"].values()) < EQUAL, found["gradients"]
        assert not found["without"]
        assert set(found["tokens"]) == {length}, "nothing was cut"
        assert set(found["keys"]) == {48}, "no keys were gathered"


@pytest.mark.parametrize(
    ("changes", "maker", "kind"),
    [
        ({}, "sdpa", "none"),
        (LAYERS | DYNAMIC, "dense", "block"),
        (LAYERS, "chunked", "selective"),
        (MOE | BALANCE, "sdpa", "selective"),
        (MOE | BALANCE | {"router_aux_loss_scope": "batch"}, "sdpa", "none"),
    ],
)
def test_two_parts_of_rows_equal_the_whole(on_two_ranks, changes, maker, kind):
    check_equal(on_two_ranks(WORK, "compare", {"context": 2}, changes, maker, kind), 24)


@pytest.mark.slow
def test_a_compiled_block_gathers_without_a_break(on_two_ranks):
    check_equal(on_two_ranks(WORK, "compare", {"context": 2}, {}, "sdpa", "none", [], True), 24)


@pytest.mark.parametrize(("degrees", "length"), [({"context": 4}, 12), ({"context": 2, "data_replicate": 2}, 24)])
def test_four_ranks_equal_one(on_four_ranks, degrees, length):
    check_equal(on_four_ranks(WORK, "compare", degrees, MOE | BALANCE | {"sliding_window": 7}), length)


def test_whole_rows_are_still_computed_by_each_rank(on_two_ranks):
    for answer in on_two_ranks(WORK, "whole_rows", {}):
        assert answer["value"] == 0


@pytest.mark.parametrize("maker", ["varlen", "flex"])
def test_a_maker_that_needs_all_queries_is_refused(on_two_ranks, maker):
    for answer in on_two_ranks(WORK, "refuse", maker):
        assert answer["error"].startswith(f"E-CONFIG-ATTENTION: attention: {maker} needs as many queries as keys")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("degree", [2, 3])
def test_parts_see_what_the_whole_sees(degree, window):
    generator = torch.Generator().manual_seed(degree)
    tokens_BT = torch.arange(3 * 24).view(3, 24)
    labels_BT = torch.where(torch.rand(3, 24, generator=generator) < 0.5, tokens_BT, -100)
    whole = Segments.from_borders(torch.rand(3, 24, generator=generator) < 0.2)
    seen, pairs, counts = [], [], torch.zeros(3, dtype=torch.int64)
    for rank in range(degree):
        part = local_part(tokens_BT, labels_BT, whole, Mesh({"context": degree}, rank=rank))
        index_T, segments = part.segments.query_T, part.segments
        assert part.tokens_BT.equal(tokens_BT[:, index_T]) and part.labels_BT.equal(labels_BT[:, index_T])
        assert segments.mask_BTT(window).equal(whole.mask_BTT(window)[:, index_T])
        assert segments.bias_B1TT(torch.float32).equal(whole.bias_B1TT(torch.float32)[:, :, index_T])
        assert segments.position_ids_BT.equal(whole.position_ids_BT[:, index_T])
        assert segments.first_seen_BT(window).equal(whole.first_seen_BT(window)[:, index_T])
        assert segments.lengths_BT.equal(whole.lengths_BT[:, index_T])
        counts += torch.tensor(part.counts)
        seen += index_T.tolist()
        pairs.append(int((index_T + 1).sum()))
    assert sorted(seen) == list(range(24)) and counts.equal((labels_BT != -100).sum(1))
    assert len(set(pairs)) == 1, "ranks have unequal work"
