"""Curves: small, deterministic, coloured by the page, and true to spikes."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from groundup.report.curves import VARIABLES, Chart, Line, draw, smoothed, stage_charts, thinned
from groundup.report.read import Points, read_run

NUMBERS = Points(tuple(range(1, 2001)), tuple(5 - step / 500 + step % 7 / 10 for step in range(1, 2001)))


def chart(points=NUMBERS, **how):
    return Chart("Loss", "nats per token", (Line("train", points, 0),), **how)


def test_drawing_is_deterministic_and_small():
    svg = draw(chart(marks=(100,)))
    assert svg == draw(chart(marks=(100,)))
    assert len(svg) < 12_000


def test_drawing_is_well_formed_and_has_text_units_and_the_colours_of_the_page():
    svg = draw(chart())
    ElementTree.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"step", "nats per token", "400"} <= set(texts)
    assert "var(--series-0)" in svg
    assert not any(colour in svg for colour in VARIABLES)
    assert not re.search(r"#[0-9a-f]{6}|<metadata|http:|\d\.\d{2,}[ \"]", svg)


def test_small_numbers_keep_their_digits_on_the_axis():
    svg = draw(chart(Points((1, 2, 3), (0.0, 0.0025, 0.01))))
    assert ">0.0025<" in svg


@pytest.mark.parametrize(
    "points",
    [
        Points((1,), (2.0,)),
        Points((1, 2), (3.0, 3.0)),
        Points((1, 2), (0.0, 0.0)),
        Points((5, 9), (1e-12, 1e12)),
        Points((10**9, 2 * 10**9), (1.0, 2.0)),
    ],
)
@pytest.mark.parametrize("has_log_axis", [False, True])
def test_odd_values_can_be_drawn(points, has_log_axis):
    assert ElementTree.fromstring(draw(chart(points, has_log_axis=has_log_axis))).tag.endswith("svg")


def test_thinning_keeps_ends_and_spikes():
    values = [1.0] * 10_000
    values[4321] = 99.0
    thin = thinned(Points(tuple(range(10_000)), tuple(values)))
    assert len(thin) <= 240
    assert (thin.steps[0], thin.steps[-1]) == (0, 9999)
    assert (4321, 99.0) in zip(thin.steps, thin.values, strict=True)
    assert list(thin.steps) == sorted(set(thin.steps))


def test_smoothing_does_not_lag():
    line = Points(tuple(range(400)), tuple(float(step) for step in range(400)))
    assert smoothed(line).values == pytest.approx(line.values)
    noisy = Points(line.steps, tuple(float(step % 2) for step in range(400)))
    assert all(0.3 < value < 0.7 for value in smoothed(noisy).values[10:-10])


def test_short_run_is_not_smoothed():
    points = Points(tuple(range(20)), (1.0,) * 20)
    assert smoothed(points) is points


def test_charts_without_values_are_left_out(finished_run):
    titles = [chart.title for chart in stage_charts(read_run(finished_run).stages[0])]
    assert titles == ["Loss", "Perplexity", "Bits per byte", "Learning rate", "Gradient norm", "Memory", "Speed"]


def test_curves_that_lie_on_each_other_are_one_line(finished_run):
    stage, same, other = read_run(finished_run).stages[0], Points((1, 2), (0.1, 0.2)), Points((1, 2), (0.3, 0.1))
    stage = replace(stage, lr={"matrices": other, "embeddings": same, "vectors": same})
    rates = next(chart for chart in stage_charts(stage) if chart.title == "Learning rate")
    assert [line.label for line in rates.lines] == ["matrices", "embeddings, vectors"]


def test_axis_of_an_amount_begins_at_zero():
    points = Points((1, 2, 3), (700.0, 720.0, 710.0))
    assert ">0<" in draw(replace(chart(points), from_zero=True)).partition("step")[2]
    assert ">0<" not in draw(chart(points)).partition("step")[2]


def test_events_are_marked_on_the_loss(finished_run):
    loss = stage_charts(read_run(finished_run).stages[0])[0]
    assert loss.marks == (30, 60)


def test_a_single_point_gets_no_axes_of_its_own(finished_run):
    stage = read_run(finished_run).stages[0]
    last = {"text": Points((120,), (1.1,))}
    alone = replace(stage, validation={"loss": last, "bits_per_byte": last})
    charts = {chart.title: chart for chart in stage_charts(alone)}
    assert "Bits per byte" not in charts
    assert charts["Loss"].lines[-1].points.steps == (120,)


def test_all_charts_of_a_stage_span_its_steps():
    late = Points((1900, 2000), (1.0, 2.0))
    assert ">200<" not in draw(chart(late))
    assert ">1.2k<" in draw(chart(late, num_steps=2000))


def test_looking_back_is_drawn_beside_the_first_time(finished_run):
    stage = read_run(finished_run).stages[0]
    first, again = Points((10, 20), (3.0, 2.9)), Points((10, 20), (2.8, 1.2))

    def drawn(names):
        looks = {"first_loss": dict.fromkeys(names, first), "repeat_loss": dict.fromkeys(names, again)}
        charts = {one.title: one for one in stage_charts(replace(stage, validation=looks))}
        return charts["Looking back"].lines

    alone = drawn(["text"])
    assert [(line.label, line.points) for line in alone] == [("pairs, first time", first), ("pairs, again", again)]
    both = drawn(["books", "code"])
    assert [line.label for line in both[2:]] == ["pairs, again, books", "pairs, again, code"]
    assert len({line.colour for line in both}) == 4


def test_sources_and_experts_have_charts_of_their_own(finished_run):
    stage = read_run(finished_run).stages[0]
    points = Points((1, 2, 3), (3.0, 2.5, 2.0))
    mixed = replace(stage, source_loss={"books": points, "code": points}, expert_imbalance=points)
    charts = {chart.title: chart for chart in stage_charts(mixed)}
    assert [line.label for line in charts["Loss by source"].legend] == ["books", "code"]
    assert charts["Busiest expert"].lines[0].points is points
