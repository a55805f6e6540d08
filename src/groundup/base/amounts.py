"""Amounts with a unit, as people write and read them."""

import re

from groundup.base.errors import ConfigError

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def split_amount(text: str) -> tuple[float, str] | None:
    """(number, unit) of a text such as `8 GB`; None for anything else."""
    match = _AMOUNT.fullmatch(text)
    return (float(match.group(1)), match.group(2)) if match else None


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count before its noun: `1 thread`, `2 threads`; `plural` where an s does not make it."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def parse_bytes(text: str) -> int:
    """Bytes of a text such as `8GB` or `512 MiB`. Raises ConfigError."""
    number, unit = split_amount(text) or (0.0, "")
    if unit.upper() not in BYTES or not number > 0:
        raise ConfigError("E-CLI", what=f"{text!r} is no amount of memory", next="write it as 8GB or 512MiB")
    return int(number * BYTES[unit.upper()])
