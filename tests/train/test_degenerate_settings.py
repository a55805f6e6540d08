"""Settings at the edge of sense: refused before anything runs, or trained without a NaN."""

import math

import pytest

from groundup.base.config import validate
from groundup.base.errors import ConfigError
from groundup.proof.tiny_job import tiny_config
from groundup.train.config import TrainConfig
from groundup.train.run import TrainingRun

pytestmark = pytest.mark.costly


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in (0, -1e-3, math.inf, math.nan)),
        *((name, 0) for name in ("batch_size_tokens", "row_length", "micro_batch_rows", "max_grad_norm")),
        *(("duration", text) for text in ("0 steps", "-3 steps", "inf steps")),
        *(("spike_deviations", 0), ("keep_checkpoints", 0), ("checkpoint_every", "0 steps"), ("max_grad_norm", -1)),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(name, value):
    values = tiny_config().model_dump() | {name: value}
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, values, where="recipe.yaml", lines={})
    assert caught.value.exit_code == 2 and name in caught.value.line()


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": "11 steps"},
        {"batch_size_tokens": 16, "micro_batch_rows": 1},
        {"micro_batch_rows": 64},
        {"max_grad_norm": 1e-12},
        {"duration": "1 steps", "warmup": "100 %"},
        {"lr": 1e-30},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_odd_trains_without_a_nan(make_job, changes, optimizer):
    outcome = TrainingRun(make_job("run", optimizer=optimizer, **changes)).run()
    assert all(bool(weight.isfinite().all()) for weight in outcome.weights.values())
    assert outcome.figures["skipped_steps"] == 0 and outcome.figures["steps"] == (1 if "duration" in changes else 11)
