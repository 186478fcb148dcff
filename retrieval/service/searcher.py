"""One search of one index: inline or in a thread, then re-ranking. No gRPC in here."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from index_builder.search.entity_index import EntityIndex, SearchResult
from index_builder.search.request import FusedScores
from retrieval.bounds.work_threads import WorkThreads
from retrieval.rerank import rerank
from retrieval.service.admission import check_deadline
from retrieval.service.calls import CallContext
from retrieval.service.query_vectors import Query
from retrieval.service.search_request import FusedLegs, SearchRequest, stored_id

Float32 = npt.NDArray[np.float32]
T = TypeVar("T")

POOL_FACTOR = 4
"""Results fetched per wanted result where they are re-ranked."""
MAX_POOL = 1000
"""A pool is never made larger than this by its factor."""
INLINE_RERANK_K = 20
INLINE_FIRST_K = 100
"""A plain search of vectors alone for at most so many runs on the event loop where nothing is known
of its like.
"""
SLICE_SECONDS = 0.01
"""Work of a batch between two looks at its deadline and at its caller."""
KNOWN_COSTS = 2000
"""Kinds of searches whose times are remembered; beyond that all are learned anew."""


class Found(NamedTuple):
    """What one search found, and what it cost.

    Attributes:
        result: Ids and scores, and how they were found.
        search_ns: Of the index.
        rerank_ns: 0 where nothing was re-ranked.
        is_reranked: The hits are not the top k of the search (re-ranked, or some left out), and
            must not be compared with the exact ones.
        hits: As they go over the wire, where they carry attributes; else empty.
    """

    result: SearchResult
    search_ns: int
    rerank_ns: int = 0
    is_reranked: bool = False
    hits: bytes = b""

    @property
    def is_cached(self) -> bool:
        """False: see ``answer_cache.CachedAnswer``, which stands where this does."""
        return False


class SearchTarget(NamedTuple):
    """What a search goes through."""

    entity_index: EntityIndex
    legs: FusedLegs | None = None
    """None: by vectors alone."""


class Searcher:
    """Runs short searches on the event loop and longer ones in threads, where others do not wait.

    Args:
        inline_seconds: Searches expected to take less run on the event loop.
        threads: For the others; batches have as many of their own, which yield to these.
    """

    def __init__(self, inline_seconds: float, threads: int) -> None:
        self.inline_seconds = inline_seconds
        self.threads = WorkThreads(threads, "search")
        self.bulk_threads = WorkThreads(threads, "bulk-search", low_priority=True)
        self._expected: dict[Hashable, float] = {}

    async def search(
        self, target: SearchTarget, query: Query, request: SearchRequest, *, bulk: bool = False
    ) -> Found:
        """Search for one query, ``bulk`` if it is one of a batch.

        Raises as ``EntityIndex.search`` does.
        """
        threads = self.bulk_threads if bulk else self.threads
        index, k = target.entity_index, request.k
        if request.is_reranked:
            k = min(POOL_FACTOR * k, max(k, MAX_POOL))
        key = cost_key(index, request, k)
        work = partial(index.search, query.vector, k, **request.options())
        if target.legs is not None:
            key = ("fused", len(query.text).bit_length(), key)
            work = partial(_fused_search, target.legs, query, k, request)
        result, search_ns = await self.run(
            key,
            work,
            inline_first=target.legs is None and request.is_plain and k <= INLINE_FIRST_K,
            threads=threads,
        )
        if not request.is_reranked:
            return Found(result, search_ns, is_reranked=_is_cut(target, result, request))
        started = time.perf_counter_ns()
        rerank_work = partial(_rerank_result, index, result, request)
        if request.k <= INLINE_RERANK_K:
            result = rerank_work()
        else:
            result = await threads.run(rerank_work)
        return Found(result, search_ns, time.perf_counter_ns() - started, is_reranked=True)

    async def search_batch(
        self,
        target: SearchTarget,
        queries: Sequence[Query],
        request: SearchRequest,
        context: CallContext,
    ) -> list[Found]:
        """Search for each query, without re-ranking.

        Slice by slice in the threads of batches, so that other batches have their turn, and that a
        caller whose time is over, or who has gone, is noticed.

        Raises as ``EntityIndex.search_batch``, and ``DeadlinePassed``.
        """
        found: list[Found] = []
        rows = 1
        while len(found) < len(queries):
            check_deadline(context.time_remaining())
            work = partial(_search_slice, target, queries[len(found) : len(found) + rows], request)
            results, took_ns = await self.bulk_threads.run(partial(_timed, work))
            each_ns = took_ns // max(1, len(results))
            found += [
                Found(result, each_ns, is_reranked=_is_cut(target, result, request))
                for result in results
            ]
            fitting = int(SLICE_SECONDS * 1e9 / max(1, each_ns))
            rows = max(1, min(2 * rows, fitting))
        return found

    def is_short(self, key: Hashable) -> bool:
        """Whether searches like this one are known to be short enough for the event loop."""
        return self._expected.get(key, 1.0) <= self.inline_seconds

    def learn(self, key: Hashable, seconds: float) -> None:
        """Remember what a search took.

        The estimate falls fast and rises slowly: what a busy machine adds says little about the
        next search.
        """
        known = self._expected.get(key)
        if known is None:
            if len(self._expected) >= KNOWN_COSTS:
                self._expected.clear()
            self._expected[key] = seconds
            return
        error = seconds - known
        if error < 0:
            self._expected[key] = known + 0.25 * error
        else:
            self._expected[key] = known + 0.01 * min(error, 4 * known)

    async def run(
        self,
        key: Hashable,
        work: Callable[[], T],
        *,
        inline_first: bool = False,
        threads: WorkThreads | None = None,
    ) -> tuple[T, int]:
        """Run ``work`` inline or in a thread; returns its result and nanoseconds.

        Args:
            key: What the time of such work is remembered by.
            work: A search.
            inline_first: Whether to run inline when no such work is remembered.
            threads: Where else; None: those of single searches.
        """
        expected = self._expected.get(key, 0.0 if inline_first else 1.0)
        if expected <= self.inline_seconds:
            result, took_ns = _timed(work)
        else:
            result, took_ns = await (threads or self.threads).run(partial(_timed, work))
        self.learn(key, took_ns / 1e9)
        return result, took_ns

    async def in_thread(self, work: Callable[[], T], *, bulk: bool = False) -> tuple[T, int]:
        """Run ``work`` in a thread, ``bulk`` in one of batches; returns result and nanoseconds."""
        threads = self.bulk_threads if bulk else self.threads
        return await threads.run(partial(_timed, work))

    def close(self) -> None:
        """Stop the threads."""
        self.threads.close()
        self.bulk_threads.close()


def _is_cut(target: SearchTarget, result: SearchResult, request: SearchRequest) -> bool:
    """Whether hits of a fused answer were left out."""
    if target.legs is None:
        return False
    return request.min_probability is not None or result.plan == "gated"


def _search_slice(
    target: SearchTarget, queries: Sequence[Query], request: SearchRequest
) -> Sequence[SearchResult]:
    if target.legs is not None:
        return _fused_batch(target.legs, queries, request)
    vectors = np.stack([query.vector for query in queries])  # (B, D)
    return target.entity_index.search_batch(vectors, request.k, **request.options())


def cost_key(index: EntityIndex, request: SearchRequest, k: int) -> Hashable:
    """Return what the time of a search is remembered by: all that makes one slower than another.

    Holds the index's token and not the index, which would keep a retired release in memory.
    """
    plain = index.token, k.bit_length(), request.min_recall
    if not (request.exact or request.filter or request.exclude_ids):
        return plain
    excluded = len(request.exclude_ids).bit_length()
    return (*plain, request.exact, hash(request.filter), excluded)


def scores_of(index: EntityIndex, ids: Sequence[str], vector: Float32) -> Float32:
    """Return the cosine per id, NaN where the index has none; shape (N,) float32."""
    out = np.full(len(ids), np.nan, dtype=np.float32)
    for row, id_ in enumerate(ids):
        held = index.vector(stored_id(id_))
        if held is not None:
            out[row] = np.dot(held, vector)
    return out


def _fused_search(legs: FusedLegs, query: Query, k: int, request: SearchRequest) -> SearchResult:
    """Search by all legs; a query without text has no words."""
    prepared = legs.fused_index.query(query.text, query.vector, exact=request.exact)
    result = legs.fused_index.search(prepared, k, request.options(), legs.weights, gate=legs.gate)
    if request.min_probability is None or result.fused is None:
        return result
    assert result.fused.probabilities is not None, "legs_of asks for a calibrated release"
    keep = np.flatnonzero(result.fused.probabilities >= request.min_probability)
    return _of_rows(result, keep)


def _of_rows(result: SearchResult, rows: npt.NDArray[np.int64]) -> SearchResult:
    """Keep some hits of an answer, in the order of ``rows``."""
    fused = result.fused
    if fused is not None:
        likely = fused.probabilities
        fused = FusedScores(
            fused.scores[rows],
            fused.legs[rows],
            fused.used,
            None if likely is None else likely[rows],
        )
    ids = [result.ids[row] for row in rows.tolist()]
    return replace(result, ids=ids, scores=np.asarray(result.scores)[rows], fused=fused)


def _fused_batch(
    legs: FusedLegs, queries: Sequence[Query], request: SearchRequest
) -> list[SearchResult]:
    return [_fused_search(legs, query, request.k, request) for query in queries]


def _timed(work: Callable[[], T]) -> tuple[T, int]:
    started = time.perf_counter_ns()
    result = work()
    return result, time.perf_counter_ns() - started


def _rerank_result(index: EntityIndex, pool: SearchResult, request: SearchRequest) -> SearchResult:
    """Choose ``request.k`` of the pool; entities deleted since the search are left out."""
    held = [
        (row, vector)
        for row, id_ in enumerate(pool.ids)
        if (vector := index.vector(id_)) is not None
    ]
    if not held:
        return _of_rows(pool, np.zeros(0, np.int64))
    rows = [row for row, _ in held]
    vectors = np.stack([vector for _, vector in held])
    scores = np.asarray(pool.scores, dtype=np.float32)[rows]
    relevance = scores if pool.fused is None else _of_one(pool.fused.scores[rows])
    chosen = rerank(relevance, vectors, request.k, request.diversity, request.collapse_above)
    return _of_rows(pool, np.array(rows, np.int64)[chosen])


def _of_one(scores: Float32) -> Float32:
    """Scale fused scores so that the best is 1, as cosines of near-duplicates are."""
    return scores / np.float32(max(float(scores[0]), 1e-9))
