"""Learning-rate schedules against their formulas."""

import math

import pytest

from groundup.optim.config import OptimConfig
from groundup.optim.schedules import lr_multiplier, warmup_steps_of

TOTAL, WARMUP, FLOOR = 110, 10, 0.2


def curve(schedule, *, warmup=WARMUP, total=TOTAL, floor=FLOOR):
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, lr_floor=floor)
    return [lr_multiplier(step, config, total) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 1 - 0.8 * progress),
        ("cosine", lambda progress: 0.2 + 0.8 * (1 + math.cos(math.pi * progress)) / 2),
    ],
)
def test_schedules_follow_their_formulas(schedule, formula):
    found = curve(schedule)
    assert found[:WARMUP] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[WARMUP:] == pytest.approx([formula(step / 99) for step in range(100)])
    assert found[WARMUP] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(1.0 if schedule == "constant" else FLOOR)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 5), (1, 1), (5, 5), (4, 5), (50, 5), ("auto", 1), ("auto", 400)]
)
def test_every_step_has_a_rate(schedule, warmup, total):
    found = curve(schedule, warmup=warmup, total=total, floor=0.1)
    assert all(0 < value <= 1 for value in found)
    warm = warmup_steps_of(OptimConfig(warmup_steps=warmup), total)
    assert found[:warm] == sorted(found[:warm]) and found[warm:] == sorted(found[warm:], reverse=True)


def test_auto_is_2_percent():
    assert [warmup_steps_of(OptimConfig(), total) for total in (1, 100, 1000, 12345)] == [0, 2, 20, 247]


def test_beyond_the_end_the_rate_stays_at_the_floor():
    config = OptimConfig(schedule="cosine", warmup_steps=0, lr_floor=0.1)
    assert lr_multiplier(500, config, 100) == pytest.approx(0.1)
