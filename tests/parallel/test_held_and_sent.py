"""What a rank holds and sends, measured on ranks at work, beside the formulas of memory and of messages."""

from collections import Counter
from pathlib import Path

import pytest
from parallel.tiny_shapes import DENSE, EXPERTS

from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.cut import Spread
from groundup.parallel.traffic import SHARES, sent_bytes
from groundup.proof.spread import measure
from groundup.train.footprint import Training, footprint, lasting_bytes

pytestmark = pytest.mark.costly
WORK = Path(__file__).with_name("work_held.py")

TWO = [
    (DENSE, {"data_replicate": 2}, "fp32"),
    (DENSE, {"data_shard": 2}, "fp32"),
    (DENSE, {"data_shard": 2}, "bf16"),
    (DENSE, {"data_shard": 2, "shard": "gradients"}, "bf16"),
    (DENSE, {"tensor": 2}, "fp32"),
    (DENSE, {"tensor": 2}, "bf16"),
    (EXPERTS, {"tensor": 2}, "fp32"),
    (DENSE, {"context": 2}, "fp32"),
    (EXPERTS, {"expert": 2}, "fp32"),
    (DENSE, {"pipeline": 2}, "fp32"),
    (DENSE, {"pipeline": 2, "pipeline_schedule": "interleaved"}, "fp32"),
]
FOUR = [
    (DENSE, {"data_replicate": 2, "data_shard": 2}, "fp32"),
    (DENSE, {"data_shard": 2, "tensor": 2}, "fp32"),
    (DENSE, {"data_shard": 2, "context": 2}, "fp32"),
    (EXPERTS, {"data_shard": 2, "expert": 2}, "fp32"),
    (DENSE, {"pipeline": 2, "data_shard": 2}, "fp32"),
    (DENSE, {"pipeline": 2, "tensor": 2}, "fp32"),
]
FEW = 4_000
"""Bytes of a step's messages that the formula leaves out: losses, norms, loads; and what it counts of tokens without a label."""


def named(case):
    return " ".join(map(str, [*case[1].items(), case[2]])) if isinstance(case, tuple) else None


def check(run, case):
    shape, parallel, dtype = case
    answers = run(measure.__name__, "measure", ModelConfig(**shape).model_dump(mode="json"), parallel, "adamw", dtype)
    whole = sum(size for size in _alone(shape).values())
    for answer in answers:
        found = answer["value"]
        for part, planned in found["held by formula"].items():
            assert found["held"][part] == pytest.approx(planned, rel=0.05), part
        if set(parallel) & {"data_shard", "tensor", "expert", "pipeline"}:
            assert sum(found["held"].values()) < 0.95 * whole, "nothing was sharded"
    # of tokens that travel to experts one rank gets more than another
    together = [answers] if "expert" in parallel else [[answer] for answer in answers]
    for group in together:
        sent, planned = (Counter(), Counter())
        for answer in group:
            sent.update(answer["value"]["sent"])
            planned.update(answer["value"]["sent by formula"])
        assert planned, "nothing was counted"
        for kind in planned.keys() | sent.keys():
            assert sent[kind] == pytest.approx(planned[kind], rel=0.01, abs=FEW), kind


def _alone(shape):
    training = Training(rows=2, row_length=64, batch_rows=8, optim=OptimConfig(optimizer="adamw"))
    return lasting_bytes(ModelConfig(**shape), training)


@pytest.mark.parametrize("case", TWO, ids=named)
def test_two_ranks_hold_and_send_what_the_formula_says(on_two_ranks, case):
    check(on_two_ranks, case)


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", FOUR, ids=named)
def test_four_ranks_hold_and_send_what_the_formula_says(on_four_ranks, case):
    check(on_four_ranks, case)


@pytest.mark.parametrize(
    ("shape", "parallel", "dtype"),
    [
        (DENSE, {"tensor": 2}, "fp32"),
        (DENSE, {"tensor": 2}, "bf16"),
        (DENSE, {"context": 2}, "fp32"),
        (EXPERTS, {"expert": 2}, "fp32"),
    ],
)
def test_activations_of_a_rank_are_what_autograd_saves(on_two_ranks, shape, parallel, dtype):
    shape = ModelConfig(**shape).model_dump(mode="json")
    for answer in on_two_ranks(measure.__name__, "saved", shape, parallel, dtype):
        found, planned = answer["value"]
        assert found == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shard", ["gradients", "parameters"])
def test_gradients_wait_whole_in_fp32_for_the_last_micro_batch(on_two_ranks, shard, dtype):
    shape = ModelConfig(**DENSE)
    parallel = {"data_shard": 2, "shard": shard}
    spread = Spread(data_shard=2, shard=shard)
    training = Training(rows=2, row_length=64, batch_rows=4, optim=OptimConfig(), precision=dtype, spread=spread)
    for answer in on_two_ranks(WORK, "accumulated", shape.model_dump(mode="json"), parallel, dtype):
        assert answer["value"] == {"torch.float32": footprint(shape, training).gradients}


def test_sent_is_a_share_of_what_a_message_has():
    payload = {("data_shard", "all_gather"): 800, ("data_shard", "all_reduce"): 80, ("all ranks", "broadcast"): 5}
    assert sent_bytes(payload, {"data_shard": 8}) == {"data_shard": 700 + 140}
    assert SHARES["all_reduce"](2) == 1.0
