"""Live entries made searchable: segments that are scanned, and a view of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from index_builder.filters.attributes import AttributeTable
from index_builder.filters.json_values import column_types
from index_builder.lexical.live_words import LiveWords
from index_builder.native import live_scan
from index_builder.search.live_blocks import Block

EXACT_LIMIT = 4096
"""Entries in the tail before it is sealed; sealed segments are merged with others of their size."""
SCAN_RECALL = 0.998
"""Share of the live entries due that the compiled scan finds at least.

Entries are ranked by one bit a dimension of their rotated vectors; the error of that estimate is
bounded at three standard errors and the query's rounding exactly (``live.cpp``), which misses an
entry that is due with probability 0.0014 at most. Where a request wants more, every entry is scored
in float32.
"""
_NO_ROWS = np.zeros(0, np.int64)
_NO_SCORES = np.zeros(0, np.float32)

Answer = tuple[list[str], np.ndarray]
"""Ids and float32 scores, best first."""


class LiveSegment:
    """Row-aligned live entries; rows with ``alive`` False were replaced or deleted later.

    Attributes:
        ids: Entity ids.
        vectors: float32 ``(n, D)``, unit rows.
        alive: bool ``(n,)``.
        alive_count: How many rows are alive.
    """

    __slots__ = ("_block", "alive", "alive_count", "ids", "size", "vectors")

    def __init__(self, block: Block, size: int, alive: np.ndarray) -> None:
        self._block = block
        self.size = size
        self.ids: Sequence[str] = block.ids
        self.vectors = block.vectors[:size]
        self.alive = alive
        self.alive_count = int(np.count_nonzero(alive))

    def __len__(self) -> int:
        return self.size

    @property
    def words(self) -> LiveWords | None:
        """Words of the rows, perhaps of more than the ``n`` seen here; None where none are kept."""
        return self._block.words

    def holds(self, block: Block) -> bool:
        """Return whether this is a view of ``block``."""
        return self._block is block

    @property
    def is_scanned(self) -> bool:
        """Whether ``merge`` finds ``SCAN_RECALL`` of what is due rather than all of it."""
        return self._block.bits is not None

    @property
    def attributes(self) -> pl.DataFrame:
        """Attributes of the rows, ``n`` rows; columns that no entry set are missing.

        Built on first use.
        """
        return self._block.attributes(self.size)

    def mask(self, expression: str, base: AttributeTable) -> np.ndarray:
        """Return which rows pass a filter, bool ``(n,)``, not to be changed.

        Args:
            expression: The filter.
            base: Attributes of the base, whose types hold here, too.

        Raises:
            FilterError: The filter does not parse or does not fit the attributes.
        """
        return self._block.selections(self.size, base).get(expression).as_mask()

    def merge(
        self,
        query: np.ndarray,
        k: int,
        ids: list[str],
        scores: np.ndarray,
        mask: np.ndarray | None = None,
        exact: bool = False,
    ) -> Answer:
        """Merge an answer with the living rows into the best ``k`` of both.

        Args:
            query: float32 ``(1, D)``, unit norm.
            k: Wanted.
            ids: At most ``k`` ids, best first, none of them alive here.
            scores: float32, their inner products with the query.
            mask: bool ``(n,)``; only rows where it is True. None: all.
            exact: Score every row in float32.

        Returns:
            Ids and float32 scores, best first; the very arguments where no row is good enough.
        """
        block = self._block
        if block.bits is not None and not exact:
            usable = self.alive if mask is None else self.alive & mask
            out = np.empty(k, np.float32)
            merged = live_scan.merge(
                query,
                k,
                block.vectors,
                block.bits,
                block.facts,
                usable,
                block.ids,
                ids,
                scores,
                out,
            )
            return (ids, scores) if merged is ids else (merged, out[: len(merged)])
        rows, found = self.search(query, k, mask)
        if len(rows) == 0:
            return ids, scores
        both = np.concatenate([scores, found])
        best = (-both).argsort(kind="stable")[:k]
        names = [*ids, *(block.ids[row] for row in rows.tolist())]
        return [names[i] for i in best.tolist()], both[best]

    def search(
        self,
        query: np.ndarray,
        k: int,
        mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the best living rows for one query, scoring each in float32.

        Args:
            query: float32 ``(D,)`` or ``(1, D)``, unit norm.
            k: At most this many.
            mask: bool ``(n,)``; only rows where it is True. None: all.

        Returns:
            Rows int64 and inner products float32, best first, ties by row.
        """
        usable, matching = self.alive, self.alive_count
        if mask is not None:
            usable = self.alive & mask
            matching = int(np.count_nonzero(usable))
        if matching == 0 or k <= 0:
            return _NO_ROWS, _NO_SCORES
        query = query.reshape(-1)
        if matching == self.size:
            scores = np.clip(self.vectors @ query, -1.0, 1.0)  # (n, D) @ (D,) -> (n,)
            best = _best(scores, k)
            return best, scores[best]
        rows = np.flatnonzero(usable)
        if matching < self.size // 2:
            scores = self.vectors[rows] @ query
        else:
            scores = (self.vectors @ query)[rows]
        scores = np.clip(scores, -1.0, 1.0)
        best = _best(scores, k)
        return rows[best], scores[best]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the ``k`` highest scores, best first, ties by place."""
    size = len(scores)
    if size <= k:
        return (-scores).argsort(kind="stable")
    top = scores.argpartition(size - k)[size - k :]
    top.sort()
    return np.asarray(top[(-scores[top]).argsort(kind="stable")])


@dataclass(frozen=True, slots=True)
class LiveView:
    """Immutable view of everything written after a release's watermark.

    Attributes:
        sequence: Of the last entry inside.
        segments: Every living id is alive in exactly one of them.
        hidden_rows: bool ``(N_base,)``: base rows deleted or replaced, never to be returned; None
            when there are none.
        hidden_count: How many.
        live_count: Living entries in all segments.
        foreign_count: Upserts skipped because they were embedded under another space id (the base
            row keeps answering).
        places: Where each id lives. Shared with the state, so possibly newer than this view:
            ``find`` checks it.
    """

    sequence: int
    segments: tuple[LiveSegment, ...] = ()
    hidden_rows: np.ndarray | None = None
    hidden_count: int = 0
    live_count: int = 0
    foreign_count: int = 0
    places: Mapping[str, tuple[Block, int]] = field(default_factory=dict, repr=False, compare=False)

    def hides(self, row: int) -> bool:
        """Return whether a base row was deleted or replaced."""
        return self.hidden_rows is not None and bool(self.hidden_rows[row])

    def attribute_types(self) -> dict[str, str]:
        """Return the types of the attributes that live entries have; the first of several."""
        types: dict[str, str] = {}
        for segment in self.segments:
            types = {**column_types(segment.attributes), **types}
        return types

    def find(self, id: str) -> tuple[LiveSegment, int] | None:
        """Return the segment and row where ``id`` is alive in this view, or None."""
        place = self.places.get(id)
        if place is None:
            return None
        for segment in self.segments:
            if segment.holds(place[0]) and place[1] < segment.size and segment.alive[place[1]]:
                return segment, place[1]
        # Replaced or moved by a merge since this view was made: rare, so a linear search will do
        return self.search_for(id)

    def search_for(self, id: str) -> tuple[LiveSegment, int] | None:
        """Find an id by looking at every living entry, right also while it is being deleted."""
        for segment in self.segments:
            row = -1
            with suppress(ValueError):  # of ``index``: no further one
                while True:
                    row = segment.ids.index(id, row + 1, segment.size)
                    if segment.alive[row]:
                        return segment, row
        return None
