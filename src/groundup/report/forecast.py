"""The curve that `groundup scale` foretold for a run, where it stands in the run and is this run's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.base.artifact import ATTEMPT, MANIFEST
from groundup.base.config import flatten
from groundup.base.files import read_json

SCALE, FORECAST = "scale", "forecast.json"
"""Folder of a run's ladder, and its file."""


@dataclass(frozen=True)
class Foretold:
    """Loss on held-out rows at steps of a run, foretold by smaller runs."""

    steps: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    level: float
    """Share of runs that are expected between low and high."""
    num_runs: int
    """That it is foretold by."""
    compute_ratio: float
    """Operations of the run over those of the largest of them."""


def read_foretold(run: Path, stage: Path) -> Foretold | None:
    """What was foretold for a stage; None without a forecast, or where it is of other settings or another text."""
    path = run / SCALE / FORECAST
    key = next((stage / name for name in (MANIFEST, ATTEMPT) if (stage / name).is_file()), None)
    if not path.is_file() or key is None:
        return None
    values, began = read_json(path), read_json(key)
    if not _is_within(values["settings"], flatten(began["config"])) or values["inputs"] != began["inputs"]:
        return None
    steps, loss, low, high = (tuple(values[name]) for name in ("steps", "loss", "low", "high"))
    return Foretold(steps, loss, low, high, values["level"], values["num_runs"], values["compute_ratio"])


def _is_within(some: Mapping[str, Any], all_of_them: Mapping[str, Any]) -> bool:
    return all(name in all_of_them and all_of_them[name] == value for name, value in some.items())
