"""Which small runs a ladder is made of."""

import math
from dataclasses import replace

import pytest

from groundup.base.errors import ConfigError, DoesNotFit
from groundup.insight.ladder import (
    LEAST_STEPS,
    PATTERN,
    FullRun,
    measured_paces,
    planned_rungs,
    rung_recipe,
    rung_seconds,
    rungs_below,
)
from groundup.insight.shrinking import shrunk, shrunk_to
from groundup.model.config import ModelConfig
from groundup.optim.lr_law import muon_lr
from groundup.stages.config import PretrainConfig
from groundup.stages.recipe import Recipe
from groundup.stages.starter import shape_of
from groundup.train.pace import Pace
from groundup.train.weight_shapes import num_parameters

SHAPE = shape_of(256, 6, 4096)
CONFIG = PretrainConfig(duration="4000 steps", row_length=256, batch_size_tokens=4096, lr="auto", muon_lr=0.02)
FULL = FullRun(SHAPE, CONFIG, rows_per_epoch=10_000, unique_tokens=2_560_000, held_out_rows=64)
SPARSE = ModelConfig(
    model_type="qwen3_moe", hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2, vocab_size=4096,
    mlp_only_layers=(0, 5),
)  # fmt: skip
WINDOWED = ModelConfig(
    model_type="qwen3", hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
    num_key_value_heads=3, vocab_size=1024, sliding_window=64,
    layer_types=("full_attention", "sliding_attention", "full_attention", "sliding_attention"),
)  # fmt: skip


def pace_of(parameters):
    return Pace(step_seconds=parameters * 1e-7, look_seconds=parameters * 1e-9)


