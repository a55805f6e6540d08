"""docs/benchmarks.md: one section a program, one table a section, one row a measurement."""

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from groundup.base import machine
from groundup.base.amounts import counted
from groundup.base.files import atomic_write

PAGE = Path("docs/benchmarks.md")


def add_row(heading: str, command: str, cells: Mapping[str, str], page: Path = PAGE) -> None:
    """Add a row, with date and machine before it, to the table under a heading; both are made where they are missing."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    columns = ["date", "machine", *cells]
    row = [datetime.datetime.now(datetime.UTC).date().isoformat(), this_machine(), *cells.values()]
    if f"## {heading}\n" not in text:
        head = f"## {heading}\n\n`{command}`\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
        text = f"{text.rstrip()}\n\n{head}\n"
    before, found, after = text.partition(f"## {heading}\n")
    section, border, rest = after.partition("\n## ")
    section = f"{section.rstrip()}\n| {' | '.join(row)} |\n"
    with atomic_write(page) as file:
        file.write(f"{before}{found}{section}{border}{rest}".encode())


def replace_table(heading: str, said: str, columns: Sequence[str], rows: Iterable[Sequence[str]], page: Path) -> None:
    """Put a line and a table under a heading in place of what stood there; all are made where they are missing."""
    lines = [f"## {heading}", "", said, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    before, _, after = page.read_text(encoding="utf-8").partition(f"## {heading}\n")
    rest = after.partition("\n## ")
    with atomic_write(page) as file:
        file.write((before.rstrip() + "\n\n" + "\n".join(lines) + "\n" + "".join(rest[1:])).encode())


def read_rows(heading: str, page: Path = PAGE) -> list[dict[str, str]]:
    """The rows of the table under a heading, oldest first, by column; none where there is no such table."""
    _, _, after = page.read_text(encoding="utf-8").partition(f"## {heading}\n")
    lines = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def this_machine() -> str:
    """Processor, cores and torch's version, in a few words."""
    facts = machine.describe()
    kind = "bf16 products" if machine.has_fast_bf16() else "no bf16 products"
    return f"{facts['cpu'] or platform.processor()}, {counted(facts['cores'], 'core')}, {kind}, torch {facts['packages']['torch']}"
