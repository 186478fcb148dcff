"""One search of one index for one request: options, inline or in a thread, re-ranking, attributes; no gRPC in here."""

from __future__ import annotations

import asyncio
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from index_builder.search.entity_index import EntityIndex, SearchResult
from retrieval.service.diversity import POOL_FACTOR, rerank

Float32 = npt.NDArray[np.float32]

INLINE_RERANK_K = 20
KEPT_TIMES = 2000
"""Kinds of searches whose times are remembered; beyond that all are learned anew."""


class Found(NamedTuple):
    """The answer to one search."""

    ids: Sequence[str]
    scores: Float32
    result: SearchResult
    search_ns: int
    rerank_ns: int
    plain: (
        bool  # no re-ranking: the ids are the index's top k and may be compared with the exact ones
    )
    kept: bool = False  # by an earlier search


def as_stored(id: str) -> str:
    """An id as indexes and logs hold it: in Unicode form NFC."""
    return id if id.isascii() else unicodedata.normalize("NFC", id)


def options_of(target: Any) -> dict[str, Any]:
    """Keyword arguments for ``EntityIndex.search`` that differ from its defaults."""
    options: dict[str, Any] = {}
    if target.filter:
        options["filter"] = target.filter
    if target.exclude_ids:
        options["exclude_ids"] = tuple(map(as_stored, target.exclude_ids))
    if target.exact:
        options["exact"] = True
    if target.HasField("min_recall"):
        options["min_recall"] = target.min_recall
    if target.HasField("min_score"):
        options["min_score"] = target.min_score
    return options


class Searcher:
    """Runs searches where they disturb others least: short ones on the event loop, longer ones in threads.

    Args:
        inline_seconds: Searches expected to take less run on the event loop.
        threads: For the others.
    """

    def __init__(self, inline_seconds: float, threads: int) -> None:
        self.inline_seconds = inline_seconds
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._expected: dict[tuple[Any, ...], float] = {}

    async def search(self, index: EntityIndex, vector: Float32, target: Any) -> Found:
        """Search for one target with checked fields. Raises as ``EntityIndex.search`` does."""
        options = options_of(target)
        diversity = target.diversity if target.HasField("diversity") else None
        collapse = target.collapse_above if target.HasField("collapse_above") else None
        k: int = target.k
        if diversity is None and collapse is None:
            result, search_ns = await self.timed(
                index, options, k, partial(index.search, vector, k, **options)
            )
            return Found(result.ids, result.scores, result, search_ns, 0, True)
        pool = min(POOL_FACTOR * k, max(k, 1000))
        result, search_ns = await self.timed(
            index, options, pool, partial(index.search, vector, pool, **options)
        )
        started = time.perf_counter_ns()
        work = partial(_rerank, index, result, k, diversity, collapse)
        if k <= INLINE_RERANK_K:
            ids, scores = work()
        else:
            ids, scores = await asyncio.get_running_loop().run_in_executor(self.pool, work)
        return Found(ids, scores, result, search_ns, time.perf_counter_ns() - started, False)

    @staticmethod
    def plain_key(index: EntityIndex, k: int, min_recall: float | None) -> tuple[Any, ...]:
        """What searches of this shape without other options are remembered by."""
        return index.token, k.bit_length(), min_recall

    @staticmethod
    def _key(index: EntityIndex, k: int, options: dict[str, Any]) -> tuple[Any, ...]:
        """What a search is remembered by: everything that makes one search slow beside another that looks like it."""
        plain = index.token, k.bit_length(), options.get("min_recall")
        if not options:
            return plain
        return (
            *plain,
            "exact" in options,
            hash(options.get("filter")),
            len(options.get("exclude_ids", ())).bit_length(),
        )

    def is_short(self, key: tuple[Any, ...]) -> bool:
        """Whether searches like this one are known to be short enough for the event loop."""
        return self._expected.get(key, 1.0) <= self.inline_seconds

    def learn(self, key: tuple[Any, ...], seconds: float) -> None:
        """Remember what a search took: falls fast and rises slowly, as what a busy machine adds says little about the next search."""
        known = self._expected.get(key)
        if known is None:
            if len(self._expected) >= KEPT_TIMES:
                self._expected.clear()
            self._expected[key] = seconds
        else:
            error = seconds - known
            self._expected[key] = known + (
                0.25 * error if error < 0 else 0.01 * min(error, 4 * known)
            )

    async def timed(
        self, index: EntityIndex, options: dict[str, Any], k: int, work: Callable[[], Any]
    ) -> tuple[Any, int]:
        """Run ``work`` inline or in a thread, by what such searches took before; returns its result and nanoseconds."""
        key = self._key(index, k, options)
        expected = self._expected.get(key)
        if expected is None:
            expected = 0.0 if not options and k <= 100 else 1.0
        if expected <= self.inline_seconds:
            result, took = _timed(work)
        else:
            result, took = await asyncio.get_running_loop().run_in_executor(self.pool, _timed, work)
        self.learn(key, took / 1e9)
        return result, took

    async def in_thread(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """Run ``work`` in a thread; returns its result and nanoseconds."""
        found: tuple[Any, int] = await asyncio.get_running_loop().run_in_executor(
            self.pool, _timed, work
        )
        return found

    def close(self) -> None:
        """Stop the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _timed(work: Callable[[], Any]) -> tuple[Any, int]:
    started = time.perf_counter_ns()
    result = work()
    return result, time.perf_counter_ns() - started


def _rerank(
    index: EntityIndex,
    result: SearchResult,
    k: int,
    diversity: float | None,
    collapse: float | None,
) -> tuple[list[str], Float32]:
    held = [
        (i, vector) for i, id in enumerate(result.ids) if (vector := index.vector(id)) is not None
    ]
    if not held:
        return [], np.zeros(0, dtype=np.float32)
    positions = [i for i, _ in held]
    vectors = np.stack([vector for _, vector in held])
    scores = np.asarray(result.scores, dtype=np.float32)[positions]
    rows = rerank(scores, vectors, k, diversity, collapse)
    return [result.ids[positions[row]] for row in rows], scores[rows]


def scores_of(index: EntityIndex, ids: Sequence[str], vector: Float32) -> Float32:
    """Cosine per id, NaN where the index has none; shape (N,) float32."""
    out = np.full(len(ids), np.nan, dtype=np.float32)
    for row, id in enumerate(ids):
        held = index.vector(as_stored(id))
        if held is not None:
            out[row] = np.dot(held, vector)
    return out
