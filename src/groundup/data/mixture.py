"""Mixtures: rows of several sources by weight. Which source a row belongs to is a function of its number alone."""

import heapq
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from groundup.base.errors import ConfigError
from groundup.data.rows import DocumentRows, Row

PERIOD = 1 << 16
"""Rows after which the order of the sources repeats: shares are kept to 1/65536."""


def quotas(shares: Mapping[str, float]) -> tuple[int, ...]:
    """Rows of each source in a period, by the largest remainder. Raises ConfigError for a share too small for one."""
    total = sum(shares.values())
    wanted = [PERIOD * share / total for share in shares.values()]
    counts = [int(rows) for rows in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda source: (counts[source] - wanted[source], source))
    for source in by_remainder[: PERIOD - sum(counts)]:
        counts[source] += 1
    for name, count in zip(shares, counts, strict=True):
        if count == 0:
            raise ConfigError(
                "E-CONFIG-MIXTURE",
                what=f"the source {name!r} would get less than one row in {PERIOD}",
                where="mixture",
                next="raise its weight, or leave it out",
            )
    return tuple(counts)


@lru_cache(maxsize=4)
def interleave(counts: tuple[int, ...]) -> NDArray[np.uint16]:
    """Source of each of `sum(counts)` rows, so that after n rows every source has within 1 of n × its share.

    The j-th row of a source may come when the share asks for j - 1 + slack rows, and must before it asks for
    j - slack; of those that may, the one that must first is next (Tijdeman 1980, the chairman assignment problem).
    """
    period, num_sources = sum(counts), len(counts)
    parts = max(1, 2 * num_sources - 2)  # the slack is 1 / parts
    waiting: list[list[int]] = [[] for _ in range(period + 1)]
    for source, count in enumerate(counts):
        for number in range(1, count + 1):
            waiting[-(-((number - 1) * parts + 1) * period // (parts * count))].append(source)
    may_come: list[tuple[float, int]] = []
    given = [0] * num_sources
    order = np.empty(period, dtype=np.uint16)
    for row in range(1, period + 1):
        for source in waiting[row]:
            given[source] += 1
            must_come_before = (given[source] * parts - 1) / counts[source]  # exact enough: fractions of small numbers
            heapq.heappush(may_come, (must_come_before, source))
        order[row - 1] = heapq.heappop(may_come)[1]
    return order


class MixedRows:
    """Rows of several sources, each in its own order and pass after pass, with the share of tokens that its weight asks
    for: a source whose rows hold more padding gets more rows."""

    def __init__(self, sources: Mapping[str, DocumentRows], weights: Mapping[str, float]) -> None:
        self.sources = dict(sources)
        self.names = tuple(sources)
        self._of = list(sources.values())
        (self.row_length,) = {source.row_length for source in self._of}
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self._of)
        """Rows in which each source is seen once where the weights follow the sizes."""
        shares = {name: weights[name] / (1 - source.padding_fraction) for name, source in sources.items()}
        self._counts = quotas(shares)
        self._order = interleave(self._counts)
        self._number = np.empty(PERIOD, dtype=np.uint16)
        for source, count in enumerate(self._counts):
            self._number[self._order == source] = np.arange(count)

    def source_of(self, index: int) -> int:
        """Which of `names` row `index` belongs to."""
        return int(self._order[index % PERIOD])

    def locate(self, index: int) -> tuple[DocumentRows, int]:
        """The source that row `index` comes from, and its number there."""
        period, place = divmod(index, PERIOD)
        source = int(self._order[place])
        return self._of[source], period * self._counts[source] + int(self._number[place])

    def rows_before(self, index: int) -> dict[str, int]:
        """Rows of each source before row `index`."""
        period, place = divmod(index, PERIOD)
        begun = np.bincount(self._order[:place], minlength=len(self.names)).tolist()
        return {name: period * count + more for name, count, more in zip(self.names, self._counts, begun, strict=True)}

    def row(self, index: int) -> Row:
        """Tokens, labels and document starts of row `index`."""
        source, number = self.locate(index)
        return source.row(number)

    def documents_of(self, index: int) -> list[int]:
        """Numbers of the documents that row `index` holds a part of, counted in its own source."""
        source, number = self.locate(index)
        return source.documents_of(number)
