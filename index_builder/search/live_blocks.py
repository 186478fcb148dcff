"""Storage of live entries: blocks of rows that only ever grow, and their attributes as tables."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from polars.datatypes import DataTypeClass

from index_builder.filters.attributes import AttributeTable
from index_builder.filters.cache import SelectionCache
from index_builder.filters.json_values import is_part, json_columns
from index_builder.filters.live_columns import LiveColumns
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.live_words import LiveWords
from index_builder.live_log.records import LiveEntry
from index_builder.native import live_scan
from index_builder.storage.corpus import normalise_rows

_ROWS_PER_GROUP = 32
_SELECTION_BYTES = 2**20
"""Kept selections of a block."""


class _Filtered(NamedTuple):
    """The first rows of a block as filters see them."""

    size: int
    base: AttributeTable
    selections: SelectionCache


class Block:
    """Storage shared by the views of one segment.

    Rows are only ever appended, so that a view of ``n`` rows stays true.

    Args:
        capacity: Rows there is room for.
        dimension: D.
        scanned: Keep what the compiled scan needs.
        lexical: Base whose queries search the rows' words, too; None: words are not kept.

    Attributes:
        words: Of the rows' text attributes; None likewise.
    """

    def __init__(
        self,
        capacity: int,
        dimension: int,
        scanned: bool = False,
        lexical: LexicalIndex | None = None,
    ) -> None:
        self.words = None if lexical is None else LiveWords(lexical)
        self.ids: list[str] = []
        self.vectors = np.zeros((capacity, dimension), np.float32)
        self.values: list[dict[str, Any]] = []
        self.alive = np.zeros(capacity, bool)
        self.bits: np.ndarray | None = None
        self.facts: np.ndarray | None = None
        if scanned:
            groups = -(-capacity // _ROWS_PER_GROUP)
            nibbles = max(64, 1 << (dimension - 1).bit_length()) // 4
            # Signs of the rotated vectors, and what live.cpp knows of each row
            self.bits = np.zeros((groups, nibbles, 16), np.uint8)
            self.facts = np.zeros(2 * groups * _ROWS_PER_GROUP + 2, np.float32)
        self._encoded = 0
        self._frame = pl.DataFrame()
        self._frame_rows = 0
        self._frame_lock = threading.Lock()
        self._filtered: _Filtered | None = None

    @property
    def count(self) -> int:
        """Rows, dead ones included."""
        return len(self.ids)

    def append(self, entry: LiveEntry) -> int:
        """Add an upsert; returns its row, which a view may show after ``encode``."""
        assert entry.vector is not None
        row = len(self.ids)
        self.vectors[row] = entry.vector
        self.values.append(entry.attributes)
        self.alive[row] = True
        self.ids.append(entry.id)
        return row

    def encode(self) -> None:
        """Normalise rows added since the last call, and keep their signs and words.

        One thread at a time, and before a view shows the rows.
        """
        if self.words is not None:
            self.words.append(self.values[self.words.count :])
        first, end = self._encoded, self.count
        if first == end:
            return
        normalise_rows(self.vectors[first:end])
        if self.bits is not None:
            dimension = self.vectors.shape[1]
            live_scan.encode(self.vectors, dimension, self.bits, self.facts, first, end)
        self._encoded = end

    def attributes(self, size: int) -> pl.DataFrame:
        """Return attributes of the first ``size`` rows; columns that no entry set are missing."""
        with self._frame_lock:
            if self._frame_rows < size:
                fresh = attribute_frame(self.values[self._frame_rows : size])
                self._frame = (
                    fresh
                    if self._frame_rows == 0
                    else join_frames(
                        [self._frame, fresh], [self._frame_rows, size - self._frame_rows]
                    )
                )
                self._frame_rows = size
            return self._frame if self._frame_rows == size else self._frame.head(size)

    def selections(self, size: int, base: AttributeTable) -> SelectionCache:
        """Return the selections of the first ``size`` rows, whose types are those of ``base``.

        Columns are typed and sorted once a size, when a filter first names them.
        """
        filtered = self._filtered
        if filtered is None or filtered.size != size or filtered.base is not base:
            columns = LiveColumns(self.values[:size], self.ids[:size], base)
            filtered = _Filtered(size, base, SelectionCache(columns, _SELECTION_BYTES))
            self._filtered = filtered
        return filtered.selections


def attribute_frame(values: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Make a table of attribute dictionaries, one a row; its columns are those of ``json_columns``.

    Args:
        values: One dictionary per row.
    """
    names = list(dict.fromkeys(name for row in values for name in row))
    columns = [
        column for name in names for column in json_columns(name, [row.get(name) for row in values])
    ]
    return pl.DataFrame(columns) if columns else pl.DataFrame({"": [None] * len(values)}).select()


def join_frames(frames: Sequence[pl.DataFrame], heights: Sequence[int]) -> pl.DataFrame:
    """Stack tables of ``attribute_frame`` with different columns; missing cells are null.

    Args:
        frames: Tables, some possibly without any column (and therefore without a height of their
            own).
        heights: Rows of each.
    """
    names = list(
        dict.fromkeys(name for frame in frames for name in frame.columns if not is_part(name))
    )
    columns = []
    for name in names:
        parts = [
            frame[name] if name in frame.columns else pl.Series(name, [None] * height)
            for frame, height in zip(frames, heights)
        ]
        if _are_alike([part.dtype for part in parts]):
            columns.append(
                pl.concat([part.to_frame() for part in parts], how="vertical_relaxed")[name]
            )
        else:
            columns += json_columns(name, [cell for part in parts for cell in part.to_list()])
    return pl.DataFrame(columns)


def _are_alike(dtypes: Sequence[pl.DataType | DataTypeClass]) -> bool:
    """Return whether values fit one column as they are: equal types, numbers, lists of these."""
    known = [dtype for dtype in dtypes if dtype != pl.Null]
    if pl.Object in known:
        return False
    lists = [dtype for dtype in known if isinstance(dtype, pl.List)]
    if lists:
        return len(lists) == len(known) and _are_alike([dtype.inner for dtype in lists])
    return len(set(known)) <= 1 or all(dtype.is_numeric() for dtype in known)
