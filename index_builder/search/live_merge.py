"""Merging: the base's answer with the best of each live segment, under filters and exclusions."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from index_builder.filters.attributes import AttributeTable
from index_builder.search.live_segments import SCAN_RECALL, LiveSegment, LiveView
from index_builder.search.plans import BaseHits


class LiveConditions(NamedTuple):
    """What living entries have to meet to be merged."""

    filter: str | None
    exclude_ids: Collection[str]
    exact: bool
    """Whether to score every entry in float32."""
    table: AttributeTable
    """Of the base: its types hold for live attributes, too."""


def merge_plain(
    query: np.ndarray, k: int, hits: BaseHits, segments: tuple[LiveSegment, ...], exact: bool
) -> BaseHits:
    """Merge a plain answer with all living entries; ids are hidden in the base where they live.

    Args:
        query: float32 ``(1, D)``, unit norm.
        k: Wanted.
        hits: The base's answer.
        segments: Of one view.
        exact: Whether to score every entry in float32.
    """
    ids, scores = hits.ids, hits.scores
    for segment in segments:
        ids, scores = segment.merge(query, k, ids, scores, None, exact)
    return _merged(hits, ids, scores, segments, exact)


def merge_live(
    query: np.ndarray,
    k: int,
    hits: BaseHits,
    live: LiveView,
    conditions: LiveConditions,
) -> BaseHits:
    """Merge an answer with the living entries that meet the conditions."""
    excluded = set(conditions.exclude_ids)
    dead = [place for place in map(live.find, excluded) if place is not None]
    while True:
        ids, scores = hits.ids, hits.scores
        for segment in live.segments:
            mask = _allowed(segment, conditions, dead)
            ids, scores = segment.merge(query, k, ids, scores, mask, conditions.exact)
        leaked = excluded.intersection(ids) if excluded else ()
        if not leaked:
            return _merged(hits, ids, scores, live.segments, conditions.exact)
        # A writer deleted these after this search began, so that ``find`` missed them
        dead += [
            (segment, int(row))
            for segment in live.segments
            for row in np.flatnonzero(segment.alive)
            if segment.ids[int(row)] in leaked
        ]


def _allowed(
    segment: LiveSegment, conditions: LiveConditions, dead: list[tuple[LiveSegment, int]]
) -> np.ndarray | None:
    """Return which rows may come back, bool ``(n,)``; None: all that live."""
    mask = None
    if conditions.filter is not None:
        mask = segment.mask(conditions.filter, conditions.table)
    rows = [row for other, row in dead if other is segment]
    if not rows:
        return mask
    mask = np.ones(len(segment), np.bool_) if mask is None else mask.copy()
    mask[rows] = False
    return mask


def _merged(
    hits: BaseHits,
    ids: list[str],
    scores: np.ndarray,
    segments: tuple[LiveSegment, ...],
    exact: bool,
) -> BaseHits:
    """Return the base's answer with what live segments made of its ids and scores.

    Base and live entries reach their recall apart, so that of both is at least the lower one.
    """
    recall = hits.recall
    if recall is not None and recall > SCAN_RECALL and not exact:
        scanned = any(segment.is_scanned for segment in segments)
        recall = SCAN_RECALL if scanned else recall
    elif ids is hits.ids:
        return hits
    plan = "live" if hits.plan == "empty" and ids else hits.plan
    return BaseHits(ids, scores, plan, hits.ef, recall)
