"""Fused search of one entity type: each leg's best together, all scored by every leg.

Scores of a leg have fixed scales, so that an entity's fused score does not depend on which others
are candidates: the cosine; BM25 as a share of what the query could reach at most; the votes as a
share of the voters' weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from index_builder.fusion.probability import NO_CURVE
from index_builder.fusion.query_gate import NO_NEIGHBOUR
from index_builder.fusion.votes import NEIGHBOURS, VOTES_FILE, Votes, VoteShares
from index_builder.fusion.weights import FUSION_FILE, LEGS, Fusion, with_cold_votes
from index_builder.lexical.lexical_index import LexicalQuery
from index_builder.lexical.scan import BUDGET, ScanRequest
from index_builder.search.ef_choice import check_min_recall
from index_builder.search.entity_index import (
    SCORE_ERROR,
    EntityIndex,
    SearchOptions,
    SearchResult,
)
from index_builder.search.live_segments import LiveSegment, LiveView
from index_builder.search.plans import in_range
from index_builder.search.request import FusedScores
from index_builder.storage.corpus import unit_vector

DEPTH = 100
"""Candidates of each leg; k where that is more."""
BASE = -1
"""Number of the base among the places where a candidate can be."""
_DENSE_ONLY = np.array([1, 0, 0], np.float32)
_NO_ROWS = np.zeros(0, np.uint32)
_NO_VOTES = VoteShares(_NO_ROWS, np.zeros(0, np.float32))


class FusedQuery(NamedTuple):
    """One query, as each leg needs it."""

    text: str
    """Empty: there is no lexical leg."""
    vector: np.ndarray
    """float32 ``(D,)``, unit norm."""
    neighbours: np.ndarray
    """int64 ``(m,)``, rows of the nearest known queries; empty: there are no votes."""
    cosines: np.ndarray
    """float32 ``(m,)``, of the query with each of them."""
    is_exact: bool = False
    """Whether every known query was scored."""

    @property
    def nearest(self) -> float:
        """Cosine of the nearest known query."""
        return float(self.cosines.max(initial=NO_NEIGHBOUR))


class Candidates(NamedTuple):
    """Entities that some leg found, each scored by every leg."""

    places: np.ndarray
    """int32 ``(C,)``: ``BASE``, or the number of a live segment."""
    rows: np.ndarray
    """int64 ``(C,)``, rows there."""
    scores: np.ndarray
    """float32 ``(C, 3)``, in the order of ``LEGS``."""
    segments: tuple[LiveSegment, ...]
    """Live segments that ``places`` number."""
    selectivity: float | None
    """Share of base rows that pass the filter; None without a filter."""
    is_cold: np.ndarray
    """bool ``(C,)``: no known query led to these."""


@dataclass(frozen=True, slots=True)
class FusedIndex:
    """The legs of one entity type.

    Attributes:
        entities: Its index, with words where there were texts.
        queries: The release's index of known queries, or None.
        votes: Of these queries for the entities, or None.
        fusion: Weights, or None where none were fitted.
    """

    entities: EntityIndex
    queries: EntityIndex | None = None
    votes: Votes | None = None
    fusion: Fusion | None = None

    @classmethod
    def load(cls, folder: Path, entities: EntityIndex, queries: EntityIndex | None) -> FusedIndex:
        """Map votes and weights that lie beside an index.

        Args:
            folder: Of the entity type.
            entities: Its index.
            queries: Index of known queries, or None.

        Raises:
            IndexFormatError: They are damaged, or of other indexes.
        """
        votes = fusion = None
        if queries is not None and (folder / VOTES_FILE).is_file():
            votes = Votes.load(folder, len(queries.ids), len(entities.ids))
        if (folder / FUSION_FILE).is_file():
            fusion = Fusion.load(folder)
        return cls(entities, queries, votes, fusion)

    def query(self, text: str, vector: np.ndarray, *, exact: bool = False) -> FusedQuery:
        """Make a query of one entity type: its vector made unit, the known queries near it.

        Args:
            text: The query; empty where only its vector is known.
            vector: float32 ``(D,)``, of norm 1 up to ``NORM_TOLERANCE``.
            exact: Score every known query.
        """
        vector = unit_vector(vector)
        if self.queries is None or self.votes is None or not len(self.queries.ids):
            return FusedQuery(text, vector, np.zeros(0, np.int64), np.zeros(0, np.float32), True)
        # Known queries are those of the release: votes are counted by its rows
        found = self.queries.search(vector, NEIGHBOURS, exact=exact, live=None)
        rows = self.queries.ids.rows_of(found.ids)
        return FusedQuery(text, vector, rows, found.scores, exact)

    def search(
        self,
        query: FusedQuery,
        k: int,
        options: SearchOptions | None = None,
        weights: tuple[float, float, float] | None = None,
        *,
        gate: bool = False,
    ) -> SearchResult:
        """Find the k best entities by fused score.

        ``min_score`` stays a bound of the cosine, and the result's ``scores`` are cosines. Recall
        is that of the fused answer over exact legs: the legs are exact where ``min_recall`` was not
        measured to be reached.

        Args:
            query: From ``query``.
            k: 1 to 10,000.
            options: As for ``EntityIndex.search``; ``exact``: of every leg.
            weights: Of the legs; None: those that were fitted, else dense alone.
            gate: Whether a query that the query gate takes for nonsense gets no answer; its plan is
                ``gated`` then.

        Raises:
            InvalidQuery, DimensionMismatch, FilterError: As ``EntityIndex.search``.
        """
        options, recall = self._effort(query, k, options or {}, weights)
        if options.get("exact") and not query.is_exact:
            query = self.query(query.text, query.vector, exact=True)
        chosen = self._weights(weights)
        found = self.candidates(query, max(DEPTH, k), options)
        fused = found.scores @ chosen
        order = np.lexsort((found.rows, found.places, -fused))
        min_score = options.get("min_score")
        if min_score is not None:
            order = order[found.scores[order, 0] >= min_score - SCORE_ERROR]
        is_gated = gate and self.is_nonsense(query, found, options)
        order = order[: 0 if is_gated else k]
        curve = NO_CURVE if self.fusion is None or weights is not None else self.fusion.probability
        probabilities = curve.of(fused[order]) if curve else None
        has_leg = (True, self._has_words(query), bool(len(query.neighbours)))
        used = tuple(
            leg
            for leg, there, weight in zip(LEGS, has_leg, chosen, strict=True)
            if there and weight
        )
        legs = found.scores[order]
        cosines = legs[:, 0]
        if min_score is not None:  # what rounding alone put below it is given the score asked for
            cosines = np.maximum(cosines, np.float32(min(min_score, 1.0)))
        return SearchResult(
            ids=self.ids_of(found, order),
            scores=cosines,
            plan="gated" if is_gated else "fused",
            ef=0,
            estimated_recall=recall,
            selectivity=found.selectivity,
            fused=FusedScores(fused[order], legs, used, probabilities),
        )

    def _weights(self, weights: tuple[float, float, float] | None) -> np.ndarray:
        """Return the weights of a search, float32 ``(3,)``."""
        if weights is not None:
            return np.array(weights, np.float32)
        return _DENSE_ONLY if self.fusion is None else np.array(self.fusion.weights, np.float32)

    def _effort(
        self,
        query: FusedQuery,
        k: int,
        options: SearchOptions,
        weights: tuple[float, float, float] | None,
    ) -> tuple[SearchOptions, float | None]:
        """Return options without ``min_recall``, ``exact`` instead where needed, and the recall.

        Recall is None where it was not measured: without text, of other weights, under a filter,
        with an ``ef``, or deeper than was measured.

        Raises:
            InvalidQuery: ``min_recall`` is out of range, or beside ``ef``.
        """
        wanted = options.get("min_recall")
        if wanted is not None:
            check_min_recall(wanted, options.get("ef"))
            options = options.copy()
            options.pop("min_recall")
        if options.get("exact"):
            return options, 1.0
        point = None
        is_measured = bool(query.text) and weights is None and options.get("filter") is None
        if self.fusion is not None and is_measured and options.get("ef") is None:
            point = next((point for point in self.fusion.recall if k <= point.k), None)
        if wanted is not None and (point is None or point.low < wanted):
            return {**options, "exact": True}, 1.0
        return options, None if point is None else point.recall

    def is_nonsense(self, query: FusedQuery, found: Candidates, options: SearchOptions) -> bool:
        """Return whether the query gate would answer nothing.

        The query alone decides, not what a filter leaves. Without text, or where no gate was
        fitted, nothing is taken for nonsense.

        Args:
            query: From ``query``.
            found: Its candidates.
            options: Those of ``found``.
        """
        if self.fusion is None or self.fusion.gate is None or not query.text:
            return False
        share = float(found.scores[:, 1].max(initial=0.0))
        if options.get("filter") is not None or options.get("exclude_ids"):
            share = max(share, self._best_share(query))
        return bool(self.fusion.gate.empties(np.array([[query.nearest, share]]))[0])

    def _best_share(self, query: FusedQuery) -> float:
        """Return the best lexical share among all rows of the base."""
        words = self._words(query)
        if words is None:
            return 0.0
        assert self.entities.lexical is not None
        best = self.entities.lexical.search(words, ScanRequest(k=1)).scores
        return float(best.max(initial=0.0)) / words.maximum

    def candidates(self, query: FusedQuery, depth: int, options: SearchOptions) -> Candidates:
        """Return each leg's ``depth`` best together, scored by every leg."""
        live = options.get("live", ...)
        if live is ...:
            live = self.entities.live
        dense_options: SearchOptions = {**options, "live": live}
        dense_options.pop("min_score", None)
        dense = self.entities.search(query.vector, depth, **dense_options)
        places, rows = self._locate(dense.ids, live)
        words = self._words(query)
        parts = [self._of_base(query, words, rows[places == BASE], depth, dense_options)]
        segments = () if live is None else live.segments
        excluded = frozenset(options.get("exclude_ids", ()))
        dead = [] if live is None else [p for p in map(live.find, excluded) if p is not None]
        for number, segment in enumerate(segments):
            allowed = self._living(segment, options.get("filter"), dead)
            dense_rows = rows[places == number]
            found = self._of_segment(query, words, segment, dense_rows, depth, allowed)
            parts.append(_without(found, segment, excluded))
        numbers = np.repeat(
            np.arange(BASE, len(segments), dtype=np.int32), [len(rows) for rows, _ in parts]
        )
        all_rows = np.concatenate([rows for rows, _ in parts])
        scores = np.concatenate([scores for _, scores in parts])
        is_cold = self._cold(numbers, all_rows)
        scores = self._with_cold_votes(query, scores, is_cold)
        return Candidates(numbers, all_rows, scores, segments, dense.selectivity, is_cold)

    def _cold(self, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return to which candidates no known query led, bool ``(C,)``; to no live one."""
        is_cold = places != BASE
        if self.votes is not None:
            is_cold[~is_cold] = self.votes.is_cold[rows[~is_cold]]
        return np.asarray(is_cold)

    def score(self, query: FusedQuery, ids: Sequence[str]) -> np.ndarray:
        """Score given entities by every leg, live ones included.

        Args:
            query: From ``query``.
            ids: Of entities; an id may come twice.

        Returns:
            float32 ``(n, 3)`` in the order of ``LEGS``; NaN where an id is not in the index.
        """
        live = self.entities.live
        places, rows = self._locate(list(ids), live)
        words = self._words(query)
        scores = np.full((len(rows), len(LEGS)), np.nan, np.float32)
        is_base = places == BASE
        if is_base.any():
            base, back = np.unique(rows[is_base], return_inverse=True)
            scores[is_base] = self._score_base(query, words, base)[back]
        for number, segment in enumerate(() if live is None else live.segments):
            in_segment = places == number
            if in_segment.any():
                own, back = np.unique(rows[in_segment], return_inverse=True)
                scores[in_segment] = _score_segment(query, words, segment, own)[back]
        is_there = np.isfinite(scores[:, 0])
        is_cold = self._cold(places[is_there], rows[is_there])
        scores[is_there] = self._with_cold_votes(query, scores[is_there], is_cold)
        return scores

    def _with_cold_votes(
        self, query: FusedQuery, scores: np.ndarray, is_cold: np.ndarray
    ) -> np.ndarray:
        """Give votes to cold candidates where that was fitted, ``(C, 3)``."""
        curve = NO_CURVE if self.fusion is None else self.fusion.cold_votes
        if curve and len(query.neighbours):
            return with_cold_votes(scores, is_cold, curve)
        return scores

    def _score_base(
        self, query: FusedQuery, words: LexicalQuery | None, rows: np.ndarray
    ) -> np.ndarray:
        """Score rows of the base, int64 ascending; float32 ``(C, 3)``."""
        scores = np.zeros((len(rows), len(LEGS)), np.float32)
        scores[:, 0] = in_range(self.entities.row_vectors(rows) @ query.vector)
        if words is not None:
            assert self.entities.lexical is not None
            request = ScanRequest(k=1, also=rows.astype(np.uint32), budget=1, complete=1)
            scores[:, 1] = self.entities.lexical.search(words, request).also / words.maximum
        if self.votes is not None and len(query.neighbours):
            votes = self.votes.cast(query.neighbours, query.cosines)
            scores[:, 2] = _shares_of(votes, rows.astype(np.uint32))
        return scores

    def _has_words(self, query: FusedQuery) -> bool:
        return bool(query.text) and self.entities.lexical is not None

    def _locate(self, ids: list[str], live: LiveView | None) -> tuple[np.ndarray, np.ndarray]:
        """Return where ids are: int32 places and int64 rows; unknown ones get another place."""
        rows = self.entities.ids.rows_of(ids)
        places = np.where(rows >= 0, BASE, BASE - 1).astype(np.int32)
        if live is not None and live.live_count:
            for number, id_ in enumerate(ids):
                place = live.find(id_)
                if place is not None:
                    places[number] = live.segments.index(place[0])
                    rows[number] = place[1]
        if live is not None and live.hidden_rows is not None:
            # A writer deleted these after this search began, so that ``find`` missed them
            places[(places == BASE) & live.hidden_rows[np.maximum(rows, 0)]] = BASE - 1
        return places, rows

    def _of_base(
        self,
        query: FusedQuery,
        words: LexicalQuery | None,
        dense_rows: np.ndarray,
        depth: int,
        options: SearchOptions,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of the base, int64 ascending, and their scores ``(C, 3)``."""
        live = options.get("live")
        hidden = live.hidden_rows if isinstance(live, LiveView) else None
        allowed = self.entities.allowed_rows(options.get("filter"), options.get("exclude_ids", ()))
        votes = _NO_VOTES
        if self.votes is not None and len(query.neighbours):
            votes = _usable(self.votes.cast(query.neighbours, query.cosines), allowed, hidden)
        best_votes = votes.rows[np.argsort(-votes.shares, kind="stable")[:depth]]
        also = np.unique(np.concatenate([dense_rows.astype(np.uint32), best_votes]))
        if words is None:
            rows, lexical = also, np.zeros(len(also), np.float32)
        else:
            assert self.entities.lexical is not None
            request = ScanRequest(
                k=depth, also=also, allowed=allowed, hidden=hidden, budget=_budget(options)
            )
            hits = self.entities.lexical.search(words, request)
            rows, places = np.unique(np.concatenate([also, hits.rows]), return_inverse=True)
            lexical = np.zeros(len(rows), np.float32)
            lexical[places] = np.concatenate([hits.also, hits.scores]) / words.maximum
        scores = np.zeros((len(rows), len(LEGS)), np.float32)
        numbers = rows.astype(np.int64)
        scores[:, 0] = in_range(self.entities.row_vectors(numbers) @ query.vector)
        scores[:, 1] = lexical
        scores[:, 2] = _shares_of(votes, rows)
        return numbers, scores

    def _of_segment(
        self,
        query: FusedQuery,
        words: LexicalQuery | None,
        segment: LiveSegment,
        dense_rows: np.ndarray,
        depth: int,
        allowed: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of a live segment, int64, and their scores ``(C, 3)``; they have no votes."""
        rows = dense_rows.astype(np.uint32)
        lexical = np.zeros(len(rows), np.float32)
        if words is not None and segment.words is not None:
            hits = segment.words.search(words, ScanRequest(k=depth, also=rows, allowed=allowed))
            rows, places = np.unique(np.concatenate([rows, hits.rows]), return_inverse=True)
            lexical = np.zeros(len(rows), np.float32)
            lexical[places] = np.concatenate([hits.also, hits.scores]) / words.maximum
        scores = np.zeros((len(rows), len(LEGS)), np.float32)
        scores[:, 0] = in_range(segment.vectors[rows] @ query.vector)
        scores[:, 1] = lexical
        return rows.astype(np.int64), scores

    def _words(self, query: FusedQuery) -> LexicalQuery | None:
        """Return the query's terms; None without text, words or terms."""
        if not self._has_words(query):
            return None
        assert self.entities.lexical is not None
        words = self.entities.lexical.query(query.text)
        return words if len(words.keys) else None

    def _living(
        self, segment: LiveSegment, expression: str | None, dead: list[tuple[LiveSegment, int]]
    ) -> np.ndarray:
        """Return which rows of a live segment may come back, bool ``(n,)``."""
        usable = segment.alive
        if expression is not None:
            usable = usable & segment.mask(expression, self.entities.attribute_table)
        rows = [row for other, row in dead if other is segment]
        if rows:
            usable = usable.copy()
            usable[rows] = False
        return usable

    def ids_of(self, found: Candidates, order: np.ndarray) -> list[str]:
        """Return the ids of candidates, in order."""
        ids = []
        for place, row in zip(found.places[order].tolist(), found.rows[order].tolist()):
            source = self.entities.ids if place == BASE else found.segments[place].ids
            ids.append(source[row])
        return ids


def _without(
    found: tuple[np.ndarray, np.ndarray], segment: LiveSegment, excluded: frozenset[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out rows of excluded ids, also of those deleted since the search began."""
    rows, scores = found
    if not excluded or not len(rows):
        return found
    keep = np.array([segment.ids[row] not in excluded for row in rows.tolist()])
    return rows[keep], scores[keep]


def _budget(options: SearchOptions) -> int:
    """Return how many postings may be read; 0: all."""
    return 0 if options.get("exact") else BUDGET


def _shares_of(votes: VoteShares, rows: np.ndarray) -> np.ndarray:
    """Return the votes for rows, uint32; float32, 0 where there are none."""
    if not len(votes.rows):
        return np.zeros(len(rows), np.float32)
    at = np.minimum(votes.rows.searchsorted(rows), len(votes.rows) - 1)
    return np.where(votes.rows[at] == rows, votes.shares[at], np.float32(0))


def _score_segment(
    query: FusedQuery, words: LexicalQuery | None, segment: LiveSegment, rows: np.ndarray
) -> np.ndarray:
    """Score rows of a live segment, int64 ascending; float32 ``(C, 3)``, without votes."""
    scores = np.zeros((len(rows), len(LEGS)), np.float32)
    scores[:, 0] = in_range(segment.vectors[rows] @ query.vector)
    if words is not None and segment.words is not None:
        request = ScanRequest(k=1, also=rows.astype(np.uint32), allowed=segment.alive)
        scores[:, 1] = segment.words.search(words, request).also / words.maximum
    return scores


def _usable(votes: VoteShares, allowed: np.ndarray | None, hidden: np.ndarray | None) -> VoteShares:
    """Leave out votes for rows that may not come back."""
    keep = np.ones(len(votes.rows), np.bool_) if allowed is None else allowed[votes.rows]
    if hidden is not None:
        keep = keep & ~hidden[votes.rows]
    return VoteShares(votes.rows[keep], votes.shares[keep])
