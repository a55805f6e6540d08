"""What was foretold is drawn under the curve that it was foretold for, and under no other."""

import json
import re

import pytest
from report.conftest import write_run

from groundup.report.curves import draw, stage_charts
from groundup.report.page import foretold_words, render
from groundup.report.read import read_run

INPUTS = {"train": "a", "validation": "b", "tokenizer": "c"}
STEPS = tuple(range(12, 121, 12))


def write_forecast(run, *, settings=None, inputs=INPUTS, shift=0.0):
    (run / "scale").mkdir(exist_ok=True)
    loss = [2.3 + shift + 6 / step for step in STEPS]
    values = {
        "settings": settings or {"model.hidden_size": 192, "pretrain.lr": 0.01},
        "inputs": inputs,
        "steps": STEPS,
        "loss": loss,
        "low": [one - 0.1 for one in loss],
        "high": [one + 0.1 for one in loss],
        **{"level": 0.9, "num_runs": 12, "compute_ratio": 8.04},
    }
    (run / "scale" / "forecast.json").write_text(json.dumps(values))


@pytest.fixture
def foretold_run(tmp_path):
    run = write_run(tmp_path / "run")
    config = {
        "seed": 0,
        "model": {"hidden_size": 192, "num_hidden_layers": 4},
        "pretrain": {"lr": 0.01, "warmup": "2 %"},
    }
    manifest = {"stage": "pretrain", "code_version": 1, "config": config, "inputs": INPUTS, "files": {}}
    (run / "pretrain" / "MANIFEST.json").write_text(json.dumps(manifest))
    write_forecast(run)
    return run


def loss_chart(run):
    return next(chart for chart in stage_charts(read_run(run).stages[0]) if chart.title == "Loss")


def test_a_curve_and_its_band_are_drawn(foretold_run):
    chart = loss_chart(foretold_run)
    assert chart.band is not None and chart.band.low.steps == STEPS
    assert [line.label for line in chart.lines if line.is_dashed] == ["foretold"]
    plain = draw(chart)
    (foretold_run / "scale" / "forecast.json").unlink()
    without = loss_chart(foretold_run)
    assert without.band is None and "foretold" not in [line.label for line in without.lines]
    assert plain.count("fill-opacity: 0.1") == draw(without).count("fill-opacity: 0.1") + 1


def test_the_page_says_what_the_band_is_and_how_it_came(foretold_run):
    page = render(read_run(foretold_run))
    assert "normal, 90 %" in page and "Foretold by 12 smaller runs on this text" in page and "1/8.04" in page
    came = read_run(foretold_run).stages[0].validation["loss"]["validation"].values[-1]
    told = 2.3 + 6 / 120
    assert f"it came to {came:.3f} ({100 * (came / told - 1):+.1f} %), inside the band" in page
    write_forecast(foretold_run, shift=0.3)
    assert "outside the band" in foretold_words(read_run(foretold_run).stages[0])
    assert "Foretold" not in re.sub(r"<svg.*?</svg>", "", render(read_run(write_run(foretold_run.parent / "other"))))


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {"model.hidden_size": 256, "pretrain.lr": 0.01}},
        {"settings": {"model.hidden_size": 192, "pretrain.lr": 0.02}},
        {"settings": {"model.hidden_size": 192, "pretrain.ema_decay": 0.9}},
        {"inputs": INPUTS | {"train": "another text"}},
    ],
)
def test_nothing_is_drawn_for_another_run(foretold_run, other):
    assert read_run(foretold_run).stages[0].foretold is not None
    write_forecast(foretold_run, **other)
    assert read_run(foretold_run).stages[0].foretold is None


def test_a_run_at_work_has_its_forecast_too(foretold_run):
    (foretold_run / ".attempts").mkdir()
    manifest = json.loads((foretold_run / "pretrain" / "MANIFEST.json").read_text())
    (foretold_run / "pretrain" / "MANIFEST.json").unlink()
    (foretold_run / "pretrain").rename(foretold_run / ".attempts" / "pretrain")
    del manifest["files"]
    (foretold_run / ".attempts" / "pretrain" / "ATTEMPT.json").write_text(json.dumps(manifest))
    stage = read_run(foretold_run).stages[0]
    assert not stage.is_finished and stage.foretold is not None and "it came to" not in foretold_words(stage)
