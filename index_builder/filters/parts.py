"""Parts of a filter bound to columns, and the rows that they select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from index_builder.filters.columns import Column, Slices, united

_LOWEST_INT = np.iinfo(np.int64).min  # also the key of a missing integer


@dataclass(slots=True)
class Selection:
    """The rows that a filter selects, as a mask, as row numbers, or both.

    Attributes:
        count: Matching rows.
        total: All rows.
        mask: bool ``(N,)`` or None.
        rows: uint32 ``(count,)`` in no particular order, without repetitions, or None.
    """

    count: int
    total: int
    mask: np.ndarray | None = None
    rows: np.ndarray | None = None

    def as_mask(self) -> np.ndarray:
        """Return the mask; made from the rows if need be."""
        if self.mask is None:
            mask = np.zeros(self.total, dtype=np.bool_)
            mask[self.rows] = True
            self.mask = mask
        return self.mask

    def as_rows(self) -> np.ndarray:
        """Return the row numbers; made from the mask if need be."""
        if self.rows is None:
            assert self.mask is not None, "a selection has a mask or rows"
            self.rows = np.flatnonzero(self.mask).astype(np.uint32)
        return self.rows


class Part(Protocol):
    """A part of a filter bound to a table."""

    def share(self, total: int) -> float:
        """Estimate the share of ``total`` rows that it selects."""

    def select(self, total: int) -> Selection:
        """Select rows."""

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` it selects, bool."""


@dataclass(slots=True)
class Found:
    """Rows that were found already."""

    selection: Selection

    def share(self, total: int) -> float:
        """Return the share of ``total`` rows that were found."""
        return self.selection.count / max(1, total)

    def select(self, total: int) -> Selection:
        """Return what was found."""
        return self.selection

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` were found, bool."""
        hit: np.ndarray = self.selection.as_mask()[rows]
        return hit


@dataclass(slots=True)
class Ranges:
    """Comparisons of one column that is not a list.

    Attributes:
        field: Name of the column.
        column: What is compared.
        slices: Ranges of the column's order that satisfy the comparisons.
    """

    field: str
    column: Column
    slices: Slices

    def narrow(self, slices: Slices) -> None:
        """Leave what other slices of the same column hold, too."""
        self.slices = _intersect(self.slices, slices)

    def widen(self, slices: Slices) -> None:
        """Add other slices of the same column."""
        self.slices = united([*self.slices, *slices])

    @property
    def count(self) -> int:
        """Rows that satisfy it."""
        return sum(b - a for a, b in self.slices)

    def share(self, total: int) -> float:
        """Return the share of ``total`` rows that satisfy it."""
        return self.count / max(1, total)

    def select(self, total: int) -> Selection:
        """Select by rows where few of ``total`` match, else by a mask."""
        count = self.count
        if count * 8 <= total:
            return Selection(count, total, rows=self.rows())
        return Selection(count, total, mask=self.mask())

    def rows(self) -> np.ndarray:
        """Return the matching rows, uint32."""
        if len(self.slices) == 1:
            a, b = self.slices[0]
            return self.column.order[a:b]
        parts = [self.column.order[a:b] for a, b in self.slices]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def mask(self) -> np.ndarray:
        """Return the matching rows, bool ``(N,)``."""
        column = self.column
        if len(self.slices) > 4 or self.count * 16 < len(column.keys) or self._looks_missing():
            return self._marked(len(column.keys))
        if len(self.slices) == 1:
            return column.mask(*self.slices[0])
        return self._compare(column.keys)

    def _marked(self, total: int) -> np.ndarray:
        """Mark the rows of the slices one by one."""
        hit = np.zeros(total, dtype=np.bool_)
        for a, b in self.slices:
            hit[self.column.order[a:b]] = True
        return hit

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` match, bool."""
        if len(self.slices) > 4 or self._looks_missing():
            hit: np.ndarray = self.mask()[rows]
            return hit
        return self._compare(self.column.keys[rows])

    def _looks_missing(self) -> bool:
        """Return whether a selected row has the key that stands for missing values.

        Comparing keys would then select rows without a value, too.
        """
        if not self.slices or self.slices[0][0] > 0:
            return False
        ranked = self.column.ranked
        return len(ranked) < len(self.column.keys) and bool(ranked[0] == _LOWEST_INT)

    def _compare(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys lie in the slices, bool, by comparisons with the ends of each."""
        ranked = self.column.ranked
        size = len(ranked)
        # Without missing values an end of the order needs no comparison.
        complete = size == len(self.column.keys)
        hit: Any = None
        for a, b in self.slices:
            if complete and a == 0 and b == size:
                return np.ones(len(keys), dtype=np.bool_)
            if complete and b == size:
                part = keys >= ranked[a]
            elif a == 0 and complete:
                part = keys <= ranked[b - 1]
            elif ranked[a] == ranked[b - 1]:
                part = keys == ranked[a]
            else:
                part = (keys >= ranked[a]) & (keys <= ranked[b - 1])
            hit = part if hit is None else hit | part
        result: np.ndarray = np.zeros(len(keys), dtype=np.bool_) if hit is None else hit
        return result


@dataclass(slots=True)
class AllParts:
    """Every part holds."""

    parts: Sequence[Part]

    def share(self, total: int) -> float:
        """Estimate the share of ``total`` rows, parts being taken for independent."""
        return float(np.prod([part.share(total) for part in self.parts]))

    def select(self, total: int) -> Selection:
        """Select by rows where the strictest part does, else by masks."""
        first, *rest = sorted(self.parts, key=lambda part: part.share(total))
        selection = first.select(total)
        if selection.rows is not None:
            rows = selection.rows
            for part in rest:
                rows = rows[part.test(rows)]
            return Selection(len(rows), total, rows=rows)
        mask = selection.as_mask()
        for part in rest:
            mask = mask & part.select(total).as_mask()
        return Selection(int(np.count_nonzero(mask)), total, mask=mask)

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` every part selects, bool."""
        hit: np.ndarray = np.logical_and.reduce([part.test(rows) for part in self.parts])
        return hit


@dataclass(slots=True)
class AnyPart:
    """At least one part holds."""

    parts: Sequence[Part]

    def share(self, total: int) -> float:
        """Estimate the share of ``total`` rows, parts being taken for independent."""
        return 1.0 - float(np.prod([1.0 - part.share(total) for part in self.parts]))

    def select(self, total: int) -> Selection:
        """Select by one mask, in which strict parts mark their rows."""
        mask = np.zeros(total, dtype=np.bool_)
        for part in self.parts:
            selection = part.select(total)
            if selection.rows is not None:
                mask[selection.rows] = True
            else:
                mask |= selection.as_mask()
        return Selection(int(np.count_nonzero(mask)), total, mask=mask)

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` any part selects, bool."""
        hit: np.ndarray = np.logical_or.reduce([part.test(rows) for part in self.parts])
        return hit


def select_slices(column: Column, slices: Slices) -> Selection:
    """Select the rows at ``slices`` of the order of a column that is not a list."""
    return Ranges("", column, slices).select(len(column.keys))


def _intersect(first: Slices, second: Slices) -> Slices:
    """Intersect two ascending lists of disjoint ranges."""
    result = []
    i = j = 0
    while i < len(first) and j < len(second):
        low, high = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if low < high:
            result.append((low, high))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return result
