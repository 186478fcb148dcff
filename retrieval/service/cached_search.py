"""Searches through the cache of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from index_builder.search.entity_index import EntityIndex, SearchResult
from retrieval.errors import AnswerTooLarge
from retrieval.service.admission import check_deadline
from retrieval.service.answer_cache import (
    AnswerCache,
    CachedAnswer,
    CacheKey,
    cache_key,
    serialize_hits,
)
from retrieval.service.calls import CallContext
from retrieval.service.query_vectors import Query, QueryBatch
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Found, Searcher, SearchTarget

Answer = Found | CachedAnswer

INLINE_VALUES = 200
"""Attribute values of one answer that are read on the event loop; more in a thread."""
VALUES_PER_SLICE = 20_000
"""Attribute values that a batch reads at a time; its deadline is looked at in between."""


class BatchAnswers(NamedTuple):
    """Answers to the queries of a batch, in its order.

    Attributes:
        answers: Cached or searched for.
        keys: Where ``CachedSearch.cache`` may put them; None: not to be cached.
    """

    answers: list[Answer]
    keys: list[CacheKey | None]


class CachedSearch:
    """Looks an answer up before it is searched for, and caches what was found.

    Args:
        searcher: Runs the searches.
        answers: The cache.
        max_answer_bytes: Of one answer's hits with their attributes.
    """

    def __init__(self, searcher: Searcher, answers: AnswerCache, max_answer_bytes: int) -> None:
        self.searcher = searcher
        self.answers = answers
        self._max_answer_bytes = max_answer_bytes

    async def search(self, target: SearchTarget, query: Query, request: SearchRequest) -> Answer:
        """Answer one search. Raises as ``Searcher.search``, and ``AnswerTooLarge``."""
        if not query.text or not request.is_cacheable:
            return await self._search(target, query, request)
        key = cache_key(target.entity_index, request, query.text)
        cached = self.answers.find(key)
        if cached is not None:
            return cached
        found = await self._search(target, query, request)
        self.cache(key, found)
        return found

    async def _search(self, target: SearchTarget, query: Query, request: SearchRequest) -> Found:
        found = await self.searcher.search(target, query, request)
        if not request.attributes:
            return found
        filled = (await self._with_attributes(target.entity_index, [found], request))[0]
        self.check_size(len(filled.hits))
        return filled

    def check_size(self, size_bytes: int) -> None:
        """Raise ``AnswerTooLarge`` if the hits of one call take more than an answer may hold."""
        if size_bytes > self._max_answer_bytes:
            raise AnswerTooLarge(self._max_answer_bytes)

    async def _with_attributes(
        self,
        index: EntityIndex,
        found: list[Found],
        request: SearchRequest,
        *,
        bulk: bool = False,
    ) -> list[Found]:
        """Return answers with their hits serialised, attributes included; ``bulk``: of a batch."""
        names = request.attribute_names(index.attribute_table.schema)
        work = partial(_serialized, index, [one.result for one in found], names)
        if sum(len(one.result.ids) for one in found) * len(names) <= INLINE_VALUES:
            serialized = work()
        else:
            serialized, _ = await self.searcher.in_thread(work, bulk=bulk)
        return [one._replace(hits=hits) for one, hits in zip(found, serialized, strict=True)]

    async def search_batch(
        self, target: SearchTarget, batch: QueryBatch, request: SearchRequest, context: CallContext
    ) -> BatchAnswers:
        """Answer the same search for each query; those that are not cached share one search.

        Raises as ``Searcher.search``, ``DeadlinePassed`` and ``AnswerTooLarge``.
        """
        keys: list[CacheKey | None] = [None] * len(batch.texts)
        cached: list[CachedAnswer | None] = [None] * len(batch.texts)
        if request.is_cacheable:
            index = target.entity_index
            keys = [cache_key(index, request, text) if text else None for text in batch.texts]
            cached = [None if key is None else self.answers.find(key) for key in keys]
        missing = [row for row, answer in enumerate(cached) if answer is None]
        found = iter(await self._search_rows(target, batch, missing, request, context))
        answers = [next(found) if answer is None else answer for answer in cached]
        self.check_size(sum(len(answer.hits) for answer in answers))
        return BatchAnswers(answers, keys)

    def cache(self, key: CacheKey | None, answer: Answer) -> None:
        """Cache an answer under a key made before its search began.

        ``search_batch`` leaves this to its caller, who lets others have their turn in between.
        """
        # Making an entry costs 10 us, which a cache that is off must not
        if key is None or not self.answers.max_bytes:
            return
        if not isinstance(answer, CachedAnswer):
            self.answers.put(key, CachedAnswer(answer.result, answer.hits))

    async def _search_rows(
        self,
        target: SearchTarget,
        batch: QueryBatch,
        rows: list[int],
        request: SearchRequest,
        context: CallContext,
    ) -> list[Found]:
        if not rows:
            return []
        queries = [Query(batch.vectors[row], batch.texts[row]) for row in rows]
        if not request.is_reranked:
            found = await self.searcher.search_batch(target, queries, request, context)
        else:
            found = []
            for query in queries:
                check_deadline(context.time_remaining())
                found.append(await self.searcher.search(target, query, request, bulk=True))
                await asyncio.sleep(0)  # others have their turn
        if not request.attributes:
            return found
        return await self._batch_with_attributes(target.entity_index, found, request, context)

    async def _batch_with_attributes(
        self, index: EntityIndex, found: list[Found], request: SearchRequest, context: CallContext
    ) -> list[Found]:
        """Return a batch's answers as ``_with_attributes`` does, in slices.

        Raises:
            DeadlinePassed: Nobody waits for the rest.
            AnswerTooLarge: The hits are more than one answer may hold.
        """
        names = request.attribute_names(index.attribute_table.schema)
        rows = max(1, VALUES_PER_SLICE // max(1, request.k * len(names)))
        filled: list[Found] = []
        size = 0
        for start in range(0, len(found), rows):
            check_deadline(context.time_remaining())
            rest = found[start : start + rows]
            part = await self._with_attributes(index, rest, request, bulk=True)
            size += sum(len(one.hits) for one in part)
            self.check_size(size)
            filled += part
        return filled


def _serialized(
    index: EntityIndex, results: Sequence[SearchResult], names: Sequence[str]
) -> list[bytes]:
    """Serialise the hits of several answers; all attributes are read at once."""
    values = index.attributes([id_ for result in results for id_ in result.ids], names)
    serialized = []
    start = 0
    for result in results:
        end = start + len(result.ids)
        serialized.append(serialize_hits(result, values[start:end]))
        start = end
    return serialized
