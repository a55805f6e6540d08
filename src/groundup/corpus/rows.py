"""What a reader yields: a row with its text and its place, or a row that cannot be used with its raw bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One text as it was read."""

    id: str
    text: str
    source: str
    file: str
    offset: int
    """Byte in the (decompressed) file where the row begins; in parquet, which has none, the row's number."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is set aside."""

    code: str
    detail: str
    file: str
    offset: int
    raw: bytes
    """The row's bytes; empty where the row is larger than the limit and was never held."""
    line: int | None = None
    """Line of the file, from 1, where the format has lines."""


class RowFault(Exception):
    """Why a row cannot be used; readers turn it into a BadRow."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail
        super().__init__(f"{code} {detail}")
