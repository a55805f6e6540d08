"""The fast form of `benchmarks/plan.py`: some small recipes take the memory that was planned."""

import pytest

from benchmarks import plan
from benchmarks.plan import CASES, FAST, Outcome, compare, judge, sections
from groundup.base.machine import has_fast_bf16
from groundup.train.footprint import Footprint


@pytest.mark.costly
@pytest.mark.parametrize("number", FAST)
def test_a_recipe_takes_the_memory_that_was_planned(number):
    if sections(number)[1].precision == "bf16" and not has_fast_bf16():
        pytest.skip("bf16 products are emulated here: minutes a step")
    outcome = compare(number, rounds=0)
    assert outcome.plan.process > 100e6 and outcome.measured > outcome.plan.process
    assert abs(outcome.memory_error) <= 0.10, outcome.line()


def test_every_case_is_a_recipe_of_its_own():
    assert len(CASES) >= 24
    assert len({str(sections(number)) for number in range(len(CASES))}) == len(CASES)
    configs = [sections(number)[1] for number in range(len(CASES))]
    for field in ("precision", "optimizer", "activation_checkpointing", "adapter", "attention", "row_length"):
        assert len({getattr(config, field) for config in configs}) > 1, field


def test_plans_that_miss_are_judged_so(capsys):
    parts = dict.fromkeys(Footprint.__dataclass_fields__, 0)

    def outcome(number, planned, **times):
        return Outcome(number, "made up", Footprint(**parts | {"process": planned}), 100, **times)

    assert judge([outcome(0, 100), outcome(1, 109), outcome(2, 104)])
    assert not judge([outcome(0, 100), outcome(1, 111), outcome(2, 104)]), "the worst"
    assert not judge([outcome(0, 106), outcome(1, 94), outcome(2, 100), outcome(3, 106)]), "the median"
    assert not judge([outcome(0, 100, probed_seconds=1.2, run_seconds=1.0)]), "the time"
    assert judge([outcome(0, 100, probed_seconds=1.05, run_seconds=1.0)])
    assert "held out: 4.0 and 4.0 %" in capsys.readouterr().out
    assert outcome(0, 109).line().count("+9.0 %") == 1 and plan.name_of(0) == "tiny, micro_batch_rows 8"
