"""Re-rank a pool of hits: diversity by MMR, near-duplicates collapsed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def rerank(
    scores: Float32, vectors: Float32, k: int, diversity: float | None, collapse_above: float | None
) -> list[int]:
    """Collapse near-duplicates, then diversify, then cut to ``k`` rows of a pool.

    Args:
        scores: ``(N,)`` float32, cosine of each row with the query, best first.
        vectors: ``(N, D)`` float32 unit rows.
        k: Rows wanted.
        diversity: As ``trade_off`` of ``maximal_marginal_relevance``; None or 1: no diversifying.
        collapse_above: As ``threshold`` of ``collapse_near_duplicates``; None: no collapsing.

    Returns:
        Row numbers of the pool in their new order.
    """
    if collapse_above is None:
        rows = list(range(len(scores)))
    else:
        rows = collapse_near_duplicates(vectors, collapse_above)
    if diversity is None or diversity >= 1.0:
        return rows[:k]
    picked = maximal_marginal_relevance(scores[rows], vectors[rows], k, diversity)
    return [rows[i] for i in picked]


def maximal_marginal_relevance(
    scores: Float32, vectors: Float32, k: int, trade_off: float
) -> list[int]:
    """Choose ``k`` rows one by one, each relevant to the query and unlike those chosen before.

    Each maximises ``trade_off * score - (1 - trade_off) * highest cosine to a chosen row``
    (Carbonell and Goldstein, 1998).

    Args:
        scores: ``(N,)`` float32, cosine of each pool row with the query.
        vectors: ``(N, D)`` float32 unit rows.
        k: Rows to choose; all of them if the pool is smaller.
        trade_off: Their lambda, 0 (variety only) to 1 (relevance only).

    Returns:
        Chosen row numbers in the order of choice; the first is always the most relevant row; ties
        keep the order of the pool.
    """
    count = len(scores)
    if count == 0 or k < 1:
        return []
    chosen = [int(np.argmax(scores))]
    available = np.ones(count, dtype=bool)
    available[chosen[0]] = False
    closest = vectors @ vectors[chosen[0]]  # (N,) highest cosine to a chosen row
    while len(chosen) < min(k, count):
        value = np.where(available, trade_off * scores - (1.0 - trade_off) * closest, -np.inf)
        best = int(np.argmax(value))
        chosen.append(best)
        available[best] = False
        np.maximum(closest, vectors @ vectors[best], out=closest)
    return chosen


def collapse_near_duplicates(vectors: Float32, threshold: float) -> list[int]:
    """Keep, walking from best to worst, each row that is like no row kept before it.

    Args:
        vectors: ``(N, D)`` float32 unit rows, best first.
        threshold: Cosine to a kept row above which a row is dropped.

    Returns:
        Kept row numbers, ascending.
    """
    kept: list[int] = []
    for row in range(len(vectors)):
        if not kept or float(np.max(vectors[kept] @ vectors[row])) <= threshold:
            kept.append(row)
    return kept
