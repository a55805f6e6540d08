"""`groundup plan --budget`: how to split it."""

import math
import re

import pytest
from stages.conftest import groundup, refusal

from groundup.base.errors import ConfigError
from groundup.insight import budget
from groundup.insight.budget import (
    Candidate,
    Question,
    attention_share,
    best_of,
    candidates,
    flops_a_token,
    head_share,
    measured_rates,
    parse_budget,
    smaller_for_use,
    vocabulary_for,
    what_next,
)
from groundup.insight.budget_words import WIDTH, _use, budget_lines
from groundup.insight.laws import REPLICATION
from groundup.stages.starter import shape_of
from groundup.train.weight_shapes import num_parameters


def asked(flops, text_bytes=math.inf):
    return Question(lambda shape: flops, text_bytes)


def test_budgets_are_read_as_people_write_them():
    assert parse_budget("2h").seconds == 7200 and parse_budget("90 min").seconds == 5400
    assert parse_budget("1e18FLOPs").flops == 1e18
    money = parse_budget("50USD")
    assert (money.money, money.currency) == (50, "USD") and money.seconds is None
    for text in ("", "2", "h", "0h", "-2h", "2 parsecs", "50dollars", "infh", "nanh"):
        with pytest.raises(ConfigError, match="is no budget"):
            parse_budget(text)


def test_the_best_shape_is_near_what_the_law_says():
    for flops in (1e18, 1e20, 1e22):
        found = candidates(asked(flops))
        best = found[best_of(found)]
        parameters, tokens = REPLICATION.best_split(flops)
        assert 0.4 < best.parameters / parameters < 2.5 and 0.3 < best.tokens / tokens < 3
        assert best.tokens * best.flops_a_token == pytest.approx(flops)
        assert 10 < best.tokens_a_parameter < 60


def test_more_budget_takes_larger_models_and_more_tokens():
    found = [candidates(asked(flops)) for flops in (1e14, 1e16, 1e18, 1e20, 1e22)]
    best = [rows[best_of(rows)] for rows in found]
    for field in ("parameters", "tokens", "vocabulary"):
        values = [getattr(row, field) for row in best]
        assert values == sorted(values), field
    assert [row.loss for row in best] == sorted((row.loss for row in best), reverse=True)


def test_little_text_makes_models_smaller_and_asks_for_more():
    plenty, little = (candidates(asked(1e18, text_bytes)) for text_bytes in (1e13, 1e8))
    assert plenty[best_of(plenty)].epochs < 0.1 and little[best_of(little)].epochs > 10
    assert little[best_of(little)].loss > plenty[best_of(plenty)].loss
    assert little[best_of(little)].vocabulary <= plenty[best_of(plenty)].vocabulary
    assert "more data" in what_next(asked(1e18, 1e8), little)[0].words
    steps = what_next(asked(1e18, 1e13), plenty)
    assert not any("more data" in step.words for step in steps), "the text is not used up"
    assert len(steps) == 2 and all(step.gain > 0 for step in steps)
    lines = "\n".join(budget_lines("x", asked(1e18, 1e8)))
    assert "What would help next: more data" in lines and "The text is read" in lines
    told = "\n".join(budget_lines("x", asked(1e14, 6e5)))
    assert "(next to nothing)" in told and "-0.000" not in told, "text that is read hundreds of times"
    notes = ["groundup init" in "\n".join(budget_lines("x", asked(flops))) for flops in (1e14, 1e19)]
    assert notes == [True, False], "where the laws were never fitted"


def test_vocabularies_grow_with_the_model_and_the_text():
    sizes = [vocabulary_for(rung, math.inf) for rung in budget.RUNGS]
    assert sizes == sorted(sizes) and sizes[0] <= 2048 and sizes[-1] == 32768
    assert vocabulary_for((1024, 16), 1 << 19) == 1024


def test_shares_of_operations_are_shares():
    shape = shape_of(128, 4, 32768)
    assert head_share(shape) > 0.7 > head_share(shape_of(1024, 16, 4096))
    shares = [attention_share(shape_of(256, 6, 4096), length) for length in (128, 512, 2048)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1
    deep = shape_of(1024, 16, 4096)
    assert flops_a_token(deep, 128) == pytest.approx(6 * num_parameters(deep), rel=0.02), "6 N, nearly"


def test_a_smaller_model_pays_once_it_is_used_enough():
    parameters, tokens = REPLICATION.best_split(1e21)
    half = smaller_for_use(REPLICATION, parameters, tokens, 0.5)
    assert 1.05 < half.overhead < 1.3
    used = half.pays_after
    trained = half.share * parameters * half.overhead * tokens / half.share
    costs = [6 * parameters * tokens + 2 * parameters * used, 6 * trained + 2 * half.share * parameters * used]
    assert costs[0] == pytest.approx(costs[1])
    assert smaller_for_use(REPLICATION, parameters, tokens, 0.01) is None


def test_a_smaller_model_that_is_cheaper_to_train_pays_at_once():
    parameters, tokens = REPLICATION.best_split(1e21)
    question = Question(lambda shape: 1e21)
    large = Candidate(1, 1, 32768, int(4 * parameters), tokens / 8, 0.0, 3.0, 1.0)
    assert _use(question, large).endswith("that pays at once.")
    best = Candidate(1, 1, 32768, int(parameters), tokens, 0.0, 3.0, 1.0)
    assert re.search(r"that pays once the model reads and writes more than .* tokens\.$", _use(question, best))


def test_rates_are_measured_until_steps_are_long(monkeypatch):
    monkeypatch.setattr(budget, "seconds_a_step", lambda shape, config: num_parameters(shape) / 2e6)
    said = []
    rate_of = measured_rates(said.append)
    timed = [shape_of(*rung, 4096) for rung in budget.LADDER[1::2]][: len(said)]
    assert 2 <= len(said) < len(budget.LADDER[1::2]), "larger shapes are not timed"
    for shape in timed:
        rate = flops_a_token(shape, budget.ROW_LENGTH) * budget.PROBED_TOKENS / (num_parameters(shape) / 2e6)
        assert rate_of(shape) == pytest.approx(rate)
    assert rate_of(shape_of(4096, 40, 4096)) == pytest.approx(rate_of(timed[-1]))


def test_the_command_answers_in_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "seconds_a_step", lambda shape, config: 0.1)
    (tmp_path / "text.txt").write_text("some text\n" * 1000)
    for arguments in (
        ["--budget", "1e17FLOPs"],
        ["--budget", "2h", "--data", tmp_path / "text.txt"],
        ["--budget", "50USD", "--price-per-hour", "2"],
    ):
        said = groundup("plan", *arguments)
        assert said.code == 0, said.err
        lines = said.out.splitlines()
        assert all(len(line) <= WIDTH for line in lines), max(lines, key=len)
        assert sum(line.startswith("  ›") for line in lines) == 2 and "What would help next" in said.out
    for arguments in (
        ["--budget", "50USD"],
        ["--budget", "2h", "--no-probe"],
        ["--budget", "much"],
        [],
        ["quickstart", "--budget", "2h"],
    ):
        assert refusal("plan", *arguments).code == 2
    assert refusal("plan", "--budget", "2h", "--data", tmp_path / "nowhere").code == 3
