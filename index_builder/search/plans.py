"""Plans over the immutable base: the bare graph, a growing graph search, a scan of the matching rows, a scan of all rows' sketches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from index_builder.ann.exact import top_rows
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.interface import AnnIndex
from index_builder.filters.selection import Selection
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import EngineArrays, make_engine
from index_builder.storage.id_table import IdTable

SCAN_ROWS = 4_000
"""Without sketches, up to this many matching rows are scored one by one in float32 before the graph is tried."""
CODE_SCAN_ROWS = 12_000
"""The same where 8-bit codes are there."""
SCAN_COST = 20
"""One matching row scored by its 8-bit code, wherever it lies, takes the time of this many sketches read in order (20 ns and 1 ns)."""
SCAN_RECALL = 0.999
"""Expected recall of a scan that ranks by 8-bit codes and scores the best four times k in float32."""
GROW_SHARE = 0.25
"""Filters that pass at least this share are tried on the plain graph first; a scan follows when too few of its hits survive, as where the
filter and the query disagree.
"""
_NO_SCORES = np.empty(0, dtype=np.float32)


class BaseHits(NamedTuple):
    """Ids and inner products, best first, and how they were found.

    ``recall`` is 1.0 where the answer is exact, the plan's own estimate where it has one, and None
    where the calibrated curve speaks.
    """

    ids: list[str]
    scores: np.ndarray
    plan: str
    ef: int
    recall: float | None


class BaseSearch:
    """Searches over the base rows of one entity type."""

    def __init__(
        self, corpus: Corpus, ann: AnnIndex, ids: IdTable, store: EngineArrays | None = None
    ) -> None:
        self._corpus, self._ann, self._ids = corpus, ann, ids
        self._vectors = corpus.vectors
        self._nodes = len(corpus.vectors)
        self._ann_search = ann.search
        self._rescore = not ann.true_distances
        self._engine = make_engine(corpus, ids, store)
        self._walk_is_ann = self._engine is not None and isinstance(ann, Int8GraphIndex)
        self._scans_codes = self._engine is not None and store is not None
        self._sketches = self._engine is not None and store is not None and store.sketch is not None

    @property
    def sketches(self) -> bool:
        """Whether sketches can be scanned: the extension is there and so are they."""
        return self._sketches

    # ---- no filter -------------------------------------------------------------------------------

    def nearest(
        self, query: np.ndarray, k: int, ef: int, hidden: np.ndarray | None, hidden_count: int
    ) -> BaseHits:
        """The plain graph search, no filter; arguments as for ``search``.

        Fewer than k where the graph leads to fewer.
        """
        engine = self._engine
        if self._walk_is_ann and 2 * hidden_count <= self._corpus.rows:
            wide, most = self._walk_sizes(k, ef, hidden_count)
            out = np.empty(k, dtype=np.float32)
            ids = engine.walk(query, k, wide, out, most, hidden)
            return BaseHits(ids, out if len(ids) == k else out[: len(ids)], "graph", wide, None)
        if hidden is not None:
            return self.search(query, k, ef, 0, None, hidden, hidden_count, False)
        if engine is None:
            rows, scores = self._graph_rows(query, k, ef)
            return BaseHits(self._ids.take(rows[:k]), scores[:k], "graph", ef, None)
        out = np.empty(k, dtype=np.float32)
        nodes, distances = self._ann_search(query, k, ef)
        if self._rescore:
            nodes, distances = self._true_order(query, nodes)
        ids = engine.finish(nodes, distances, k, out, None, None)
        return BaseHits(ids, out if len(ids) == k else out[: len(ids)], "graph", ef, None)

    def nearest_batch(
        self, queries: np.ndarray, k: int, ef: int, hidden: np.ndarray | None, hidden_count: int
    ) -> list[BaseHits]:
        """``nearest`` for each row of ``queries`` ``(B, D)``, in one call of the graph library where it can be; the same answers."""
        if self._walk_is_ann and 2 * hidden_count <= self._corpus.rows:
            wide, most = self._walk_sizes(k, ef, hidden_count)
            scores = np.empty((len(queries), k), dtype=np.float32)
            lists = self._engine.walk_batch(queries, k, wide, scores, most, hidden)
            return [
                BaseHits(ids, scores[i, : len(ids)], "graph", wide, None)
                for i, ids in enumerate(lists)
            ]
        if hidden is not None or self._engine is None or self._rescore:
            return [
                self.nearest(queries[i : i + 1], k, ef, hidden, hidden_count)
                for i in range(len(queries))
            ]
        nodes, distances = self._ann.search_batch(queries, k, ef)
        hits = []
        for i in range(len(queries)):
            out = np.empty(k, dtype=np.float32)
            found = nodes[i] if nodes[i, -1] >= 0 else nodes[i][nodes[i] >= 0]
            ids = self._engine.finish(found, distances[i, : len(found)], k, out, None, None)
            hits.append(BaseHits(ids, out[: len(ids)], "graph", ef, None))
        return hits

    # ---- any mix ---------------------------------------------------------------------------------

    def search(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        wanted: int,
        selection: Selection | None,
        hidden: np.ndarray | None,
        hidden_count: int,
        exact: bool,
    ) -> BaseHits:
        """Search under a filter and with hidden rows.

        Args:
            query: float32 ``(1, D)``.
            k: Wanted.
            ef: Candidate-list size that the target recall needs without a filter.
            wanted: How many of the best sketches to look at more closely for it, under a filter
                that disagrees with the query.
            selection: Rows the filter passes, or None for all.
            hidden: bool ``(N,)`` rows never to return, or None.
            hidden_count: How many of them.
            exact: Score everything that is allowed in float32.
        """
        total = self._corpus.rows
        matching = total if selection is None else selection.count
        if matching == 0 or hidden_count >= total:
            return BaseHits([], _NO_SCORES, "empty", 0, 1.0)
        if exact:
            return self._exact(query, k, selection, hidden)
        if selection is not None:
            scan_rows = (
                wanted + self._nodes // SCAN_COST
                if self._sketches
                else CODE_SCAN_ROWS
                if self._scans_codes
                else SCAN_ROWS
            )
            if matching <= scan_rows or 2 * k >= matching:
                return self._scan(query, k, selection, hidden)
            if self._sketches:
                if matching >= GROW_SHARE * total:
                    hits = self._grow(query, k, ef, selection, hidden, hidden_count, attempts=1)
                    if len(hits.ids) == k:
                        return hits
                return self._sketch(query, k, wanted, selection, hidden)
        hits = self._grow(query, k, ef, selection, hidden, hidden_count)
        if len(hits.ids) == k:
            return hits
        return (
            self._exact(query, k, selection, hidden)
            if selection is None
            else self._scan(query, k, selection, hidden)
        )

    def _exact(
        self, query: np.ndarray, k: int, selection: Selection | None, hidden: np.ndarray | None
    ) -> BaseHits:
        """Score every allowed row in float32."""
        rows = None if selection is None else selection.as_rows()
        if hidden is not None:
            rows = np.flatnonzero(~hidden) if rows is None else rows[~hidden[rows]]
        plan = "exact" if selection is None else "scan"
        if rows is None:
            scores = self._vectors @ query[0]  # (U, D) @ (D,) -> (U,)
            if self._corpus.node_of_row is not None:
                scores = scores[self._corpus.node_of_row]
            best = top_rows(scores, min(k, len(scores)))
            return BaseHits(self._ids.take(best), scores[best], plan, 0, 1.0)
        if len(rows) == 0:
            return BaseHits([], _NO_SCORES, "empty", 0, 1.0)
        rows = np.sort(rows)
        nodes = rows if self._corpus.node_of_row is None else self._corpus.node_of_row[rows]
        scores = self._vectors[nodes] @ query[0]  # (M, D) @ (D,) -> (M,)
        best = top_rows(scores, min(k, len(rows)))
        return BaseHits(self._ids.take(rows[best]), scores[best], plan, 0, 1.0)

    def _scan(
        self, query: np.ndarray, k: int, selection: Selection, hidden: np.ndarray | None
    ) -> BaseHits:
        """Score the matching rows one by one: by 8-bit codes and then float32 where the extension is there, else in float32."""
        if self._engine is None:
            return self._exact(query, k, selection, hidden)
        out = np.empty(k, dtype=np.float32)
        ids = self._engine.scan(query, k, selection.as_rows(), out, hidden)
        recall = (
            SCAN_RECALL if self._scans_codes and selection.count > 2 * max(4 * k, k + 32) else 1.0
        )  # as Core::scan decides
        return BaseHits(ids, out[: len(ids)], "scan" if ids else "empty", 0, recall)

    def _sketch(
        self,
        query: np.ndarray,
        k: int,
        wanted: int,
        selection: Selection,
        hidden: np.ndarray | None,
    ) -> BaseHits:
        """Score all rows by their sketches, the best ``wanted`` that match by 8-bit codes, and the best of those in float32."""
        out = np.empty(k, dtype=np.float32)
        ids = self._engine.sketch(query, k, wanted, out, selection.as_mask(), hidden)
        return BaseHits(ids, out[: len(ids)], "sketch" if ids else "empty", 0, None)

    def sketch_scores(self, query: np.ndarray, k: int, wanted: int, mask: np.ndarray) -> np.ndarray:
        """Inner products the scan of sketches finds under ``mask`` bool ``(N,)``; for calibration."""
        return self._sketch(
            query, k, wanted, Selection(len(mask), len(mask), mask=mask), None
        ).scores

    def _grow(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        selection: Selection | None,
        hidden: np.ndarray | None,
        hidden_count: int,
        attempts: int = 8,
    ) -> BaseHits:
        """Ask the plain graph for more until k rows survive; fewer come back when that would cost more than scoring everything."""
        plan = "graph" if selection is None else "filtered-graph"
        mask = None if selection is None else selection.as_mask()
        total = self._corpus.rows
        share = max(
            1e-6,
            (1.0 if selection is None else selection.count / total) * (1.0 - hidden_count / total),
        )
        fetch = k if share == 1.0 else int(1.5 * k / share) + 4
        wide = (
            ef if share == 1.0 else int(ef / (share if selection is not None else share**0.5)) + 1
        )  # see _walk_sizes
        for _ in range(attempts):
            if fetch > min(max(20 * ef, 4_000), self._nodes):  # scoring everything costs less
                break
            wide = max(wide, fetch)
            if self._engine is None:
                rows, scores = self._graph_rows(query, fetch, wide)
                keep = np.ones(len(rows), dtype=np.bool_) if mask is None else mask[rows]
                if hidden is not None:
                    keep &= ~hidden[rows]
                survivors = np.flatnonzero(keep)[:k]
                ids, out = self._ids.take(rows[survivors]), scores[survivors]
            else:
                nodes, distances = self._ann_search(query, fetch, wide)
                if self._rescore:
                    nodes, distances = self._true_order(query, nodes)
                out = np.empty(k, dtype=np.float32)
                ids = self._engine.finish(nodes, distances, k, out, mask, hidden)
            if len(ids) == k:
                return BaseHits(ids, out, plan, wide, None)
            fetch, wide = fetch * 4, wide * 4
        return BaseHits([], _NO_SCORES, plan, wide, None)

    def _walk_sizes(self, k: int, ef: int, hidden_count: int) -> tuple[int, int]:
        """The ef of a walk past hidden rows, and how many of the nodes it finds are scored in float32.

        The k best that are not hidden are the k / share best of all, so that ef grows as it does
        for a larger k. Where so many of the best nodes are hidden that fewer than k are left, a
        wider search is due: what follows them is found with less recall.
        """
        most = max(2 * k, k + 16)
        if hidden_count == 0:
            return ef, most
        share = 1.0 - hidden_count / self._corpus.rows
        return max(round(ef / share**0.5), int(1.1 * k / share) + 4), int(most / share)

    # ---- shared ----------------------------------------------------------------------------------

    def _graph_rows(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and inner products of the plain graph search, duplicates included."""
        nodes, distances = self._ann_search(query, min(k, self._nodes), ef)
        if self._rescore:
            nodes, distances = self._true_order(query, nodes)
        scores = 1.0 - 0.5 * distances
        corpus = self._corpus
        if corpus.row_starts is None or corpus.rows_by_node is None:
            return nodes, scores
        starts = corpus.row_starts[nodes].astype(np.int64)
        sizes = corpus.row_starts[nodes + 1].astype(np.int64) - starts
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return corpus.rows_by_node[np.repeat(starts, sizes) + within], np.repeat(scores, sizes)

    def _true_order(self, query: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes re-ordered by their true distances, for kinds whose own are estimates."""
        scores = self._vectors[nodes] @ query[0]
        order = np.argsort(-scores, kind="stable")
        return nodes[order], 2.0 - 2.0 * scores[order]
