"""One attribute prepared for filtering: sorted keys, so that a comparison is a slice of them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from index_builder.filters.field_types import FieldType

Slices = list[tuple[int, int]]
_NULL_INT = np.iinfo(np.int64).min


@dataclass(slots=True)
class Column:
    """Sortable keys of one attribute, one per value, with the row of each value.

    A string's key is its place in the sorted dictionary. Missing values have a key below every
    other (-1, or the lowest int64) or NaN, and are not in ``order``.

    Attributes:
        type: What the attribute holds.
        keys: ``(N,)`` keys by row; for lists ``(V,)`` keys of all values.
        order: uint32 rows in the order of their keys, missing ones left out.
        ranked: ``keys`` in the same order.
        dictionary: Sorted distinct strings, for string types.
        present: bool ``(N,)`` for list types: whether the row has a list at all.
        places: uint32 ``(N,)``, where each row stands in ``order`` (the highest number: nowhere);
            made when a mask is first wanted.
    """

    type: FieldType
    keys: np.ndarray
    order: np.ndarray
    ranked: np.ndarray
    dictionary: list[str] | None = None
    present: np.ndarray | None = None
    places: np.ndarray | None = None

    @property
    def is_list(self) -> bool:
        """Return whether a row holds many values."""
        return self.type.startswith("list")

    def mask(self, low: int, high: int) -> np.ndarray:
        """Return the rows at places ``[low, high)`` of ``order``, bool ``(N,)``; not for lists."""
        if self.places is None:
            places = np.full(len(self.keys), np.iinfo(np.uint32).max, dtype=np.uint32)
            places[self.order] = np.arange(len(self.order), dtype=np.uint32)
            self.places = places
        # Places below `low` wrap around to large numbers.
        result: np.ndarray = (self.places - np.uint32(low)) < np.uint32(high - low)
        return result

    def slices(self, op: str, value: int | float | str | bool) -> Slices:
        """Find the ranges of ``order`` whose values satisfy ``value_of_row op value``.

        They are disjoint, ascending and not empty.
        """
        low, high = self._bounds(value)
        size = len(self.ranked)
        ranges = {
            "==": [(low, high)],
            "!=": [(0, low), (high, size)],
            "<": [(0, low)],
            "<=": [(0, high)],
            ">": [(high, size)],
            ">=": [(low, size)],
        }[op]
        return [(a, b) for a, b in ranges if a < b]

    def between(self, op: str, value: int | float) -> tuple[int, int]:
        """Find the range of ``order`` whose numbers satisfy ``number op value``.

        ``op`` is any comparison but ``!=``. The range is empty where its end is not above its
        start.
        """
        low = 0 if op[0] == "<" else self._count_below(value, inclusive=op == ">")
        high = len(self.ranked) if op[0] == ">" else self._count_below(value, inclusive=op != "<")
        return low, high

    def _count_below(self, value: int | float, *, inclusive: bool) -> int:
        """Count the values below ``value``, or at most equal to it."""
        if self.ranked.dtype == np.int64 and type(value) is int and -(2**62) < value < 2**62:
            return int(self.ranked.searchsorted(value + inclusive))
        return self._bounds(value)[inclusive]

    def slices_in(self, values: Sequence[Any], *, negated: bool) -> Slices:
        """Find the ranges of ``order`` whose values are (not) among ``values``."""
        hits = sorted({pair for value in values for pair in self.slices("==", value)})
        if not negated:
            return hits
        result = []
        start = 0
        for a, b in hits:
            if start < a:
                result.append((start, a))
            start = b
        if start < len(self.ranked):
            result.append((start, len(self.ranked)))
        return result

    def _bounds(self, value: int | float | str | bool) -> tuple[int, int]:
        """Find the insertion points left and right of ``value`` among the ranked keys."""
        ranked = self.ranked
        if self.dictionary is not None:
            assert isinstance(value, str), "bound filters compare strings with strings"
            left = np.int32(bisect_left(self.dictionary, value))
            right = np.int32(bisect_right(self.dictionary, value))
            return int(ranked.searchsorted(left)), int(ranked.searchsorted(right))
        assert not isinstance(value, str), "bound filters compare numbers with numbers"
        if ranked.dtype.kind == "f":
            try:
                key = ranked.dtype.type(float(value))
            except OverflowError:
                key = ranked.dtype.type(math.inf if value > 0 else -math.inf)
            return int(ranked.searchsorted(key, "left")), int(ranked.searchsorted(key, "right"))
        if isinstance(value, float) and not math.isfinite(value):
            at = len(ranked) if value > 0 else 0
            return at, at
        # Whole numbers lie between the two; a fraction equals no key.
        return self._first_at_least(math.ceil(value)), self._first_at_least(math.floor(value) + 1)

    def _first_at_least(self, key: int) -> int:
        """Find the first place whose integer key is at least ``key``."""
        info = np.iinfo(self.ranked.dtype)
        if key <= info.min:
            return 0
        if key > info.max:
            return len(self.ranked)
        return int(self.ranked.searchsorted(self.ranked.dtype.type(key), "left"))


def sorted_column(
    type_: FieldType,
    keys: np.ndarray,
    valid: np.ndarray | None,
    dictionary: list[str] | None = None,
) -> Column:
    """Sort a column that is not a list.

    Args:
        type_: Of the attribute.
        keys: ``(N,)`` keys by row.
        valid: bool ``(N,)``, which rows have a value; None: all.
        dictionary: Sorted distinct strings, for strings.
    """
    if valid is None:
        rows = np.arange(len(keys), dtype=np.uint32)
    else:
        rows = np.flatnonzero(valid).astype(np.uint32)
    order = rows[np.argsort(keys[rows], kind="stable")]
    return Column(type_, keys, order, keys[order], dictionary)


def keys_of(
    type_: str, series: pl.Series
) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Return keys, validity (None when all are valid) and dictionary of a flat series."""
    valid = None if series.null_count() == 0 else series.is_not_null().to_numpy()
    if type_ == "string":
        words = series.drop_nulls().unique().sort()
        dictionary = words.to_list()
        if not dictionary:
            return np.full(len(series), -1, dtype=np.int32), valid, dictionary
        codes = series.cast(pl.Enum(words)).to_physical().cast(pl.Int32).fill_null(-1)
        return codes.to_numpy().astype(np.int32), valid, dictionary
    if type_ == "bool":
        return series.cast(pl.Int8).fill_null(-1).to_numpy().astype(np.int8), valid, None
    if type_ == "int":
        return series.fill_null(_NULL_INT).to_numpy().astype(np.int64), valid, None
    keys = series.fill_null(math.nan).to_numpy().copy()
    missing = np.isnan(keys)
    return keys, (~missing if missing.any() else None), None
