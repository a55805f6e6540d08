"""Several runs on one HTML page: their curves over each other by steps, tokens, arithmetic or time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from groundup.base.config import flatten
from groundup.base.files import atomic_write
from groundup.report import numbers
from groundup.report.curves import NUM_COLOURS, Chart, Line, draw, smoothed
from groundup.report.diagnosis.rules import diagnose
from groundup.report.page import STAGE_FIGURES, TITLES, Picture, templates
from groundup.report.read import TRAINING_STAGES, Points, RunRecord, StageRecord, is_number, read_run

MAX_BYTES = 290_000
POINTS = (160, 80, 40, 20)
"""Points of a curve: as many as keep the page under its size."""
FLOPS_A_TOKEN = 6
"""Operations a token and parameter: 2 forward, 4 backward (Kaplan et al., arXiv:2001.08361)."""
MAX_DIFFERENCES = 40


@dataclass(frozen=True)
class Axis:
    """What curves are laid out over."""

    name: str
    unit: str
    places: Callable[[StageRecord], Points]
    """The place of each step; none where a run does not tell."""


def _steps(stage: StageRecord) -> Points:
    return Points(stage.loss.steps, tuple(map(float, stage.loss.steps)))


def _flops(stage: StageRecord) -> Points:
    parameters = stage.figure("num_active_parameters") or stage.figure("num_parameters")
    if parameters is None:
        return Points()
    return Points(stage.tokens.steps, tuple(FLOPS_A_TOKEN * parameters * value for value in stage.tokens.values))


AXES = (
    Axis("steps", "step", _steps),
    Axis("tokens", "tokens", lambda stage: stage.tokens),
    Axis("FLOPs", "FLOPs, 6 a parameter and token", _flops),
    Axis("time", "seconds of training", lambda stage: stage.elapsed_seconds),
)


def _validation_loss(stage: StageRecord) -> Points:
    return next(iter(stage.validation.get("loss", {}).values()), Points())


CHARTS: tuple[tuple[str, str, Callable[[StageRecord], Points], bool], ...] = (
    ("Training loss", "nats per token", lambda stage: smoothed(stage.loss), False),
    ("Validation loss", "nats per token", _validation_loss, False),
    ("Gradient norm", "L2 norm", lambda stage: smoothed(stage.grad_norm), True),
    ("Speed", "tokens per second", lambda stage: smoothed(stage.tokens_per_second), False),
)
"""Title, unit, points and whether the axis is logarithmic; the last two are drawn over steps alone."""


@dataclass(frozen=True)
class Overlay:
    """The charts of one axis."""

    axis: Axis
    pictures: list[Picture]


def write_comparison(runs: Sequence[Path], to: Path | None = None) -> Path:
    """Write a page of several runs, `comparison.html` in the first or `to`. Raises DataError if one is no run."""
    path = to or runs[0] / "comparison.html"
    html = render_comparison([read_run(run) for run in runs])
    with atomic_write(path) as file:
        file.write(html.encode())
    return path


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """The page of several runs, curves thinned until it is small enough."""
    runs = _with_names_apart(runs)
    template = templates().get_template("comparison.html.jinja")
    html = ""
    for max_points in POINTS:
        html = template.render(
            runs=[(number % NUM_COLOURS, run) for number, run in enumerate(runs)],
            axes=AXES,
            stages=[panels for name in TRAINING_STAGES if (panels := _stage_panels(name, runs, max_points))],
            differences=differences(runs),
            num_colours=NUM_COLOURS,
        )
        if len(html.encode()) <= MAX_BYTES:
            break
    return html


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings in which the recipes differ, with each run's value."""
    flat = [flatten(dict(run.settings)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings if name != "name")
    rows = [(name, [_cell(settings.get(name)) for settings in flat]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1][:MAX_DIFFERENCES]


def _cell(value: Any) -> str:
    if is_number(value):
        return f"{value:g}"
    return "–" if value is None else str(value)[:80]


def _with_names_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({number})") if names.count(run.name) > 1 else run
        for number, run in enumerate(runs, 1)
    ]


def _stage_panels(name: str, runs: Sequence[RunRecord], max_points: int) -> dict[str, Any] | None:
    stages = [
        (number, run.name, stage) for number, run in enumerate(runs) for stage in run.stages if stage.name == name
    ]
    if not stages:
        return None
    return {
        "name": name,
        "title": TITLES[name],
        "overlays": [
            Overlay(axis, pictures) for axis in AXES if (pictures := list(_pictures(stages, axis, max_points)))
        ],
        "columns": [run_name for _, run_name, _ in stages],
        "figures": _figures([stage for _, _, stage in stages]),
        "findings": [
            (
                run_name,
                "; ".join(each.finding.seen for each in diagnose(runs[number]) if each.stage == name)
                or "nothing found",
            )
            for number, run_name, _ in stages
        ],
    }


def _pictures(stages: Sequence[tuple[int, str, StageRecord]], axis: Axis, max_points: int) -> Iterator[Picture]:
    for title, unit, points_of, has_log_axis in CHARTS:
        if axis.name != "steps" and title in ("Gradient norm", "Speed"):
            continue
        lines = [
            Line(name, placed, number, is_dashed=number >= NUM_COLOURS)
            for number, name, stage in stages
            if len(placed := _placed(points_of(stage), axis.places(stage))) > 1
        ]
        if lines:
            chart = Chart(title, unit, tuple(lines), has_log_axis, axis=axis.unit, max_points=max_points)
            chart = replace(chart, from_zero=title == "Speed", names_all=True)
            yield Picture(chart, Markup(draw(chart)))


def _placed(points: Points, places: Points) -> Points:
    """Points at the places of their steps."""
    place_of = dict(zip(places.steps, places.values, strict=True))
    known = [
        (place_of[step], value) for step, value in zip(points.steps, points.values, strict=True) if step in place_of
    ]
    return Points(tuple(place for place, _ in known), tuple(value for _, value in known))


def _figures(stages: Sequence[StageRecord]) -> list[tuple[str, list[str]]]:
    rows = []
    for figure in STAGE_FIGURES:
        values = [stage.figure(figure.key) for stage in stages]
        if any(value is not None for value in values):
            rows.append((figure.label, ["–" if value is None else figure.form(value) for value in values]))
    last = [_validation_loss(stage) for stage in stages]
    if any(last):
        rows.append(("validation loss at the end", [numbers.three_decimals(p.values[-1]) if p else "–" for p in last]))
    return rows
