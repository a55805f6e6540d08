"""A run at work, drawn in a terminal: curves of braille dots, figures, and what the diagnosis says so far."""

from collections.abc import Iterator, Sequence

from groundup.report import numbers
from groundup.report.curves import smoothed
from groundup.report.diagnosis.rules import diagnose
from groundup.report.read import Points, RunRecord, StageRecord

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column."""
BLANK = 0x2800
LABEL_WIDTH = 8


def stage_at_work(run: RunRecord) -> StageRecord | None:
    """The training stage that is not finished, else the last one; None before the first step."""
    unfinished = [stage for stage in run.stages if not stage.is_finished]
    stages = unfinished or run.stages
    return stages[-1] if stages else None


def status_line(stage: StageRecord) -> str:
    """Step, losses, rate, speed and time left, as far as they are known."""
    parts = [f"{stage.name}  step {stage.num_steps:,}{_of_total(stage)}"]
    looks = next(iter(stage.validation.get("loss", {}).values()), Points())
    rates = stage.lr.get("matrices") or next(iter(stage.lr.values()), Points())
    for name, points, form in (
        ("loss", stage.loss, numbers.three_decimals),
        ("val", looks, numbers.three_decimals),
        ("lr", rates, numbers.short),
        ("tokens/s", stage.tokens_per_second, numbers.short),
        ("of peak", stage.peak_fraction, numbers.percent),
    ):
        if points:
            value = form(points.values[-1])
            parts.append(f"{name} {value}" if name in ("loss", "val", "lr") else f"{value} {name}")
    left = seconds_left(stage)
    if stage.is_finished:
        parts.append("finished")
    elif left is not None:
        parts.append(f"{numbers.duration(left)} left")
    return "  ".join(parts)


def seconds_left(stage: StageRecord) -> float | None:
    """Seconds until the last step at the pace of the last tenth; None where it cannot be told."""
    total, elapsed = stage.resolved.get("total_steps"), stage.elapsed_seconds
    if not isinstance(total, int) or len(elapsed) < 2:
        return None
    first = max(0, len(elapsed) - max(2, len(elapsed) // 10))
    steps = elapsed.steps[-1] - elapsed.steps[first]
    return (total - elapsed.steps[-1]) * (elapsed.values[-1] - elapsed.values[first]) / max(steps, 1)


def _of_total(stage: StageRecord) -> str:
    total = stage.resolved.get("total_steps")
    return f"/{total:,}" if isinstance(total, int) else ""


def live_lines(run: RunRecord, *, width: int, height: int) -> list[str]:
    """What `groundup watch` shows of a run, at most `height` lines of `width` characters."""
    stage = stage_at_work(run)
    if stage is None:
        return [f"{run.name}  no training step yet"]
    found = [each for each in diagnose(run) if each.stage == stage.name][: 3 if height > 16 else 1]
    words = [
        f"{'!' if each.finding.sureness >= 0.65 else '?'} {each.finding.seen}: {each.finding.why}" for each in found
    ]
    looks = next(iter(stage.validation.get("loss", {}).values()), Points())
    room = max(4, height - len(words) - 3)
    panels = [("loss", [smoothed(stage.loss), looks])]
    if room >= 12:
        rates = stage.lr.get("matrices") or next(iter(stage.lr.values()), Points())
        half = (width - 2) // 2
        rows = room - room // 3
        lines = [*panel("loss, and validation", panels[0][1], width=width, height=rows)]
        left = list(panel("learning rate", [rates], width=half, height=room - rows))
        right = list(panel("tokens per second", [smoothed(stage.tokens_per_second)], width=half, height=room - rows))
        lines += [f"{one:<{half}}  {other}" for one, other in zip(left, right, strict=True)]
    else:
        lines = [*panel("loss, and validation", panels[0][1], width=width, height=room)]
    return [status_line(stage)[:width], *lines, *(line[:width] for line in words)]


def panel(title: str, curves: Sequence[Points], *, width: int, height: int) -> Iterator[str]:
    """A title and a chart of all curves, its largest and smallest value beside it, in `height` lines."""
    yield title[:width]
    rows = height - 1
    drawn = braille(curves, width=width - LABEL_WIDTH, height=rows)
    values = [value for points in curves for value in points.values]
    for number, row in enumerate(drawn):
        label = numbers.short(max(values)) if values and number == 0 else ""
        label = numbers.short(min(values)) if values and number == rows - 1 else label
        yield f"{label:>{LABEL_WIDTH - 1}} {row}"


def braille(curves: Sequence[Points], *, width: int, height: int) -> list[str]:
    """Curves as `height` lines of `width` braille characters, two dots across and four down each; one common scale."""
    cells = [[BLANK] * width for _ in range(height)]
    places = [place for points in curves for place in points.steps]
    values = [value for points in curves for value in points.values]
    if not values:
        return ["".join(map(chr, row)) for row in cells]
    first, last, low, high = min(places), max(places), min(values), max(values)
    for points in curves:
        for place, value in zip(points.steps, points.values, strict=True):
            x = round((place - first) / ((last - first) or 1) * (2 * width - 1))
            y = round((high - value) / ((high - low) or 1) * (4 * height - 1))
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(map(chr, row)) for row in cells]
