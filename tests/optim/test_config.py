"""Settings that no run could use are refused in words, before anything is built."""

import math

import pytest
from pydantic import ValidationError

from groundup.base.config import validate
from groundup.base.errors import ConfigError
from groundup.optim.config import OptimConfig

BAD = {
    "lr": [0, -1e-3, math.inf, math.nan, "fast"],
    "muon_lr": [0, -1.0, math.inf, "Auto"],
    "embedding_lr": [0, -1.0, math.inf, "auto"],
    "vector_lr": [0.0],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (1.5, 0.9), (0.9,), (0.9, math.nan), 0.9],
    "eps": [0, -1e-8, math.inf],
    "weight_decay": [-0.1, math.inf],
    "muon_weight_decay": [-0.1, "Auto"],
    "muon_momentum": [1.0, -0.1],
    "sgd_momentum": [1.0, -0.1, math.nan],
    "ema_decay": [0, 1, 1.5, -0.9, math.nan],
    "lr_floor": [-0.1, 1.1],
    "decay_fraction": [0, 1.1, -0.5],
    "decay_shape": ["steep"],
    "schedule": ["cosin"],
    "optimizer": ["adam"],
    "adamw_8bit_maker": ["me"],
    "max_grad_norm": [0, -1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_it_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"E-CONFIG-(VALUE|MISSING): .?{name}\b"):
        validate(OptimConfig, {name: value}, where="recipe.yaml", lines={name: 3})


def test_every_field_is_among_them():
    free = {"warmup", "decay_embeddings", "decay_vectors"}  # a warmup has tests of its own, a switch has two values
    assert BAD.keys() | free >= OptimConfig.model_fields.keys()


def test_borders_are_taken():
    OptimConfig(betas=(0.0, 0.0), sgd_momentum=0.0, muon_momentum=0.0, lr_floor=0.0, decay_fraction=1.0, weight_decay=0)
    with pytest.raises(ValidationError, match="extra"):
        OptimConfig(learning_rate=1e-3)