@pytest.mark.parametrize("shape", [SHAPE, SPARSE, WINDOWED], ids=["dense", "sparse", "windowed"])
def test_smaller_shapes_are_of_the_same_family(shape):
    whole = num_parameters(shape)
    for factor in (1.0, 0.75, 0.5, 0.3, 0.125, 0.05):
        smaller = shrunk(shape, factor)  # validated: heads divide, layer_types are as many as layers
        assert num_parameters(smaller) <= whole
        assert smaller.vocab_size == shape.vocab_size and smaller.num_experts == shape.num_experts
        groups = (one.num_attention_heads // one.num_key_value_heads for one in (shape, smaller))
        assert len(set(groups)) == 1
    assert smaller.num_hidden_layers == shape.num_hidden_layers, "a law of sizes, not of depths"
    for share in (0.5, 0.3):
        assert num_parameters(shrunk_to(shape, share * whole)) == pytest.approx(share * whole, rel=0.2)
    assert shrunk(shape, 1.0) == shape


def test_a_ladder_stands_below_the_full_run():
    rungs = rungs_below(FULL)
    sizes, lengths = {rung.parameters for rung in rungs}, {rung.steps for rung in rungs}
    assert len(rungs) == len(PATTERN) == len({rung.name for rung in rungs})
    assert [rung.flops for rung in rungs] == sorted(rung.flops for rung in rungs)
    assert 8 <= FULL.rung.flops / rungs[-1].flops < 8.1
    assert max(sizes) == num_parameters(SHAPE) and max(sizes) / min(sizes) == pytest.approx(8, rel=0.2)
    assert 3500 < max(lengths) <= 4000 and min(lengths) == 250
    assert {rung.batch_tokens for rung in rungs} == {4096}
    half = rungs_below(FULL, 1 / 4)
    assert half[-1].flops / rungs[-1].flops == pytest.approx(1 / 4, rel=0.2)
    assert 1750 < max(rung.steps for rung in half) <= 2000


def test_a_time_decides_how_far_it_reaches():
    before = 0.0
    for seconds in (100, 600, 3000):
        rungs = planned_rungs(FULL, seconds, pace_of)
        cost = sum(rung_seconds(rung, FULL, pace_of(rung.parameters)) for rung in rungs)
        assert cost <= seconds and rungs[-1].flops > before
        before = rungs[-1].flops
    ample = planned_rungs(FULL, 1e9, pace_of)
    assert ample == rungs_below(FULL), "the full run itself is no rung"
    with pytest.raises(ConfigError, match=r"hold no ladder.*--time \d+m"):
        planned_rungs(FULL, 10, pace_of)
    short = replace(FULL, config=CONFIG.model_copy(update={"duration": "60 steps", "batch_size_tokens": 256}))
    assert rungs_below(short) == []
    with pytest.raises(ConfigError, match="leave no room"):
        planned_rungs(short, 1e9, pace_of)


def test_few_large_steps_become_more_of_a_smaller_batch():
    large = replace(FULL, config=CONFIG.model_copy(update={"duration": "300 steps", "batch_size_tokens": 65536}))
    rungs = rungs_below(large)
    assert {rung.batch_tokens for rung in rungs} == {8192}
    assert min(rung.steps for rung in rungs) >= LEAST_STEPS


def test_a_rung_s_recipe_is_the_recipe_but_for_its_size():
    recipe = Recipe.model_validate({
        "name": "x", "model": SHAPE.model_dump() | {"vocab_size": "auto"}, "pretrain": CONFIG, "corpus": {"source": "t"},
        "sft": {"data": "c", "duration": "1 epochs", "row_length": 64, "batch_size_tokens": 64},
    })  # fmt: skip
    timed = replace(FULL, config=CONFIG.model_copy(update={"warmup": "80 steps"}))
    rung = rungs_below(FULL)[0]
    made = rung_recipe(recipe, timed, rung)
    assert made.corpus == recipe.corpus and made.sft is None and made.name == rung.name
    assert made.model.vocab_size == "auto" and made.model.hidden_size == rung.shape.hidden_size
    assert made.pretrain.duration == f"{rung.steps} steps" and made.pretrain.warmup == "2.0000 %"
    assert made.pretrain.lr == "auto", "the law moves it"
    law = muon_lr(rung.parameters, 4096) / muon_lr(num_parameters(SHAPE), 4096)
    assert made.pretrain.muon_lr == pytest.approx(0.02 * law) and law > 1
    assert made.pretrain.muon_weight_decay == 0
    decaying = replace(FULL, config=CONFIG.model_copy(update={"muon_weight_decay": 0.01}))
    decay = rung_recipe(recipe, decaying, rung).pretrain.muon_weight_decay
    share = decay * made.pretrain.muon_lr * rung.steps
    assert share == pytest.approx(0.01 * 0.02 * FULL.steps), "a decay given as a number takes the same share of the run"
    assert made.pretrain.schedule == CONFIG.schedule and made.pretrain.row_length == 256
    assert Recipe.model_validate(made.model_dump()) == made


def test_paces_lie_between_what_was_measured(monkeypatch):
    from groundup.insight import ladder

    timed = []

    def measured(shape, config):
        timed.append(num_parameters(shape))
        return pace_of(timed[-1])

    monkeypatch.setattr(ladder, "measure_pace", measured)
    said = []
    pace = measured_paces(FULL, said.append)
    assert len(said) == len(timed) == 3 and max(timed) == num_parameters(SHAPE)
    for parameters in (*timed, math.sqrt(timed[0] * timed[1]), 4 * max(timed)):
        assert pace(parameters).step_seconds == pytest.approx(parameters * 1e-7, rel=1e-6)
    assert pace(1.0).step_seconds == pytest.approx(min(timed) * 1e-7), "no faster than the smallest that was timed"


def test_what_the_memory_does_not_hold_is_no_rung(monkeypatch):
    from groundup.insight import ladder

    def measured(shape, config):
        if num_parameters(shape) > 0.5 * num_parameters(SHAPE):
            raise DoesNotFit("E-MEMORY", what="too large")
        return pace_of(num_parameters(shape))

    monkeypatch.setattr(ladder, "measure_pace", measured)
    rungs = planned_rungs(FULL, 1e9, measured_paces(FULL, lambda line: None))
    assert max(rung.parameters for rung in rungs) < num_parameters(SHAPE)
