"""The fast form of `benchmarks/plan.py`: some small recipes take the memory that was planned."""

import pytest

from benchmarks import plan
from benchmarks.plan import CASES, FAST, Outcome, compare, judge, keep, kept, sections, write_page
from groundup.base.machine import has_fast_bf16
from groundup.train.footprint import Footprint


@pytest.mark.costly
@pytest.mark.parametrize("number", FAST)
def test_a_recipe_takes_the_memory_that_was_planned(number):
    if sections(number)[1].precision == "bf16" and not has_fast_bf16():
        pytest.skip("bf16 products are emulated here: minutes a step")
    outcome = compare(number)
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

    def outcome(number, planned):
        return Outcome(number, "made up", Footprint(**parts | {"process": planned}), 100)

    assert judge([outcome(0, 100), outcome(1, 109), outcome(2, 104)])
    assert not judge([outcome(0, 100), outcome(1, 111), outcome(2, 104)]), "the worst"
    assert not judge([outcome(0, 106), outcome(1, 94), outcome(2, 100), outcome(3, 106)]), "the median"
    assert "held out: 4.0 and 4.0 %" in capsys.readouterr().out
    assert outcome(0, 109).line().count("+9.0 %") == 1 and plan.name_of(0) == "tiny, micro_batch_rows 8"


def made_up(number, planned=100):
    parts = dict.fromkeys(Footprint.__dataclass_fields__, 0)
    return Outcome(number, plan.name_of(number), Footprint(**parts | {"process": planned}), 100)


def test_what_was_measured_is_kept_case_by_case(tmp_path):
    for outcome in (made_up(3), made_up(0), made_up(3, planned=104)):
        keep(outcome, tmp_path)
    found = kept(tmp_path)
    assert [outcome.number for outcome in found] == [0, 3] and found[1].plan.total == 104


def test_the_page_has_a_row_a_case(tmp_path):
    page = tmp_path / "plan.md"
    page.write_text("# Plans\n## Measured\n\nold\n\n## After\n\nstays\n")
    for _ in range(2):
        write_page([made_up(0), made_up(2)], page)
    text = page.read_text()
    assert text.startswith("# Plans\n\n## Measured\n")
    assert text.count("## Measured") == 1 and "old" not in text and text.endswith("\n## After\n\nstays\n")
    assert "| tiny, micro_batch_rows 8 | 0 MB | 0 MB | +0.0 % |" in text
    assert "micro_batch_rows 4 (held out) | 0 MB | 0 MB | +0.0 % |" in text
