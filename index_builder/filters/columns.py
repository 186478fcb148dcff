"""One attribute prepared for filtering: sorted keys, so that a comparison is a slice of them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl

from index_builder.filters.field_types import FieldType
from index_builder.filters.patterns import Pattern
from index_builder.filters.times import Period, instants_of

Key = int | float | str | bool | Period
"""What a column is compared with."""
Slices = list[tuple[int, int]]
_NULL_INT = np.iinfo(np.int64).min


@dataclass(slots=True)
class Column:
    """Sortable keys of one attribute, one per value, with the row of each value.

    A string's key is its place in the sorted dictionary, a time's the microseconds since 1970.
    Missing values have a key below every other (-1, or the lowest int64) or NaN, and are not in
    ``order``.

    Attributes:
        type: What the attribute holds.
        keys: ``(N,)`` keys by row; for lists ``(V,)`` keys of all values.
        order: uint32 rows in the order of their keys, missing ones left out.
        ranked: ``keys`` in the same order.
        dictionary: Sorted distinct strings, for string types.
        present: bool ``(N,)`` for list types: whether the row has a list at all.
        places: uint32 ``(N,)``, where each row stands in ``order`` (the highest number: nowhere);
            made when a mask is first wanted.
        words: ``dictionary`` as a column; made when a pattern is first looked for.
    """

    type: FieldType
    keys: np.ndarray
    order: np.ndarray
    ranked: np.ndarray
    dictionary: list[str] | None = None
    present: np.ndarray | None = None
    places: np.ndarray | None = None
    words: pl.Series | None = None

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

    def slices(self, op: str, value: Key) -> Slices:
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

    def slices_in(self, values: Sequence[Key]) -> Slices:
        """Find the ranges of ``order`` whose values are among ``values``."""
        if self.dictionary is None:
            return united([pair for value in values for pair in self.slices("==", value)])
        codes = (bisect_left(self.dictionary, value) for value in values)
        found = {
            code
            for code, value in zip(codes, values)
            if code < len(self.dictionary) and self.dictionary[code] == value
        }
        keys = np.array(sorted(found), dtype=np.int32)
        lows = self.ranked.searchsorted(keys, "left").tolist()
        highs = self.ranked.searchsorted(keys, "right").tolist()
        return united([pair for pair in zip(lows, highs) if pair[0] < pair[1]])

    def slices_with_prefix(self, prefix: str) -> Slices:
        """Find the range of ``order`` whose strings begin with ``prefix``."""
        low, high = (self._place(code) for code in self._codes_with_prefix(prefix))
        return [(low, high)] if low < high else []

    def mask_like(self, pattern: Pattern) -> np.ndarray:
        """Return the rows whose strings match a pattern, bool ``(N,)``.

        Looks at every distinct string that begins with the prefix of the pattern.
        """
        assert self.dictionary is not None, "patterns are for strings"
        low, high = self._codes_with_prefix(pattern.prefix)
        hits = np.zeros(len(self.dictionary) + 1, dtype=np.bool_)  # the last: missing values, -1
        if self.words is None:
            self.words = pl.Series(self.dictionary, dtype=pl.String)
        hits[low:high] = self.words[low:high].str.contains(pattern.regex()).to_numpy()
        result: np.ndarray = hits[self.keys]
        return result

    def _codes_with_prefix(self, prefix: str) -> tuple[int, int]:
        """Find the range of the dictionary whose strings begin with ``prefix``."""
        assert self.dictionary is not None, "prefixes are for strings"
        size = len(prefix)
        low = bisect_left(self.dictionary, prefix)
        high = bisect_right(self.dictionary, prefix, low, key=lambda word: word[:size])
        return low, high

    def _place(self, code: int) -> int:
        """Find the first place of ``order`` whose string has at least this code."""
        return int(self.ranked.searchsorted(np.int32(code)))

    def _bounds(self, value: Key) -> tuple[int, int]:
        """Find the insertion points left and right of ``value`` among the ranked keys."""
        ranked = self.ranked
        if isinstance(value, Period):
            return self._first_at_least(value.low), self._first_at_least(value.high)
        if self.dictionary is not None:
            assert isinstance(value, str), "bound filters compare strings with strings"
            low, high = bisect_left(self.dictionary, value), bisect_right(self.dictionary, value)
            return self._place(low), self._place(high)
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


class Columns(Protocol):
    """What filters see of a table."""

    @property
    def count(self) -> int:
        """Rows."""

    @property
    def schema(self) -> Mapping[str, FieldType]:
        """Types of the attributes by name."""

    @property
    def row_of(self) -> Callable[[str], int | None] | None:
        """Finds the row of an id; None: ids are not known."""

    def column(self, name: str) -> Column:
        """Return an attribute prepared for filtering; ``name`` is in ``schema``."""


def united(ranges: Slices) -> Slices:
    """Join ranges, given in any order, that overlap or touch."""
    result: Slices = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1]:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def outside(ranges: Slices, size: int) -> Slices:
    """Return what disjoint, ascending ranges leave of ``[0, size)``."""
    ends = [0, *(end for _, end in ranges)]
    starts = [*(start for start, _ in ranges), size]
    return [(a, b) for a, b in zip(ends, starts) if a < b]


def prepared_column(type_: FieldType, series: pl.Series) -> Column:
    """Sort a column; a list's values are sorted one by one, repeated ones of a row once."""
    if not type_.startswith("list"):
        keys, valid, dictionary = _keys_of(type_, series)
        if valid is None:
            rows = np.arange(len(keys), dtype=np.uint32)
        else:
            rows = np.flatnonzero(valid).astype(np.uint32)
        order = rows[np.argsort(keys[rows], kind="stable")]
        return Column(type_, keys, order, keys[order], dictionary)
    lists = pl.DataFrame({"row": pl.Series(range(len(series)), dtype=pl.UInt32), "value": series})
    exploded = lists.explode("value").drop_nulls()
    if type_ == "list<time>":
        exploded = exploded.with_columns(instants_of(exploded["value"])).drop_nulls()
    exploded = exploded.unique().sort("value", "row")
    keys, _, dictionary = _keys_of(type_[5:-1], exploded["value"])
    order = exploded["row"].to_numpy().copy()
    return Column(type_, keys, order, keys, dictionary, series.is_not_null().to_numpy())


def _keys_of(
    type_: str, series: pl.Series
) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Return keys, validity (None when all are valid) and dictionary of a flat series."""
    if type_ == "time" and series.dtype == pl.String:
        series = instants_of(series)
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
    if type_ in ("int", "time"):
        return series.fill_null(_NULL_INT).to_numpy().astype(np.int64), valid, None
    keys = series.fill_null(math.nan).to_numpy().copy()
    missing = np.isnan(keys)
    return keys, (~missing if missing.any() else None), None
