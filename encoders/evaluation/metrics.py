"""Labelled retrieval metrics as pure functions of ranks, with their ceilings and intervals.

A *pair* is one row (query, entity that a person annotated). Its *rank* is the entity's place, from
1, in the list of its query. *Labelled Recall@k* is the share of pairs with rank <= k (paper section
5.1): it asks about annotations, and is another thing than the ANN recall of an index. A query with
more annotated entities than k cannot have all of them in its top k, so the metric has a *ceiling*
below 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

UNRANKED = np.iinfo(np.int32).max
"""Rank of an entity that a system does not return.

BM25, for one, returns no text without a word of the query.
"""


class Interval(NamedTuple):
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class QuerySums(NamedTuple):
    """A ratio metric split by query: the metric is ``sum(hits) / sum(counts)``."""

    hits: np.ndarray
    """float64 ``(Q,)``."""
    counts: np.ndarray
    """float64 ``(Q,)``: pairs of each query."""

    @property
    def value(self) -> float:
        """The metric; NaN without pairs."""
        total = float(self.counts.sum())
        return float(self.hits.sum()) / total if total else float("nan")


def sums_by_query(query_index: np.ndarray, values: np.ndarray, queries: int) -> QuerySums:
    """Group per-pair values by query.

    Args:
        query_index: int ``(P,)`` in ``[0, queries)``: the query of each pair.
        values: ``(P,)``: what to average over pairs, e.g. 0 or 1 for a hit.
        queries: Number of queries Q.
    """
    hits = np.bincount(query_index, weights=values.astype(np.float64), minlength=queries)
    return QuerySums(hits, np.bincount(query_index, minlength=queries).astype(np.float64))


def reciprocal_ranks(ranks: np.ndarray) -> np.ndarray:
    """Compute 1/rank, 0 for ``UNRANKED``; float64 of the same shape."""
    return np.where(ranks >= UNRANKED, 0.0, 1.0 / np.maximum(ranks, 1))


def recall_ceiling(
    query_index: np.ndarray, target: np.ndarray, takes_place: np.ndarray, k: int, queries: int
) -> QuerySums:
    """Count the most pairs of each query that any ranking could put into its top k.

    A query's distinct targets compete for k places; a target counts as often as it has pairs.
    Without repeats, and with every target in the corpus, the ceiling of a query with R targets is
    min(k, R) pairs of R: 10 of 40 for Recall@10 of a query with 40 targets.

    Args:
        query_index: int ``(P,)``.
        target: int ``(P,)``: the answer of the pair; all near-duplicates of one answer share a
            number.
        takes_place: bool ``(P,)``: whether the target stands in the corpus against which others are
            ranked. One that does not takes no place from others (each pair is ranked against the
            corpus plus its own target), so it can always be a hit.
        k: Depth.
        queries: Number of queries Q.

    Returns:
        ``hits``: the reachable pairs of each query; ``counts``: its pairs.
    """
    counts = np.bincount(query_index, minlength=queries).astype(np.float64)
    if not len(query_index):
        return QuerySums(counts.copy(), counts)
    keys, first, pairs = np.unique(
        np.stack([query_index, target]), axis=1, return_index=True, return_counts=True
    )
    owner, places = keys[0], takes_place[first]
    free = np.bincount(owner[~places], weights=pairs[~places], minlength=queries)
    owner, pairs = owner[places], pairs[places]
    order = np.lexsort((-pairs, owner))
    owner, pairs = owner[order], pairs[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner, side="left")
    best = place < k
    return QuerySums(
        free + np.bincount(owner[best], weights=pairs[best], minlength=queries), counts
    )


def ndcg_at_k(
    query_index: np.ndarray, ranks: np.ndarray, gains: np.ndarray, k: int, queries: int
) -> np.ndarray:
    """Compute the graded nDCG@k of each query.

    That is the sum of ``gain / log2(1 + rank)`` over its targets with rank <= k, divided by the
    best possible sum. Gains are used as they are (pass ``2**grade - 1`` for the exponential form).

    Args:
        query_index: int ``(T,)``: one row per (query, target).
        ranks: int ``(T,)``: places in the query's list, all different within one query.
        gains: float ``(T,)``, 0 or more.
        k: Depth.
        queries: Number of queries Q.

    Returns:
        float64 ``(Q,)`` in [0, 1]; NaN for a query without any positive gain.
    """
    discounted = np.where(ranks <= k, gains / np.log2(1.0 + np.minimum(ranks, k)), 0.0)
    reached = np.bincount(query_index, weights=discounted, minlength=queries)
    order = np.lexsort((-gains, query_index))
    owner, sorted_gains = query_index[order], gains[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner, side="left")
    best = np.where(place < k, sorted_gains / np.log2(2.0 + place), 0.0)
    ideal = np.bincount(owner, weights=best, minlength=queries)
    result: np.ndarray = np.divide(reached, ideal, out=np.full(queries, np.nan), where=ideal > 0)
    return result


def bootstrap_interval(sums: QuerySums, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Compute the 95% interval of a ratio metric by resampling queries.

    A query's pairs stay together, for they are not independent. Poisson bootstrap: every query gets
    a Poisson(1) weight in each resample, which is the usual bootstrap up to O(1/Q). Fewer than two
    queries give no interval (NaN).

    Args:
        sums: Hits and counts of each query; queries without pairs are left out.
        resamples: Number of resamples.
        seed: Seed of the weights.
    """
    hits, counts = sums.hits[sums.counts > 0], sums.counts[sums.counts > 0]
    if len(counts) < 2:
        return Interval(sums.value, float("nan"), float("nan"))
    totals = _poisson_totals(np.stack([hits, counts], axis=1), resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return Interval(sums.value, float(low), float(high))


class PairedDifference(NamedTuple):
    """Metric of the first system minus that of the second, on the same pairs."""

    difference: Interval
    p_value: float
    """Two-sided bootstrap p-value.

    Twice the smaller share of resamples on either side of zero, at least 1/resamples.
    """
    wins: int
    """Queries on which the first is better."""
    losses: int
    """Queries on which the second is better."""


def paired_difference(
    first: QuerySums, second: QuerySums, *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare two systems on the same pairs.

    Resampling queries keeps the pairing, so common difficulty cancels.

    Args:
        first: Sums of the first system.
        second: Sums of the second; its counts must equal the first's.
        resamples: Number of resamples.
        seed: Seed of the weights.

    Raises:
        ValueError: The two were not measured on the same pairs.
    """
    if first.counts.shape != second.counts.shape or not np.array_equal(first.counts, second.counts):
        raise ValueError(
            "a paired comparison needs the same pairs for both systems, but their counts per query"
            " differ."
        )
    kept = first.counts > 0
    delta, counts = (first.hits - second.hits)[kept], first.counts[kept]
    wins, losses = int((delta > 0).sum()), int((delta < 0).sum())
    if len(counts) < 2:
        return PairedDifference(
            Interval(first.value - second.value, float("nan"), float("nan")), 1.0, wins, losses
        )
    totals = _poisson_totals(np.stack([delta, counts], axis=1), resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = totals[:, 0] / totals[:, 1]
    differences = differences[np.isfinite(differences)]
    low, high = np.quantile(differences, [0.025, 0.975])
    side = min((differences <= 0).mean(), (differences >= 0).mean())
    p_value = min(1.0, max(2.0 * float(side), 1.0 / resamples))
    return PairedDifference(
        Interval(first.value - second.value, float(low), float(high)), p_value, wins, losses
    )


def relative_difference(
    first: QuerySums, second: QuerySums, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Compute the difference of two systems as a share of the second's metric, with its interval.

    Both are resampled together, so common difficulty cancels. NaN where the second's metric is 0.

    Args:
        first: Sums of the first system.
        second: Sums of the second, on the same pairs.
        resamples: Number of resamples.
        seed: Seed of the weights.
    """
    base = float(second.hits.sum())
    value = (float(first.hits.sum()) - base) / base if base else float("nan")
    if (second.counts > 0).sum() < 2 or not base:
        return Interval(value, float("nan"), float("nan"))
    totals = _poisson_totals(np.stack([first.hits, second.hits], axis=1), resamples, seed)
    totals = totals[totals[:, 1] > 0]
    low, high = np.quantile(totals[:, 0] / totals[:, 1] - 1.0, [0.025, 0.975])
    return Interval(value, float(low), float(high))


_NORMAL_QUANTILES = 1.959964 + 0.841621
"""Of 97.5% and 80%: what a two-sided test at 5% finds in 80 of 100 samples."""


def minimum_detectable_effect(first: QuerySums, second: QuerySums) -> float:
    """Compute the smallest true difference that a sample like this one would mostly show.

    A paired, two-sided test at 5% finds it in 80 of 100 samples of as many queries. It shrinks with
    the square root of their number.

    Returns:
        In the metric's own unit; NaN for fewer than two queries.
    """
    kept = second.counts > 0
    counts = second.counts[kept]
    if len(counts) < 2:
        return float("nan")
    delta = (first.hits - second.hits)[kept]
    mean = delta.sum() / counts.sum()
    residual = delta - mean * counts
    variance = (residual**2).sum() / counts.sum() ** 2 * len(counts) / (len(counts) - 1)
    return float(_NORMAL_QUANTILES * np.sqrt(variance))


def _poisson_totals(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sum columns under Poisson(1) row weights, in blocks of bounded memory; ``(resamples, C)``."""
    rng = np.random.default_rng(seed)
    block = max(1, (1 << 22) // len(columns))
    parts = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        parts.append(rng.poisson(1.0, (rows, len(columns))).astype(np.float64) @ columns)
    return np.concatenate(parts)
