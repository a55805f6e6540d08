"""Expert parallel: ranks that hold some of the experts compute what one process does, whatever the router does."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.costly

WORK = Path(__file__).with_name("work_of_token_ranks.py")
EQUAL = 1e-5
ROWS, CHOSEN, LAYERS = 8 * 48, 2, 2
SIZE, WIDTH = 16, 32
SHAPE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": SIZE}
MOE = SHAPE | {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}
DOTS = SHAPE | {"model_type": "dots1", "n_shared_experts": 1}


def check_equal(answers, num_local):
    for answer in answers:
        found = answer["value"]
        assert max(found["totals"].values()) < EQUAL, found["totals"]
        assert max(found["gradients"].values()) < EQUAL, found["gradients"]
        assert not found["without"]
        shapes = {name.rsplit(".")[-1]: shape for name, shape in found["shapes"].items()}
        assert shapes == {"gate_up_proj": [num_local, 2 * SIZE, WIDTH], "down_proj": [num_local, WIDTH, SIZE]}


@pytest.mark.parametrize("kind", ["none", "block", "selective"])
def test_two_ranks_with_half_the_experts_equal_one(on_two_ranks, kind):
    answers = on_two_ranks(WORK, "compare", {"expert": 2}, MOE, "sdpa", kind)
    check_equal(answers, 2)
    assert sum(sum(answer["value"]["rows"]) for answer in answers) == ROWS * CHOSEN * LAYERS * (1 + (kind != "none"))


def test_a_compiled_block_breaks_where_tokens_travel(on_two_ranks):
    check_equal(on_two_ranks(WORK, "compare", {"expert": 2}, MOE, "sdpa", "none", [], True), 2)


@pytest.mark.parametrize("crowded", [[0, 1], [2, 3], [0, 3]])
def test_a_rank_that_gets_nothing_keeps_up(on_two_ranks, crowded):
    answers = on_two_ranks(WORK, "compare", {"expert": 2}, DOTS, "sdpa", "block", crowded)
    check_equal(answers, 2)
    for rank, answer in enumerate(answers):
        num_here = sum(expert // 2 == rank for expert in crowded)
        # a micro-batch of two rows of 48 tokens from each of two ranks
        assert set(answer["value"]["rows"]) == {2 * 2 * 48 * num_here}


@pytest.mark.parametrize(
    ("degrees", "num_local"),
    [({"expert": 4}, 1), ({"expert": 2, "data_replicate": 2}, 2), ({"expert": 2, "context": 2}, 2)],
)
def test_four_ranks_equal_one(on_four_ranks, degrees, num_local):
    check_equal(on_four_ranks(WORK, "compare", degrees, MOE), num_local)
