"""docs/benchmarks.svg: the newest figures of docs/benchmarks.md beside their goals, and bits per byte against time.

python -m benchmarks.picture
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import read_rows
from groundup.base.files import atomic_write

PICTURE = Path("docs/benchmarks.svg")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "groundup",
    "font.size": 10.5,
    "font.family": "sans-serif",
}
OURS, THEIRS, GOAL, INK = "#2563eb", "#9ca3af", "#b45309", "#374151"


@dataclass(frozen=True)
class Figured:
    """A figure, and what it should be at least, in the same unit."""

    name: str
    value: float
    goal: float
    unit: str


def number_in(cell: str, pattern: str = r"\*\*([\d.]+)") -> float:
    """The number that a cell's pattern finds: by default the one in bold."""
    found = re.search(pattern, cell)
    assert found is not None, f"no number in {cell!r}"
    return float(found[1])


def newest(heading: str, column: str) -> dict[str, dict[str, str]]:
    """The last row of a table for each value of a column."""
    return {row[column]: row for row in read_rows(heading)}


def figures() -> list[Figured]:
    """What has a goal."""
    found = []
    by_size = sorted(newest("Train step", "shape").items(), key=lambda pair: int(pair[0].partition("M")[0]))
    for shape, row in by_size:
        name = shape.split(",")[0]
        found.append(Figured(f"train step, {name}: × Trainer", number_in(row["ratio of the rounds"]), 1.3, "×"))
        share = number_in(row["share of the matrix peak"], r"^(\d+)%")
        found.append(Figured(f"train step, {name}: share of peak", share, 70, "%"))
        ours, theirs = map(float, row["peak memory GB"].split(" / "))
        found.append(Figured(f"train step, {name}: Trainer's memory ÷ ours", theirs / ours, 1.0, "×"))
    for row in newest("Generation", "shape").values():
        column = next(name for name in row if name.startswith("1 prompt"))
        found.append(Figured("generation, 1 prompt: × transformers", number_in(row[column]), 1.5, "×"))
    largest = list(newest("Data", "text").values())[-1]
    found.append(Figured("cleaning, MB/s a core", number_in(largest["clean MB/s a core"]), 5, ""))
    found.append(Figured("tokenizing, MB/s a core", number_in(largest["tokenize MB/s a core"]), 3.5, ""))
    return found


def draw_figures(axes: Axes, found: list[Figured]) -> None:
    """Bars in parts of their goals."""
    for place, one in enumerate(reversed(found)):
        axes.barh(place, one.value / one.goal, color=OURS if one.value >= one.goal else THEIRS, height=0.62)
        text = f"{one.value:.0f} %" if one.unit == "%" else f"{one.value:.2f}{one.unit}"
        goal = f"{one.goal:.0f} %" if one.unit == "%" else f"{one.goal:g}{one.unit}"
        end = axes.text(one.value / one.goal + 0.03, place, f"{text} (goal {goal})", va="center", fontsize=9, color=INK)
        end.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    axes.axvline(1.0, color=GOAL, linewidth=1.2, zorder=0.5)
    axes.set_yticks(range(len(found)), [one.name for one in reversed(found)])
    axes.set_xlim(0, max(one.value / one.goal for one in found) * 1.35)
    axes.set_xlabel("measured ÷ goal")
    axes.set_title("Figures beside their goals", loc="left")


def draw_time(axes: Axes) -> None:
    """Bits per byte against minutes: groundup at shares of each budget, the Trainer's best rate at all of it."""
    by_minutes = {number_in(row["shape, minutes"], r"([\d.]+) min"): row for row in read_rows("Time to quality")}
    for minutes, row in by_minutes.items():
        shares = re.findall(r"(\d+)%: ([\d.]+)", row["ours by share of the time"])
        best = min(float(one) for one in re.findall(r": ([\d.]+)", row["Trainer by rate"]))
        times = [minutes * float(share) / 100 for share, _ in shares]
        axes.plot(times, [float(one) for _, one in shares], "o-", color=OURS, markersize=4, linewidth=1.4)
        axes.plot([minutes], [best], "s", color=INK, markersize=6)
        if "no bf16" in row["machine"]:  # a slower machine: beside its own peer only
            axes.annotate(
                "fp32", (minutes, best), (0, 8), textcoords="offset points", ha="center", fontsize=8, color=INK
            )
    axes.plot([], [], "o-", color=OURS, label="groundup")
    axes.plot([], [], "s", color=INK, label="Trainer, its best rate")
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 30]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("bits per byte, held out")
    axes.grid(axis="y", color="#e5e7eb")
    axes.legend(frameon=False, loc="center right")
    axes.set_title("Time to quality", loc="left")


def main() -> int:
    """Draw."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_figures(left, figures())
        draw_time(right)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(PICTURE) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
