"""How much of the fused answer over exact legs a release returns by default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index_builder.fusion.fused_search import DEPTH, FusedIndex
from index_builder.fusion.weights import RECALL_K, FusedRecall
from index_builder.search.calibration import TIE, mean_interval
from index_builder.search.entity_index import SearchOptions, SearchResult

RECALL_QUERIES = 200
"""Queries that are answered again by exact legs; each costs a scan."""
_BASE_ONLY: SearchOptions = {"live": None}
_EXACT: SearchOptions = {"live": None, "exact": True}


def measure_recall(
    fused: FusedIndex, texts: Sequence[str], vectors: np.ndarray
) -> tuple[FusedRecall, ...]:
    """Measure the recall of fused answers by the weights that were fitted, at two depths.

    Args:
        fused: With weights.
        texts: Queries; the first ``RECALL_QUERIES`` are asked.
        vectors: float32 ``(Q, D)``, theirs.
    """
    texts = texts[:RECALL_QUERIES]
    shares: dict[int, list[float]] = {RECALL_K: [], DEPTH: []}
    for text, vector in zip(texts, vectors, strict=False):
        query = fused.query(text, vector)
        served = fused.search(query, DEPTH, _BASE_ONLY)
        exact = fused.search(query, DEPTH, _EXACT)
        for k, found in shares.items():
            found.append(_share(served, exact, k))
    points = []
    for k, found in shares.items():
        if found:
            mean, low, _ = mean_interval(np.array(found))
            points.append(FusedRecall(k, round(mean, 6), round(min(low, mean), 6)))
    return tuple(points)


def _share(served: SearchResult, exact: SearchResult, k: int) -> float:
    """Return the share of the ``k`` best of an exact answer that was served; ties count."""
    assert served.fused is not None and exact.fused is not None
    wanted = exact.ids[:k]
    if not wanted:
        return 1.0
    last = float(exact.fused.scores[len(wanted) - 1]) - TIE
    known = set(wanted)
    found = sum(
        id_ in known or score >= last
        for id_, score in zip(served.ids[:k], served.fused.scores[:k].tolist(), strict=True)
    )
    return float(min(1.0, found / len(wanted)))
