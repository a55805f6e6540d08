"""The fast form of `benchmarks/plan_time.py`: what is compared, and the words of it."""

import pytest

from benchmarks import plan_time
from benchmarks.plan_time import NUMBERS, Timed, compare, keep, kept, light, light_name, main, steps_of


def test_at_least_24_recipes_are_timed_each_with_few_rows():
    assert len(NUMBERS) >= 24 and len({light_name(number) for number in NUMBERS}) == len(NUMBERS)
    for number in NUMBERS:
        _, config = light(number)
        assert config.micro_batch_rows <= 4
        assert config.batch_size_tokens == config.micro_batch_rows * config.num_threads * config.row_length
    assert light_name(0) == "tiny, micro_batch_rows 2"


def test_medians_of_the_rounds_are_compared():
    assert Timed(0, [1.05, 9.0, 0.5], [2.0, 1.0, 1.0]).error == pytest.approx(0.05)
    assert Timed(0, [0.1], [0.08]).cells() == ("tiny, micro_batch_rows 2", "100 ms", "80 ms", "+25.0 %")
    assert [steps_of(seconds) for seconds in (10.0, 0.1, 0.001)] == [4, 21, 60]


def test_what_was_measured_goes_to_the_page_and_is_judged(tmp_path, monkeypatch, capsys):
    page = tmp_path / "plan.md"
    page.write_text("# Plans\n")
    monkeypatch.setattr(plan_time, "PAGE", page)
    monkeypatch.setattr(plan_time, "kept", lambda: kept(tmp_path))
    for number, taken in ((4, 1.2), (0, 1.0), (2, 1.0)):
        keep(Timed(number, [1.0], [taken]), tmp_path)
    monkeypatch.setattr("sys.argv", ["plan_time", "--cases", "--page"])
    assert main() == 0 and "3 recipes: median 0.0 %, worst 16.7 %, 2 within 10 %" in capsys.readouterr().out
    lines = page.read_text().splitlines()
    assert lines[2] == "## Time" and lines[-3].startswith("| tiny, micro_batch_rows 2 | 1,000 ms | 1,000 ms |")
    keep(Timed(0, [1.0], [1.2]), tmp_path)
    assert main() == 1, "the median"


@pytest.mark.slow
def test_a_run_takes_the_time_that_its_probe_took():
    outcome = compare(0, rounds=1)
    assert abs(outcome.error) <= 0.25, outcome
