"""Posting lists of live rows: rows are appended, and small lists are joined as they gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from index_builder.lexical.counting import attribute_texts
from index_builder.lexical.lexical_index import LexicalHits, LexicalIndex, LexicalQuery
from index_builder.lexical.postings import Postings
from index_builder.lexical.scan import ScanRequest


class LiveWords:
    """Words of rows that only ever grow, weighed by the statistics of a base.

    One thread appends; searches take no lock.

    Args:
        base: Index whose queries search these rows, too.
    """

    def __init__(self, base: LexicalIndex) -> None:
        self._base = base
        self._chunks: tuple[LexicalIndex, ...] = ()

    @property
    def count(self) -> int:
        """Rows appended so far."""
        return sum(chunk.postings.count for chunk in self._chunks)

    def append(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Add rows by their attributes.

        Lists of about one size are joined, so there are at most about log2 of the rows.
        """
        if not values:
            return
        chunks = [*self._chunks, self._base.segment(attribute_texts(values), len(values))]
        while len(chunks) > 1 and chunks[-2].postings.count <= 2 * chunks[-1].postings.count:
            last = chunks.pop()
            chunks[-1] = self._joined([chunks[-1], last], [None, None])
        self._chunks = tuple(chunks)

    def taken(self, rows: np.ndarray) -> LiveWords | None:
        """Return the words of some rows, which ascend, renumbered from 0; None if some lack here.

        Any thread may call it while another appends.
        """
        chunks = self._chunks
        count = sum(chunk.postings.count for chunk in chunks)
        if len(rows) and int(rows[-1]) >= count:
            return None
        words = LiveWords(self._base)
        keep, start = [], 0
        stays = np.zeros(count, np.bool_)
        stays[rows] = True
        for chunk in chunks:
            keep.append(stays[start : start + chunk.postings.count])
            start += chunk.postings.count
        if keep:
            words._chunks = (self._joined(chunks, keep),)
        return words

    @classmethod
    def behind_each_other(cls, base: LexicalIndex, parts: Sequence[LiveWords]) -> LiveWords:
        """Return the words of several blocks as those of one."""
        words = cls(base)
        chunks = [chunk for part in parts for chunk in part._chunks]
        if chunks:
            words._chunks = (words._joined(chunks, [None] * len(chunks)),)
        return words

    def search(self, query: LexicalQuery, request: ScanRequest) -> LexicalHits:
        """Find the best rows, as ``LexicalIndex.search``; every posting is read.

        Rows behind the end of ``request.allowed`` are left out: a view shows the rows that were
        there when it was made.

        Args:
            query: Of the base.
            request: ``allowed`` is needed; ``hidden`` is not looked at.
        """
        assert request.allowed is not None, "live rows need a mask of those that live"
        also = np.zeros(0, np.uint32) if request.also is None else request.also
        also_scores = np.zeros(len(also), np.float32)
        rows: list[np.ndarray] = [np.zeros(0, np.uint32)]
        scores: list[np.ndarray] = [np.zeros(0, np.float32)]
        start = 0
        for chunk in self._chunks:
            count = chunk.postings.count
            allowed = np.zeros(count, np.bool_)
            part = request.allowed[start : start + count]
            allowed[: len(part)] = part
            inside = (also >= start) & (also < start + count)
            wanted = ScanRequest(
                k=request.k, also=also[inside] - np.uint32(start), allowed=allowed, budget=0
            )
            found = chunk.search(query, wanted)
            rows.append(found.rows + np.uint32(start))
            scores.append(found.scores)
            also_scores[inside] = found.also
            start += count
        row, score = np.concatenate(rows), np.concatenate(scores)
        best = np.lexsort((row, -score))[: request.k]
        return LexicalHits(row[best], score[best], also_scores, True)

    def _joined(
        self, chunks: Sequence[LexicalIndex], keep: Sequence[np.ndarray | None]
    ) -> LexicalIndex:
        postings = Postings.joined([chunk.postings for chunk in chunks], keep)
        return LexicalIndex(postings, self._base.config, self._base.average_length)
