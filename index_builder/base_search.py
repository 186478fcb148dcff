"""Plans over the immutable base: the bare graph, a graph that grows until k rows survive, a scan of the matching rows, an exact scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from index_builder.ann.exact import top_rows
from index_builder.ann.interface import AnnIndex
from index_builder.corpus import Corpus
from index_builder.filters import Selection
from index_builder.id_table import IdTable

SCAN_ROWS = 4_000
"""Up to this many matching rows are scored one by one: exact, and faster than any graph."""
SCAN_SHARE = 0.02
"""Up to this share of the corpus likewise, however many rows that is."""
_NO_SCORES = np.empty(0, dtype=np.float32)


class BaseHits(NamedTuple):
    """Ids and inner products, best first, and how they were found."""

    ids: list[str]
    scores: np.ndarray
    plan: str
    ef: int
    exact: bool


class BaseSearch:
    """Searches over the base rows of one entity type."""

    def __init__(self, corpus: Corpus, ann: AnnIndex, ids: IdTable) -> None:
        self._corpus, self._ann, self._ids = corpus, ann, ids
        self._vectors = corpus.vectors
        self._nodes = len(corpus.vectors)
        self._ann_search = ann.search
        self._take = ids.take
        self._rescore = not ann.true_distances

    def nearest(self, query: np.ndarray, k: int, ef: int) -> BaseHits:
        """The plain graph search: no filter, nothing hidden; ``query`` ``(1, D)``."""
        nodes, distances = self._ann_search(query, k, ef)
        if self._rescore:
            nodes, scores = self._exact_order(query, nodes)
        else:
            scores = 1.0 - 0.5 * distances
        if self._corpus.node_of_row is not None:
            rows, scores = self._rows_of(nodes, scores, k)
            return BaseHits(self._take(rows), scores, "graph", ef, False)
        return BaseHits(self._take(nodes), scores, "graph", ef, False)

    def nearest_batch(self, queries: np.ndarray, k: int, ef: int) -> list[BaseHits]:
        """``nearest`` for each row of ``queries`` ``(B, D)`` in one call of the graph library; same answers, half the time per query."""
        nodes, distances = self._ann.search_batch(queries, k, ef)
        if self._rescore or bool((nodes < 0).any()):
            return [self.nearest(queries[i : i + 1], k, ef) for i in range(len(queries))]
        scores = 1.0 - 0.5 * distances
        if self._corpus.node_of_row is not None:
            found = [self._rows_of(nodes[i], scores[i], k) for i in range(len(queries))]
            return [BaseHits(self._take(rows), row_scores, "graph", ef, False) for rows, row_scores in found]
        ids, width = self._take(nodes.reshape(-1)), nodes.shape[1]
        return [BaseHits(ids[i * width : (i + 1) * width], scores[i], "graph", ef, False) for i in range(len(queries))]

    def search(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        selection: Selection | None,
        hidden: np.ndarray | None,
        hidden_count: int,
        excluded: Sequence[int],
        exact: bool,
    ) -> BaseHits:
        """Search with any mix of filter, hidden rows and excluded rows.

        Args:
            query: float32 ``(1, D)``.
            k: Wanted.
            ef: Candidate-list size that the target recall needs without a filter; 0 means exact.
            selection: Rows the filter passes, or None for all.
            hidden: bool ``(N,)`` rows deleted or replaced, or None.
            hidden_count: How many of them.
            excluded: Rows never to return.
            exact: Score everything that is allowed.
        """
        total = self._corpus.rows
        matching = total if selection is None else selection.count
        if matching == 0 or total == 0:
            return BaseHits([], _NO_SCORES, "empty", 0, True)
        strict = selection is not None and matching <= max(SCAN_ROWS, SCAN_SHARE * total)
        if exact or ef == 0 or strict:
            return self._scan(query, k, selection, hidden, excluded, "scan" if selection is not None and not exact else "exact")
        return self._grow(query, k, ef, selection, hidden, hidden_count, excluded)

    def _scan(
        self, query: np.ndarray, k: int, selection: Selection | None, hidden: np.ndarray | None, excluded: Sequence[int], plan: str
    ) -> BaseHits:
        """Score every allowed row."""
        rows = np.arange(self._corpus.rows) if selection is None else selection.as_rows()
        if hidden is not None:
            rows = rows[~hidden[rows]]
        if excluded:
            rows = rows[~np.isin(rows, excluded)]
        if len(rows) == 0:
            return BaseHits([], _NO_SCORES, "empty", 0, True)
        nodes = rows if self._corpus.node_of_row is None else self._corpus.node_of_row[rows]
        vectors = self._vectors if len(nodes) == self._nodes and selection is None else self._vectors[nodes]
        scores = vectors @ query[0]  # (M, D) @ (D,) -> (M,)
        best = top_rows(scores, min(k, len(rows)))
        return BaseHits(self._take(rows[best]), scores[best], plan, 0, True)

    def _grow(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        selection: Selection | None,
        hidden: np.ndarray | None,
        hidden_count: int,
        excluded: Sequence[int],
    ) -> BaseHits:
        """Ask the graph for more until k rows survive, then hand over to the scan when that costs more."""
        total = self._corpus.rows
        share = (1.0 if selection is None else selection.count / total) * (1.0 - hidden_count / total)
        fetch = int(1.3 * (k + len(excluded)) / max(share, 1e-6)) + 4 if share < 1.0 or excluded else k
        ef_now = int(ef * max(1.0, min(1.0 / max(share, 1e-6), fetch / k)))
        allowed = None if selection is None else selection.as_mask()
        limit = max(20 * ef, 4_000)
        while fetch <= min(limit, self._nodes):
            nodes, distances = self._ann_search(query, fetch, max(ef_now, fetch))
            if self._rescore:
                nodes, node_scores = self._exact_order(query, nodes)
            else:
                node_scores = 1.0 - 0.5 * distances
            rows, scores = self._rows_of(nodes, node_scores, None)
            keep = np.ones(len(rows), dtype=np.bool_) if allowed is None else allowed[rows]
            if hidden is not None:
                keep &= ~hidden[rows]
            if excluded:
                keep &= ~np.isin(rows, excluded)
            survivors = np.flatnonzero(keep)[:k]
            if len(survivors) >= k:
                plan = "graph" if selection is None else "graph-grow"
                return BaseHits(self._take(rows[survivors]), scores[survivors], plan, max(ef_now, fetch), False)
            fetch *= 4
            ef_now *= 4
        return self._scan(query, k, selection, hidden, excluded, "scan" if selection is not None else "exact")

    def _exact_order(self, query: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes re-ordered by their true inner products, for kinds whose distances are estimates."""
        scores = self._vectors[nodes] @ query[0]
        order = np.argsort(-scores, kind="stable")
        return nodes[order], scores[order]

    def _rows_of(self, nodes: np.ndarray, scores: np.ndarray, k: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of nodes with their scores, in order; at most k."""
        corpus = self._corpus
        if corpus.row_starts is None or corpus.rows_by_node is None:
            return nodes[:k], scores[:k]
        starts = corpus.row_starts[nodes].astype(np.int64)
        sizes = corpus.row_starts[nodes + 1].astype(np.int64) - starts
        if len(sizes) == 0 or int(sizes.max()) == 1:  # none of these nodes is shared: the usual case, and the hot one
            return corpus.rows_by_node[starts[:k]], scores[:k]
        spread = np.repeat(np.arange(len(nodes)), sizes)[:k]
        within = np.arange(int(sizes.sum()))[: len(spread)] - np.repeat(np.cumsum(sizes) - sizes, sizes)[: len(spread)]
        return corpus.rows_by_node[starts[spread] + within], scores[spread]
