"""Numbers as people read them."""

import math
from collections.abc import Callable, Sequence

THOUSANDS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """Three digits and a unit: 1.5k, 2.6M, 0.25, 3e-4."""
    if value == 0:
        return "0"
    for size, unit in THOUSANDS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    if abs(value) >= 0.001:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def ticks(values: Sequence[float]) -> list[str]:
    """Labels of an axis: as `short` where that tells its ticks apart as they are, else one unit and equally many digits."""
    largest = max(map(abs, values), default=0.0)
    if not 0.001 <= largest < 1000:
        texts = [short(value) for value in values]
        if all(abs(_value(text) - value) <= 1e-6 * largest for text, value in zip(texts, values, strict=True)):
            return texts
    size, unit = next(((size, unit) for size, unit in THOUSANDS if largest >= size), (1.0, ""))
    if 0 < largest < 0.001:
        exponent = math.floor(math.log10(largest))
        size, unit = 10.0**exponent, f"e{exponent}"
    for digits in range(7):
        texts = [f"{value / size:.{digits}f}" for value in values]
        if all(abs(float(text) * size - value) <= 1e-6 * largest for text, value in zip(texts, values, strict=True)):
            break
    return ["0" if value == 0 else text + unit for text, value in zip(texts, values, strict=True)]


def _value(text: str) -> float:
    """What a text of `short` says."""
    size = next((size for size, unit in THOUSANDS if text.endswith(unit)), 1.0)
    return float(text.rstrip("TBMk")) * size


def whole(value: float) -> str:
    """Every digit of a count, in groups of three."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A ratio in percent."""
    return f"{100 * value:.3g} %"


def three_decimals(value: float) -> str:
    """A figure that is compared by its third decimal."""
    return f"{value:.3f}"


def duration(value: float) -> str:
    """Seconds as hours, minutes and seconds, the two largest of them."""
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} bytes"


Format = Callable[[float], str]
