"""Lengths of training in steps, tokens, rows or epochs; never in seconds."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = ("steps", "tokens", "rows", "epochs")
_PATTERN = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([a-z]+)\s*")


def _check(value: Any) -> Any:
    if value is not None:
        parse(str(value))  # a number alone is told what it lacks
    return value


def parse(text: str, *, may_be_zero: bool = False) -> tuple[float, str]:
    """(number, unit) of a text such as `500 steps` or `2e9 tokens`. Raises ValueError."""
    match = _PATTERN.fullmatch(text)
    unit = match.group(2) if match else ""
    unit = unit if unit.endswith("s") else f"{unit}s"
    if not match or unit not in UNITS:
        raise ValueError(f"a length is a number and one of {', '.join(UNITS)}, such as '500 steps' or '2e9 tokens'")
    number = float(match.group(1))
    if number == math.inf or (number == 0 and not may_be_zero):
        raise ValueError("a length must be greater than 0 and finite")
    return number, unit


Duration = Annotated[str, BeforeValidator(_check)]
"""A text such as `500 steps`, `2e9 tokens`, `1000 rows` or `3 epochs`."""


def in_steps(duration: str, *, batch_rows: int, row_length: int, rows_per_epoch: int) -> int:
    """Optimizer steps of a duration, rounded up, at least 1."""
    number, unit = parse(duration)
    rows = {
        "steps": number * batch_rows,
        "tokens": number / row_length,
        "rows": number,
        "epochs": number * rows_per_epoch,
    }
    return max(1, math.ceil(rows[unit] / batch_rows - 1e-9))
