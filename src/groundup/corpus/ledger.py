"""The account of a corpus: where every row that was read went to, and the rows that were set aside."""

import base64
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from groundup.base.errors import GroundupError
from groundup.corpus.diversity import Diversity
from groundup.corpus.rows import BadRow
from groundup.corpus.storage import explain_full_disk


@dataclass
class Ledger:
    """Counts of rows; the law is read = kept + filtered + exact_duplicates + near_duplicates + quarantined."""

    read: int = 0
    kept: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    exact_duplicates: int = 0
    near_duplicates: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    """UTF-8 bytes of the texts that were read."""
    bytes_out: int = 0
    """UTF-8 bytes of the texts that were kept."""
    diversity_before: Diversity | None = None
    diversity_after: Diversity | None = None

    def check(self) -> None:
        """Raise GroundupError if a row is not accounted for."""
        settled = (
            self.kept + self.filtered.total() + self.exact_duplicates + self.near_duplicates + self.quarantined.total()
        )
        if settled != self.read:
            raise GroundupError(
                "E-LEDGER",
                what=f"{self.read} rows were read, {settled} are accounted for",
                where="corpus ledger",
                next="this is a fault of groundup: please report it with the recipe",
            )

    def reasons(self) -> str:
        """Why rows were not kept, with counts, most frequent first."""
        reasons = self.filtered + self.quarantined
        reasons["exact duplicate"], reasons["near duplicate"] = self.exact_duplicates, self.near_duplicates
        ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count:,} {reason}" for reason, count in ranked if count)

    def line(self) -> str:
        """The main figures in words."""
        parts = [f"read {self.read:,}", f"kept {self.kept:,}", f"filtered {self.filtered.total():,}"]
        parts.append(f"duplicates {self.exact_duplicates:,} exact {self.near_duplicates:,} near")
        parts.append(f"quarantined {self.quarantined.total():,}")
        return "  ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The ledger as it stands in ledger.json."""
        before, after = self.diversity_before, self.diversity_after
        return {
            "read": self.read,
            "kept": self.kept,
            "filtered": dict(sorted(self.filtered.items())),
            "exact_duplicates": self.exact_duplicates,
            "near_duplicates": self.near_duplicates,
            "quarantined": dict(sorted(self.quarantined.items())),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "diversity_before": before and asdict(before),
            "diversity_after": after and asdict(after),
        }


class Quarantine:
    """Rows set aside, one JSON line each: reason, place, and raw bytes as base64."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file, self._folder = file, folder

    def add(self, row: BadRow) -> None:
        """Write a row."""
        line = orjson.dumps(
            {
                "reason": row.code,
                "detail": row.detail.encode("utf-8", "backslashreplace").decode(),
                "file": row.file,
                "offset": row.offset,
                "line": row.line,
                "raw": base64.b64encode(row.raw).decode(),
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        with explain_full_disk(self._folder, len(line)):
            self._file.write(line)


@contextmanager
def open_quarantine(folder: Path) -> Iterator[Quarantine]:
    """The quarantine of a corpus folder, `quarantine/quarantine.jsonl`, to write into."""
    with explain_full_disk(folder, 1):
        (folder / "quarantine").mkdir()
        with (folder / "quarantine" / "quarantine.jsonl").open("wb") as file:
            yield Quarantine(file, folder)
