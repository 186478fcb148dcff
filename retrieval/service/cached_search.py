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
    AttributeCache,
    CachedAnswer,
    CacheKey,
    cache_key,
    serialize_attributes,
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
        self.attributes = AttributeCache()
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
        return found._replace(hits=await self._hits(target.entity_index, found.result, request))

    async def _hits(
        self, index: EntityIndex, result: SearchResult, request: SearchRequest
    ) -> bytes:
        """Serialise the hits of one answer with their attributes; raises ``AnswerTooLarge``."""
        names = request.attribute_names(index.attribute_table.schema)
        serialized = self.hits_now(index, result, names)
        if serialized is not None:
            return serialized
        rows = self.attributes.rows(index.version, names)
        missing = [id_ for id_ in result.ids if id_ not in rows]
        work = partial(serialize_attributes, index, missing, names)
        read = dict(zip(missing, (await self.searcher.in_thread(work))[0], strict=True))
        attributes = [rows[id_] if id_ in rows else read[id_] for id_ in result.ids]
        self.attributes.put(rows, read)
        return self._checked(serialize_hits(result, attributes))

    def hits_now(
        self, index: EntityIndex, result: SearchResult, names: Sequence[str]
    ) -> bytes | None:
        """Serialise hits with their attributes; None if that has to read many.

        Raises:
            AnswerTooLarge: They are more than one answer may hold.
        """
        rows = self.attributes.rows(index.version, names)
        missing = [id_ for id_ in result.ids if id_ not in rows]
        if len(missing) * len(names) > INLINE_VALUES:
            return None
        if missing:
            read = serialize_attributes(index, missing, names)
            self.attributes.put(rows, dict(zip(missing, read, strict=True)))
        return self._checked(serialize_hits(result, [rows[id_] for id_ in result.ids]))

    def _checked(self, hits: bytes) -> bytes:
        self.check_size(len(hits))
        return hits

    def check_size(self, size_bytes: int) -> None:
        """Raise ``AnswerTooLarge`` if the hits of one call take more than an answer may hold."""
        if size_bytes > self._max_answer_bytes:
            raise AnswerTooLarge(self._max_answer_bytes)

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
        """Return a batch's answers with their hits serialised, attributes included, in slices.

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
            work = partial(_serialized, index, [one.result for one in rest], names)
            if sum(len(one.result.ids) for one in rest) * len(names) <= INLINE_VALUES:
                serialized = work()
            else:
                serialized, _ = await self.searcher.in_thread(work, bulk=True)
            size += sum(map(len, serialized))
            self.check_size(size)
            filled += [one._replace(hits=hits) for one, hits in zip(rest, serialized, strict=True)]
        return filled


def _serialized(
    index: EntityIndex, results: Sequence[SearchResult], names: Sequence[str]
) -> list[bytes]:
    """Serialise the hits of several answers; all attributes are read at once."""
    ids = [id_ for result in results for id_ in result.ids]
    attributes = serialize_attributes(index, ids, names)
    serialized = []
    start = 0
    for result in results:
        end = start + len(result.ids)
        serialized.append(serialize_hits(result, attributes[start:end]))
        start = end
    return serialized
