"""Curves of a training stage as SVG: text stays text, colours are CSS variables, the same numbers give the same bytes."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from groundup.report.numbers import short, ticks
from groundup.report.read import Points, StageRecord

NUM_COLOURS = 4
MARKED = ("resume", "nonfinite", "spike", "skip", "overflow", "rewind", "oom", "world", "straggler")
"""Kinds of events that are marked on the curves."""
MAX_MARKS = 24
MAX_POINTS = 240
"""Points a curve is thinned to; the page must stay small, and a screen shows no more."""
BAND_ALPHA = 0.18
WIDTH, HEIGHT = 5.0, 3.0
"""Inches of 72 CSS pixels: the size at which the text is as large as the page's small text, on a phone."""

# matplotlib knows no CSS: it draws in these colours, each of which is then replaced by a variable of the page
INK, GRID = "#010101", "#020202"
SERIES = [f"#03030{number}" for number in range(NUM_COLOURS)]
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "groundup",
    "font.size": 13.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    points: Points
    colour: int
    is_faint: bool = False
    is_dashed: bool = False


@dataclass(frozen=True)
class Band:
    """Where a curve normally lies."""

    label: str
    low: Points
    high: Points
    colour: int


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a stage, or over what else grows with them."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    has_log_axis: bool = False
    """Logarithmic where the values span enough for it."""
    marks: tuple[int, ...] = ()
    """Steps at which something happened."""
    mark_words: str = ""
    """What happened."""
    num_steps: int = 0
    """Steps of the stage, which the axis spans whatever the curves do; 0 leaves it to them."""
    axis: str = "step"
    """What the points' places are, its unit with it."""
    max_points: int = MAX_POINTS
    band: Band | None = None
    from_zero: bool = False
    """Whether the axis of values begins at 0, as that of an amount should."""
    names_all: bool = False
    """Whether a single curve has its name too, as where it is one run's of several."""

    @property
    def legend(self) -> list[Line]:
        """The curves that need a name."""
        return list(self.lines) if self.names_all or len(self.lines) > 1 else []


