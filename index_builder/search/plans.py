"""Plans over the immutable base: graph, filtered graph, scan of matching rows, scan of sketches.

Graphs and sketches have recall that was measured. A scan of matching rows is exact: by codes it
scores again in float32 every row that the codes' known error leaves among the best.

Every plan leaves out the rows that live deletes (tombstones) and upserts hide; ``live_state.py``
sets them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from index_builder.ann.exact import top_rows
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.filters.parts import Selection
from index_builder.search.calibration import CurvePoint
from index_builder.search.ef_choice import HIDDEN_SHARE, FilterSettings, PlainSettings
from index_builder.search.filter_calibration import (
    GRAPH_GRID,
    GRAPH_SHARES,
    HIDDEN_SHARES,
    SKETCH_GRID,
    SKETCH_SHARES,
    FilterCurves,
    calibrate_filters,
)
from index_builder.search.index_files import IndexParts
from index_builder.storage.engine_arrays import make_engine

SCAN_ROWS = 4_000
"""Without codes, up to this many matching rows are scored in float32 and no graph is tried."""
CODE_SCAN_ROWS = 12_000
"""The same where 8-bit codes but no sketches are there."""
SCAN_COST = 20
"""Sketches read in order in the time of one matching row scored by its code (1 ns and 20 ns)."""
GRAPH_SHARE = 0.25
"""Filters that pass at least this share are tried on the plain graph first.

