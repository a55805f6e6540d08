"""Numbers in words, and small drawings of block characters for a terminal."""

from collections.abc import Sequence

EIGHTHS = " ▁▂▃▄▅▆▇█"
LEFT_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int) -> str:
    """A bar of `share` (0 to 1) of so many characters; what is not nothing is seen."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    eighths = max(eighths, 1 if share > 0 else 0)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (LEFT_EIGHTHS[rest] if rest else "")).ljust(width)


def curve(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """Values from 0 to the largest as columns, the top line first."""
    top = max(values, default=0.0) or 1.0
    columns = [values[min(len(values) - 1, column * len(values) // width)] for column in range(min(width, len(values)))]
    filled = [max(1 if value > 0 else 0, round(value / top * height * 8)) for value in columns]
    return [
        "".join(EIGHTHS[max(0, min(8, eighths - 8 * line))] for eighths in filled) for line in reversed(range(height))
    ]


def count_words(number: float) -> str:
    """A count with three digits: 1.31 M."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def span_words(seconds: float) -> str:
    """A span of time in the unit that reads best."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def bytes_words(num_bytes: float) -> str:
    """Bytes in MB or GB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
