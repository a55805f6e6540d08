"""Every way to spread a model is one process within 1e-5, and really spreads; what breaks that is seen."""

import types
from pathlib import Path

import pytest
from parallel.tiny_shapes import DENSE, EXPERTS, shape_of

from groundup.base.errors import DistributedError
from groundup.proof.spread import table
from groundup.proof.spread.table import CASES, Case, Result, judge
from groundup.stages.recipe import load_recipe

pytestmark = pytest.mark.costly

RARE = {"tensor 2, muon", "tensor 2, bf16", "pipeline 2, muon", "pipeline 2, bf16", "data_shard 2 × tensor 2, muon"}
"""Second and third of a kind: only in the long tests."""
FAULTS = Path(__file__).with_name("faulty_spread.py")


def cases_of(num_ranks):
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in RARE else [])
        for case in CASES
        if case.num_ranks == num_ranks and "engine" not in case.parallel  # DeepSpeed's ranks: test_deepspeed.py
    ]


def shape_for(case):
    return shape_of(EXPERTS if case.needs_experts else DENSE)


@pytest.mark.parametrize("case", cases_of(2))
def test_two_ranks_are_one_process(on_two_ranks, case):
    result = judge(case, on_two_ranks, shape_for(case))
    assert result.verdict == "PASS", result.line()


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", cases_of(4))
def test_four_ranks_are_one_process(on_four_ranks, case):
    result = judge(case, on_four_ranks, shape_for(case))
    assert result.verdict == "PASS", result.line()


@pytest.mark.parametrize("shape", [DENSE | {"tie_word_embeddings": False}, EXPERTS], ids=["untied", "experts"])
def test_other_models_are_sharded_too(on_two_ranks, shape):
    result = judge(Case({"data_shard": 2}), on_two_ranks, shape_of(shape))
    assert result.verdict == "PASS", result.line()


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_experts_that_the_shards_do_not_divide_are_cut_inside_their_matrices(on_two_ranks, optimizer):
    result = judge(Case({"data_shard": 2}, optimizer=optimizer), on_two_ranks, shape_of(EXPERTS | {"num_experts": 3}))
    assert result.verdict == "PASS", result.line()
    assert result.figures["held"] < 0.52, "padded to a whole expert"


@pytest.mark.parametrize(
    ("fault", "says"),
    [("averages", '"norm": 0.5'), ("shards_nothing", "nothing was sharded"), ("norm_of_a_shard", '"losses"')],
)
def test_a_fault_is_seen(on_two_ranks, fault, says):
    def run(where, name, *arguments):
        return on_two_ranks(FAULTS, fault, *arguments)

    result = judge(Case({"data_shard": 2}), run, shape_of(DENSE))
    assert result.verdict == "FAIL" and says in result.reason, result.line()


def test_one_that_fails_is_exit_6(monkeypatch):
    monkeypatch.setattr(table, "CASES", (Case({"data_replicate": 1}),))
    monkeypatch.setattr(table, "judge", lambda *_: Result("x", "FAIL", 1e-5, {"loss": 1.0, "held": 1.0}))
    said = []
    with pytest.raises(DistributedError, match="E-PROOF: not as one process: x") as caught:
        table.doctor_parallel(load_recipe("quickstart"), types.SimpleNamespace(say=said.append))
    assert caught.value.exit_code == 6 and said[-1] == "1 FAIL"