A scan follows when too few of its hits survive, as where the filter and the query disagree.
"""
GRAPH_ATTEMPTS = 8
"""Ever wider searches of the graph before everything is scored."""
_FEWEST_SCORED = 26
"""Nodes of a walk that are scored in float32, so that its best is as sure as its ten best."""
_NO_SCORES = np.empty(0, dtype=np.float32)


class BaseHits(NamedTuple):
    """Ids and inner products, best first, and how they were found.

    ``recall`` is 1.0 where the answer is exact, what was measured of the plan where it is not, and
    None where nothing was.
    """

    ids: list[str]
    scores: np.ndarray
    plan: str
    ef: int
    recall: float | None


def _nothing() -> BaseHits:
    return BaseHits([], _NO_SCORES, "empty", 0, 1.0)


class AllowedRows(NamedTuple):
    """Which base rows may come back."""

    selection: Selection | None = None
    """Rows that the filter passes; None: all."""
    hidden: np.ndarray | None = None
    """bool ``(N,)`` rows never to return; None: none."""
    hidden_count: int = 0


class BaseSearch:
    """Searches over the base rows of one entity type."""

    def __init__(self, parts: IndexParts) -> None:
        ann, arrays = parts.ann, parts.arrays
        self._corpus = parts.corpus
        self._ids = parts.ids
        self._ann = ann
        self._vectors = parts.corpus.vectors
        self._nodes = len(self._vectors)
        self._ann_search = ann.search
        self._rescores = not ann.true_distances
        self._engine = make_engine(parts.corpus, parts.ids, arrays)
        compiled = self._engine is not None
        self._walk_is_ann = compiled and isinstance(ann, Int8GraphIndex)
        self._scans_codes = compiled and arrays is not None
        self._has_attributes = bool(parts.attributes.schema)
        self._sketches = compiled and arrays is not None and arrays.sketch is not None

    # ---- no filter -------------------------------------------------------------------------------

    def nearest(
        self, query: np.ndarray, k: int, settings: PlainSettings, allowed: AllowedRows
    ) -> BaseHits:
        """Search the plain graph without a filter.

        Fewer than k come back where the graph leads to fewer.

        Args:
            query: float32 ``(1, D)``, unit norm.
            k: Wanted.
            settings: With an ef above 0.
            allowed: Without a selection.
        """
        engine = self._engine
        _, hidden, hidden_count = allowed
        if hidden is None:
            ef, recall = settings.ef, settings.recall
        else:
            ef, recall = self._beside_hidden(settings, hidden_count)
            if ef == 0:
                return self.exact(query, k, allowed)
        if self._walk_is_ann and 2 * hidden_count <= self._corpus.rows:
            wide, scored = self._walk_sizes(k, ef, hidden_count)
            out = np.empty(k, dtype=np.float32)
            ids = engine.walk(query, k, wide, out, scored, hidden)
            return BaseHits(ids, out if len(ids) == k else out[: len(ids)], "graph", wide, recall)
        if hidden is not None:
            return self.search(query, k, allowed, FilterSettings(graph_ef=ef, graph_recall=recall))
        if engine is None:
            rows, scores = self._graph_rows(query, k, ef)
            return BaseHits(self._ids.take(rows[:k]), scores[:k], "graph", ef, recall)
        out = np.empty(k, dtype=np.float32)
        nodes, distances = self._ann_search(query, k, ef)
        if self._rescores:
            nodes, distances = self._true_order(query, nodes)
        ids = engine.finish(nodes, distances, k, out, None, None)
        return BaseHits(ids, out if len(ids) == k else out[: len(ids)], "graph", ef, recall)

    def _beside_hidden(
        self, settings: PlainSettings, hidden_count: int
    ) -> tuple[int, float | None]:
        """Return ef, 0 for an exact scan, and the recall at it while that many rows are hidden."""
        if hidden_count <= HIDDEN_SHARE * self._corpus.rows:
            return settings.hidden_ef, settings.hidden_recall
        return (0, 1.0) if settings.must_reach else (settings.ef, None)

    def nearest_batch(
        self, queries: np.ndarray, k: int, settings: PlainSettings, allowed: AllowedRows
    ) -> list[BaseHits]:
        """Answer each row of ``queries`` ``(B, D)`` as ``nearest`` does, in one call if it can."""
        _, hidden, hidden_count = allowed
        ef, recall = settings.ef, settings.recall
        if hidden is not None:
            ef, recall = self._beside_hidden(settings, hidden_count)
        if self._walk_is_ann and ef and 2 * hidden_count <= self._corpus.rows:
            wide, scored = self._walk_sizes(k, ef, hidden_count)
            scores = np.empty((len(queries), k), dtype=np.float32)
            lists = self._engine.walk_batch(queries, k, wide, scores, scored, hidden)
            return [
                BaseHits(ids, scores[i, : len(ids)], "graph", wide, recall)
                for i, ids in enumerate(lists)
            ]
        if hidden is not None or self._engine is None or self._rescores:
            return [
                self.nearest(queries[i : i + 1], k, settings, allowed) for i in range(len(queries))
            ]
        nodes, distances = self._ann.search_batch(queries, k, ef)
        hits = []
        for i in range(len(queries)):
            out = np.empty(k, dtype=np.float32)
            found = nodes[i] if nodes[i, -1] >= 0 else nodes[i][nodes[i] >= 0]
            ids = self._engine.finish(found, distances[i, : len(found)], k, out, None, None)
            hits.append(BaseHits(ids, out[: len(ids)], "graph", ef, recall))
        return hits

    def _walk_sizes(self, k: int, ef: int, hidden_count: int) -> tuple[int, int]:
        """Choose ef for a walk past hidden rows, and how many nodes are scored in float32.

        The k best that are not hidden are the k / share best of all, so that ef grows as it does
        for a larger k. Where so many of the best nodes are hidden that fewer than k are left, a
        wider search is due: what follows them is found with less recall.
        """
        scored = max(2 * k, _FEWEST_SCORED)
        if hidden_count == 0:
            return ef, scored
        share = 1.0 - hidden_count / self._corpus.rows
        return max(round(ef / share**0.5), int(1.1 * k / share) + 4), int(scored / share)

    # ---- filters and hidden rows -----------------------------------------------------------------

    def search(
        self, query: np.ndarray, k: int, allowed: AllowedRows, settings: FilterSettings
    ) -> BaseHits:
        """Search under a filter and with hidden rows, by the cheapest plan that is good enough.

        Args:
            query: float32 ``(1, D)``, unit norm.
            k: Wanted.
            allowed: Which rows may come back.
            settings: Plans that reach the wanted recall; without a selection, the graph's.
        """
        selection, hidden, hidden_count = allowed
        total = self._corpus.rows
        matching = total if selection is None else selection.count
        if matching == 0 or hidden_count >= total:
            return _nothing()
        if selection is None:
            hits = self._widening_graph(query, k, settings, allowed, GRAPH_ATTEMPTS)
            return hits if len(hits.ids) == k else self.exact(query, k, allowed)
        sketches = settings.sketches if self._sketches else None
        if matching <= self._scan_rows(sketches) or 2 * k >= matching:
            return self._scan(query, k, selection, hidden)
        passes_many = matching >= GRAPH_SHARE * total
        was_measured = passes_many or (
            not self._scans_codes and matching >= SKETCH_SHARES[-1] * total
        )
        if settings.graph_ef is not None and was_measured:
            attempts = 1 if self._scans_codes else GRAPH_ATTEMPTS
            hits = self._widening_graph(query, k, settings, allowed, attempts)
            if len(hits.ids) == k:
                return hits
        if sketches is None:
            return self._scan(query, k, selection, hidden)
        return self._sketch(query, k, sketches, allowed, settings.sketch_recall)

    def _scan_rows(self, sketches: int | None) -> int:
        """Return how many matching rows are scanned rather than anything else tried."""
        if sketches is not None:
            return sketches + self._nodes // SCAN_COST
        return CODE_SCAN_ROWS if self._scans_codes else SCAN_ROWS

    def exact(self, query: np.ndarray, k: int, allowed: AllowedRows) -> BaseHits:
        """Score every allowed row in float32."""
        selection, hidden, _ = allowed
        rows = None if selection is None else selection.as_rows()
        if hidden is not None:
            rows = np.flatnonzero(~hidden) if rows is None else rows[~hidden[rows]]
        plan = "exact"
        node_of_row = self._corpus.node_of_row
        if rows is None and self._nodes:
            scores = self._vectors @ query[0]  # (U, D) @ (D,) -> (U,)
            if node_of_row is not None:
                scores = scores[node_of_row]
            best = top_rows(scores, min(k, len(scores)))
            return BaseHits(self._ids.take(best), in_range(scores[best]), plan, 0, 1.0)
        if rows is None or len(rows) == 0:
            return _nothing()
        rows = np.sort(rows)
        nodes = rows if node_of_row is None else node_of_row[rows]
        scores = self._vectors[nodes] @ query[0]  # (M, D) @ (D,) -> (M,)
        best = top_rows(scores, min(k, len(rows)))
        return BaseHits(self._ids.take(rows[best]), in_range(scores[best]), plan, 0, 1.0)

    def _scan(
        self, query: np.ndarray, k: int, selection: Selection, hidden: np.ndarray | None
    ) -> BaseHits:
        """Scan the matching rows by codes, exactly; all in float32 where codes rule out none."""
        if self._engine is None:
            hits = self.exact(query, k, AllowedRows(selection, hidden))
            return hits._replace(plan="exact-scan") if hits.ids else hits
        out = np.empty(k, dtype=np.float32)
        ids, scored = self._engine.scan(query, k, selection.as_rows(), out, hidden)
        if not ids:
            return _nothing()
        plan = "exact-scan" if scored == selection.count else "scan"
        return BaseHits(ids, out[: len(ids)], plan, 0, 1.0)

    def _sketch(
        self,
        query: np.ndarray,
        k: int,
        sketches: int,
        allowed: AllowedRows,
        recall: float | None,
    ) -> BaseHits:
        """Rank all rows by sketches, the best that match by codes, the best of those in float32."""
        selection, hidden, _ = allowed
        assert selection is not None, "sketches are scanned under filters only"
        out = np.empty(k, dtype=np.float32)
        ids = self._engine.sketch(query, k, sketches, out, selection.as_mask(), hidden)
        return BaseHits(ids, out[: len(ids)], "sketch", 0, recall) if ids else _nothing()

    def measure_filters(self, queries: np.ndarray) -> FilterCurves:
        """Measure each plan under filters and beside hidden rows.

        Args:
            queries: float32 ``(Q, D)``, unit rows.
        """
        corpus = self._corpus

        def sketch(query: np.ndarray, k: int, sketches: int, mask: np.ndarray) -> np.ndarray | None:
            return self._sketch(query, k, sketches, _passing(mask), None).scores

        def graph(query: np.ndarray, k: int, ef: int, mask: np.ndarray) -> np.ndarray | None:
            attempts = 1 if self._scans_codes else GRAPH_ATTEMPTS
            settings = FilterSettings(graph_ef=ef)
            hits = self._widening_graph(query, k, settings, _passing(mask), attempts)
            return hits.scores if len(hits.ids) == k else None

        def beside_hidden(
            query: np.ndarray, k: int, ef: int, mask: np.ndarray
        ) -> np.ndarray | None:
            hidden = ~mask
            allowed = AllowedRows(None, hidden, int(np.count_nonzero(hidden)))
            settings = PlainSettings(ef, None, ef, None, 1.0)
            # At most the hidden share that is measured, whatever ties make of it
            if allowed.hidden_count > 1.1 * HIDDEN_SHARE * corpus.rows:
                return None
            hits = self.nearest(query, k, settings, allowed)
            return hits.scores if len(hits.ids) == k and hits.plan == "graph" else None

        shares = GRAPH_SHARES if self._scans_codes else SKETCH_SHARES
        curves: dict[str, tuple[CurvePoint, ...]] = {"sketch": (), "graph": ()}
        if self._sketches:
            curves["sketch"] = calibrate_filters(
                sketch, corpus, queries, SKETCH_SHARES, SKETCH_GRID
            )
        if self._has_attributes:
            curves["graph"] = calibrate_filters(graph, corpus, queries, shares, GRAPH_GRID)
        hidden_curve = calibrate_filters(beside_hidden, corpus, queries, HIDDEN_SHARES, GRAPH_GRID)
        return FilterCurves(hidden=hidden_curve, **curves)

    def _widening_graph(
        self,
        query: np.ndarray,
        k: int,
        settings: FilterSettings,
        allowed: AllowedRows,
        attempts: int,
    ) -> BaseHits:
        """Ask the plain graph for more until k rows survive filter and hidden rows.

        Fewer come back when going on would cost more than scoring everything.
        """
        selection, hidden, _ = allowed
        ef, recall = settings.graph_ef or k, settings.graph_recall
        plan = "graph" if selection is None else "filtered-graph"
        mask = None if selection is None else selection.as_mask()
        fetch, wide = self._first_sizes(k, ef, allowed)
        most = min(max(20 * ef, 4_000), self._nodes)
        for _ in range(attempts):
            if fetch > most:
                break
            wide = max(wide, fetch)
            if self._engine is None:
                rows, scores = self._graph_rows(query, fetch, wide)
                surviving = _surviving(rows, mask, hidden)[:k]
                ids, out = self._ids.take(rows[surviving]), scores[surviving]
            else:
                nodes, distances = self._ann_search(query, fetch, wide)
                if self._rescores:
                    nodes, distances = self._true_order(query, nodes)
                out = np.empty(k, dtype=np.float32)
                ids = self._engine.finish(nodes, distances, k, out, mask, hidden)
            if len(ids) == k:
                return BaseHits(ids, out, plan, wide, recall)
            fetch, wide = fetch * 4, wide * 4
        return BaseHits([], _NO_SCORES, plan, wide, None)

    def _first_sizes(self, k: int, ef: int, allowed: AllowedRows) -> tuple[int, int]:
        """Choose how many nodes to fetch, and with which ef, by the share of rows that survive."""
        selection, _, hidden_count = allowed
        total = self._corpus.rows
        passing = 1.0 if selection is None else selection.count / total
        share = max(1e-6, passing * (1.0 - hidden_count / total))
        if share == 1.0:
            return k, ef
        # Hidden rows alone: ef grows with the root of the share, see _walk_sizes
        scale = share**0.5 if selection is None else share
        return int(1.5 * k / share) + 4, int(ef / scale) + 1

    # ---- shared ----------------------------------------------------------------------------------

    def _graph_rows(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and inner products of the plain graph search, duplicates included."""
        nodes, distances = self._ann_search(query, min(k, self._nodes), ef)
        if self._rescores:
            nodes, distances = self._true_order(query, nodes)
        scores = in_range(1.0 - 0.5 * distances)
        corpus = self._corpus
        if corpus.row_starts is None or corpus.rows_by_node is None:
            return nodes, scores
        starts = corpus.row_starts[nodes].astype(np.int64)
        sizes = corpus.row_starts[nodes + 1].astype(np.int64) - starts
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return corpus.rows_by_node[np.repeat(starts, sizes) + within], np.repeat(scores, sizes)

    def _true_order(self, query: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Order nodes by their true distances, for kinds whose own are estimates."""
        scores = self._vectors[nodes] @ query[0]
        order = np.argsort(-scores, kind="stable")
        return nodes[order], 2.0 - 2.0 * scores[order]


def in_range(scores: np.ndarray) -> np.ndarray:
    """Return inner products within -1 and 1, where those of unit vectors lie but for rounding."""
    clipped: np.ndarray = np.clip(scores, -1.0, 1.0)
    return clipped


def _passing(mask: np.ndarray) -> AllowedRows:
    return AllowedRows(Selection(int(np.count_nonzero(mask)), len(mask), mask=mask))


def _surviving(rows: np.ndarray, mask: np.ndarray | None, hidden: np.ndarray | None) -> np.ndarray:
    """Return the places of ``rows`` that pass the filter and are not hidden."""
    keep = np.ones(len(rows), dtype=np.bool_) if mask is None else mask[rows]
    if hidden is not None:
        keep &= ~hidden[rows]
    return np.flatnonzero(keep)