def stage_charts(stage: StageRecord) -> list[Chart]:
    """The charts of a stage that have something to show."""
    happened = [event for event in stage.events if event.kind in MARKED]
    steps = sorted({event.step for event in happened})
    marks = tuple(steps[:: len(steps) // MAX_MARKS + 1])
    words = ", ".join(kind for kind in MARKED if any(event.kind == kind for event in happened))
    losses = _validation_lines(stage, "loss")
    perplexities = _validation_lines(stage, "perplexity")
    smooth = smoothed(stage.loss)
    train_perplexity = Points(smooth.steps, tuple(math.exp(min(value, 50.0)) for value in smooth.values))
    charts = [
        Chart(
            "Loss",
            "nats per token",
            (*_raw_and_smoothed("train", stage.loss, 0), *losses, *_foretold_lines(stage)),
            marks=marks,
            mark_words=words,
            band=_band(stage),
        ),
        Chart(
            "Loss by source",
            "nats per token",
            tuple(
                Line(name, smoothed(points), number) for number, (name, points) in enumerate(stage.source_loss.items())
            ),
        ),
        Chart("Perplexity", "perplexity", (Line("train", train_perplexity, 0), *perplexities), has_log_axis=True),
        Chart("Bits per byte", "bits per byte", tuple(_validation_lines(stage, "bits_per_byte"))),
        Chart("Looking back", "nats per token", tuple(_looking_back(stage))),
        Chart("Learning rate", "learning rate", _told_apart(stage.lr)),
        Chart("Gradient norm", "L2 norm", _raw_and_smoothed("each step", stage.grad_norm, 0), True, marks, words),
        Chart(
            "Busiest expert", "times the mean of its layer", _raw_and_smoothed("each step", stage.expert_imbalance, 0)
        ),
        Chart("Memory", "GB (most so far)", (Line("process", _in_gb(stage.peak_memory_bytes), 3),), from_zero=True),
        Chart("Speed", "tokens per second", _raw_and_smoothed("each step", stage.tokens_per_second, 2), from_zero=True),
        Chart(
            "Share of peak",
            "share of the matrix peak",
            _raw_and_smoothed("each step", stage.peak_fraction, 2),
            from_zero=True,
        ),
    ]
    filled = [
        replace(chart, lines=lines, num_steps=stage.num_steps)
        for chart in charts
        if (lines := tuple(line for line in chart.lines if len(line.points)))
    ]
    # a single point, as of a validation at the end only, is told by a figure and needs no axes
    return [chart for chart in filled if max(len(line.points) for line in chart.lines) >= min(2, stage.num_steps)]


def _told_apart(curves: Mapping[str, Points]) -> tuple[Line, ...]:
    """A line for each different curve: of two that lie on each other only one would be seen."""
    names: dict[Points, list[str]] = {}
    for name, points in curves.items():
        names.setdefault(points, []).append(name)
    return tuple(Line(", ".join(same), points, number) for number, (points, same) in enumerate(names.items()))


def _in_gb(points: Points) -> Points:
    return Points(points.steps, tuple(value / 1e9 for value in points.values))


def _raw_and_smoothed(label: str, points: Points, colour: int) -> tuple[Line, ...]:
    smooth = smoothed(points)
    if smooth is points:
        return (Line(label, points, colour),)
    return Line(label, points, colour, is_faint=True), Line("smoothed", smooth, colour)


def _validation_lines(stage: StageRecord, figure: str) -> list[Line]:
    """One curve a validation set; where there is one set only, it needs no name of its own."""
    sets = stage.validation.get(figure, {})
    return [
        Line("validation" if len(sets) == 1 or name == "validation" else f"validation {name}", points, number)
        for number, (name, points) in enumerate(sets.items(), start=1)
    ]


def _looking_back(stage: StageRecord) -> list[Line]:
    """Loss of pairs that come again in their row, beside the same pairs' where they come first."""
    both = (("pairs, first time", "first_loss"), ("pairs, again", "repeat_loss"))
    has_one_set = len(stage.validation.get("first_loss", {})) == 1
    found = [
        (words if has_one_set else f"{words}, {name}", points)
        for words, figure in both
        for name, points in stage.validation.get(figure, {}).items()
    ]
    return [Line(words, points, number) for number, (words, points) in enumerate(found)]


def _foretold_lines(stage: StageRecord) -> list[Line]:
    told = stage.foretold
    return [] if told is None else [Line("foretold", Points(told.steps, told.loss), 2, is_dashed=True)]


def _band(stage: StageRecord) -> Band | None:
    told = stage.foretold
    if told is None:
        return None
    return Band(f"normal, {100 * told.level:.0f} %", Points(told.steps, told.low), Points(told.steps, told.high), 2)


def smoothed(points: Points) -> Points:
    """A mean over about a fortieth of the run, centred, so that it lags behind nothing; short runs stay as they are."""
    half = len(points) // 80
    if half < 1:
        return points
    sums = list(itertools.accumulate(points.values, initial=0.0))
    values = []
    for i in range(len(points)):
        reach = min(half, i, len(points) - 1 - i)  # narrower at the ends, but never to one side
        values.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return Points(points.steps, tuple(values))


def thinned(points: Points, max_points: int = MAX_POINTS) -> Points:
    """At most `max_points` points: the smallest and the largest of each bin, so that no spike is lost."""
    if len(points) <= max_points:
        return points
    num_bins = max_points // 2 - 1  # one bin's worth is left for the first and the last point
    chosen = {0, len(points) - 1}
    for number in range(num_bins):
        inside = range(number * len(points) // num_bins, (number + 1) * len(points) // num_bins)
        chosen |= {min(inside, key=points.values.__getitem__), max(inside, key=points.values.__getitem__)}
    order = sorted(chosen)
    return Points(tuple(points.steps[i] for i in order), tuple(points.values[i] for i in order))


def draw(chart: Chart) -> str:
    """The chart as an SVG element for a page that defines --muted, --line and --series-0 to --series-3."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own matplotlibrc must not change the page
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for line in chart.lines:
            points = thinned(line.points, chart.max_points)
            axes.plot(
                points.steps,
                points.values,
                color=SERIES[line.colour % NUM_COLOURS],
                alpha=0.35 if line.is_faint else 1.0,
                linewidth=0.8 if line.is_faint else 1.6,
                linestyle=(0, (4, 2)) if line.is_dashed else "-",
                marker="o" if len(points) <= 12 and len(chart.lines) <= NUM_COLOURS and not line.is_dashed else "",
                markersize=3.5,
                solid_joinstyle="round",
            )
        if chart.band is not None:
            low, high = chart.band.low, chart.band.high
            colour = SERIES[chart.band.colour % NUM_COLOURS]
            axes.fill_between(low.steps, low.values, high.values, color=colour, alpha=BAND_ALPHA, linewidth=0)
        for step in chart.marks:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_xlabel(chart.axis)
        axes.set_ylabel(chart.unit, labelpad=6)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(x=0.02, y=0.08)
        if chart.num_steps > 1:
            axes.set_xlim(1 - 0.02 * chart.num_steps, 1.02 * chart.num_steps)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.axis == "step"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if chart.from_zero:
            axes.set_ylim(bottom=0)
        if powers := _log_ticks(chart):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(powers))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(_labels(axes.xaxis))
        axes.yaxis.set_major_formatter(_labels(axes.yaxis))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _for_page(buffer.getvalue(), f"{chart.title}, {chart.unit}, over {chart.axis}")


def _labels(axis: Axis) -> FuncFormatter:
    """Labels that depend on each other: equal steps look equal. Those of a logarithmic axis stand alone."""

    def label(value: float, _: int | None) -> str:
        places = [] if axis.get_scale() == "log" else [float(place) for place in axis.get_majorticklocs()]
        return dict(zip(places, ticks(places), strict=True)).get(value, short(value))

    return FuncFormatter(label)


def _log_ticks(chart: Chart) -> list[float]:
    """Ticks at 1, 2 and 5 of each power of ten, or fewer; none where a linear axis shows more."""
    values = [value for line in chart.lines for value in line.points.values]
    low, high = min(values), max(values)
    if not chart.has_log_axis or low <= 0 or high < 8 * low:
        return []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = _ticks_between(low, high, digits)
        if len(ticks) <= 6:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 6)]


def _ticks_between(low: float, high: float, digits: Sequence[int]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]


def _for_page(svg: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{description}">', svg
    )
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # several charts stand on one page: ids would repeat
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*; |(?<=px) '[^;\"]*", "", svg).replace("font: ", "font-size: ")
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
