"""Searches through the cache of answers."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from retrieval.service.admission import check_deadline
from retrieval.service.answer_cache import AnswerCache, CachedAnswer, CacheKey, cache_key
from retrieval.service.calls import CallContext
from retrieval.service.query_vectors import Query, QueryBatch
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Found, Searcher, SearchTarget

Answer = Found | CachedAnswer


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
    """

    def __init__(self, searcher: Searcher, answers: AnswerCache) -> None:
        self.searcher = searcher
        self.answers = answers

    async def search(self, target: SearchTarget, query: Query, request: SearchRequest) -> Answer:
        """Answer one search. Raises as ``Searcher.search``."""
        if not query.text or not request.is_cacheable:
            return await self.searcher.search(target, query, request)
        key = cache_key(target.entity_index, request, query.text)
        cached = self.answers.find(key)
        if cached is not None:
            return cached
        found = await self.searcher.search(target, query, request)
        self.cache(key, found)
        return found

    async def search_batch(
        self, target: SearchTarget, batch: QueryBatch, request: SearchRequest, context: CallContext
    ) -> BatchAnswers:
        """Answer the same search for each query; those that are not cached share one search.

        Raises as ``Searcher.search``, and ``DeadlinePassed``.
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
        return BatchAnswers(answers, keys)

    def cache(self, key: CacheKey | None, answer: Answer) -> None:
        """Cache an answer under a key made before its search began.

        ``search_batch`` leaves this to its caller, who lets others have their turn in between.
        """
        # Making an entry costs 10 us, which a cache that is off must not
        if key is None or not self.answers.max_bytes:
            return
        if not isinstance(answer, CachedAnswer):
            self.answers.put(key, CachedAnswer(answer.result))

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
            return await self.searcher.search_batch(target, queries, request, context)
        found = []
        for query in queries:
            check_deadline(context.time_remaining())
            found.append(await self.searcher.search(target, query, request, bulk=True))
            await asyncio.sleep(0)  # others have their turn
        return found
