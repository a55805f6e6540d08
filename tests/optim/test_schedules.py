"""Learning-rate schedules against their formulas."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from groundup.base.errors import ConfigError
from groundup.optim.config import OptimConfig, parse_warmup
from groundup.optim.schedules import lr_multiplier, warmup_steps_of

TOTAL, WARMUP, FLOOR = 110, 10, 0.2
SCHEDULES = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
DECAYS = ["linear", "cosine", "sqrt"]
SIZES = {"batch_rows": 4, "row_length": 16, "rows_per_epoch": 100}


def curve(schedule, *, warmup=WARMUP, total=TOTAL, floor=FLOOR, **changes):
    config = OptimConfig(schedule=schedule, lr_floor=floor, **changes)
    return [lr_multiplier(step, config, total_steps=total, warmup_steps=warmup) for step in range(total)]


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


@pytest.mark.parametrize(
    ("decay_shape", "formula"),
    [
        ("linear", lambda progress: 1 - 0.8 * progress),
        ("cosine", lambda progress: 0.2 + 0.4 * (1 + math.cos(math.pi * progress))),
        ("sqrt", lambda progress: 1 - 0.8 * progress**0.5),
    ],
)
def test_wsd_follows_its_formula(decay_shape, formula):
    found = curve("wsd", decay_fraction=0.3, decay_shape=decay_shape)
    warm, stable = [(step + 1) / 10 for step in range(10)], [1.0] * 67
    assert found == pytest.approx(warm + stable + [formula((step + 1) / 33) for step in range(33)])
    assert found[76] == 1.0 > found[77] and found[-1] == pytest.approx(FLOOR)


def test_inverse_sqrt_follows_its_formula():
    found = curve("inverse_sqrt", floor=0.35)
    expected = [min((step + 1) / 10, max(0.35, (10 / (step + 1)) ** 0.5)) for step in range(TOTAL)]
    assert found == pytest.approx(expected)
    assert found[9] == 1.0 > found[10] and found[80] > 0.35 and found[81] == pytest.approx(0.35)
    assert curve("inverse_sqrt", warmup=0, floor=0.0)[:4] == pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5])


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 300),
    warm_share=st.floats(0, 1),
    floor=st.floats(0.001, 1),
    decay_fraction=st.floats(0.01, 1),
    decay_shape=st.sampled_from(DECAYS),
)
def test_every_curve_rises_falls_and_ends_at_its_floor(schedule, total, warm_share, floor, decay_fraction, decay_shape):
    warm = int(warm_share * total)
    shape = {"decay_fraction": decay_fraction, "decay_shape": decay_shape}
    found = curve(schedule, warmup=warm, total=total, floor=floor, **shape)
    assert all(0 < value <= 1 for value in found)
    assert found[:warm] == sorted(found[:warm])
    after = found[max(0, warm - 1) :]
    assert after[0] == pytest.approx(1.0) or (warm == 0 and schedule == "wsd")  # it may decay from the first step on
    falling = all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert falling and all(value >= floor - 1e-12 for value in after)
    has_room = total - warm >= (2 if schedule in ("linear", "cosine") else 1)
    if schedule in ("linear", "cosine", "wsd") and has_room:
        assert found[-1] == pytest.approx(floor)
    if schedule == "wsd":
        decay_steps = min(max(1, round(decay_fraction * total)), total - warm)
        assert all(value == 1.0 for value in found[warm : total - decay_steps])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_longer_run_has_the_same_rates_where_the_schedule_says_so(schedule):
    short, long = curve(schedule), curve(schedule, total=3 * TOTAL)
    equal = {"constant": TOTAL, "inverse_sqrt": TOTAL, "wsd": TOTAL - round(0.2 * TOTAL)}.get(schedule, WARMUP + 1)
    assert short[:equal] == long[:equal]
    assert equal == TOTAL or short[equal] != long[equal]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_beyond_the_end_the_rate_stays_at_the_floor(schedule):
    config = OptimConfig(schedule=schedule, lr_floor=0.1)
    found = lr_multiplier(50_000, config, total_steps=100, warmup_steps=2)
    assert found == pytest.approx(1.0 if schedule == "constant" else 0.1)


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [("2 %", 20), ("2%", 20), ("2.5 %", 25), ("0 %", 0), ("100 %", 1000), ("200 steps", 200), ("0 steps", 0),
     ("6400 tokens", 100), ("1e4 tokens", 157), ("40 rows", 10), ("2 epochs", 50), ("0 tokens", 0)],
)  # fmt: skip
def test_a_warmup_is_a_share_or_a_length(warmup, steps):
    assert warmup_steps_of(OptimConfig(warmup=warmup).warmup, 1000, **SIZES) == steps


def test_the_default_is_2_percent():
    default = OptimConfig().warmup
    assert [warmup_steps_of(default, total, **SIZES) for total in (1, 100, 1000, 12345)] == [0, 2, 20, 247]
    # to the step what `round(0.02 * total)` gave, before a warmup could be anything else
    assert all(warmup_steps_of(default, total, **SIZES) == round(0.02 * total) for total in range(1, 20_000))


@pytest.mark.parametrize(
    "warmup", ["", "2", 200, "-2 %", "101 %", "two %", "5 seconds", "-5 steps", "nan %", "1e999 tokens", None, "% 2"]
)
def test_no_other_warmup_is_taken(warmup):
    with pytest.raises(ValidationError, match=r"share|length"):
        OptimConfig(warmup=warmup)


def test_a_warmup_longer_than_the_run_is_refused():
    assert warmup_steps_of("30 steps", 30, **SIZES) == 30
    with pytest.raises(ConfigError, match=r"E-CONFIG-WARMUP: warmup='31 steps' is 31 steps, the whole run 30"):
        warmup_steps_of("31 steps", 30, **SIZES)


@pytest.mark.parametrize(("steps", "warmup"), [(0, (0, "steps")), (200, (200, "steps")), ("auto", (2, "%"))])
def test_the_old_name_still_counts_steps(steps, warmup):
    assert parse_warmup(OptimConfig(warmup_steps=steps).warmup) == warmup
    with pytest.raises(ValidationError, match="warmup_steps"):
        OptimConfig(warmup_steps=steps, warmup="1 %")
