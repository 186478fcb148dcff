"""The calls of the service ``Retrieval``: query vector, search, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from index_builder.errors import UnknownEntityType
from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from retrieval.bounds.messages import bounds_of
from retrieval.bounds.work_threads import WorkThreads
from retrieval.config import ServeConfig
from retrieval.observability.call_log import CallLog
from retrieval.observability.impressions import ImpressionLog
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import EVERYONE, VISITOR, Caller, Tokens
from retrieval.service.admission import Admission
from retrieval.service.answer_cache import AnswerCache
from retrieval.service.cached_search import Answer, BatchAnswers, CachedSearch
from retrieval.service.calls import CallInfo, Deadlines
from retrieval.service.query_vectors import QueryVectors
from retrieval.service.responses import (
    describe_release,
    fill_answer,
    fill_timings,
    retrieve_response,
)
from retrieval.service.search_records import BatchSearches, Labelled, Search, SearchRecorder
from retrieval.service.search_request import SearchRequest, legs_of
from retrieval.service.searcher import Found, Searcher, SearchTarget, scores_of
from retrieval.service.validation import check_answer_size, require_count

HITS_PER_TURN = 500
"""Hits of a batch that are written into its answer before other calls have their turn."""
TEXTS_PER_SLICE = 100
"""Texts of a batch that are split into tokens at a time."""
INLINE_SCORE_IDS = 50
"""A Score of at most so many ids runs on the event loop."""


def _shares_of(serving: ServingRelease, texts: Sequence[str]) -> list[float]:
    return [serving.unknown_share(text) for text in texts]


class RetrievalService:
    """Answers questions. One instance per worker; methods run on its event loop.

    Args:
        config: Limits, caches, threads.
        releases: Which release answers.
        metrics: Where calls are counted.
        tokens: Known callers; None: everyone may ask, and on loopback change things.
        impressions: Log of what was shown, or None.
        tracer: Writes spans, or None.
    """

    def __init__(
        self,
        config: ServeConfig,
        releases: LiveReleases,
        metrics: Metrics,
        *,
        tokens: Tokens | None = None,
        impressions: ImpressionLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.releases = releases
        self.metrics = metrics
        self.tokens = tokens
        self.anonymous = EVERYONE if config.is_local else VISITOR
        """What everyone may do without tokens."""
        self.tracer = tracer
        self.call_log = CallLog(every=config.access_log, slow_seconds=config.slow_ms / 1e3)
        self.deadlines = Deadlines(config.default_deadline_seconds, config.max_deadline_seconds)
        self.draining = False
        """Health says so; calls that still come are answered."""
        self.listening = False
        """Whether the gRPC port takes calls; until then health says that it does not serve."""
        self.admission = Admission(config.max_in_flight)
        self.bulk_admission = Admission(config.max_in_flight)
        """Of batches and embeddings: they take no place from those who wait at a page."""
        self.control_admission = Admission(config.max_in_flight)
        """Of admin calls and descriptions: a server full of searches can still be governed."""
        self.parsing = WorkThreads(1, "parse")
        """Of large messages."""
        self.message_bounds = bounds_of(config.limits)
        self.queries = QueryVectors(config.limits)
        self.searches = CachedSearch(
            Searcher(config.inline_search_us / 1e6, config.search_threads),
            AnswerCache(config.answer_cache_bytes),
            config.limits.max_answer_bytes,
        )
        self.recorder = SearchRecorder(config, releases, metrics, impressions)
        metrics.add_source(self._measurements)

    def close(self) -> None:
        """Stop threads and close files."""
        self.recorder.close()
        self.searches.searcher.close()
        self.parsing.close()
        if self.tracer is not None:
            self.tracer.close()

    async def retrieve(self, message: pb.RetrieveRequest, call: CallInfo) -> pb.RetrieveResponse:
        """Answer one query from one entity type."""
        with self.releases.resolve(message.release_id) as serving:
            index = self._index(serving, message.entity_type, call.caller)
            request = SearchRequest.parse(message, self.limits)
            attributes = len(request.attribute_names(index.attribute_table.schema))
            check_answer_size([(request.k, attributes)], self.limits)
            query = await self.queries.of_message(message, serving, call.context)
            self.recorder.count_encoding(query)
            target = self._target(serving, index, request)
            answer = await self.searches.search(target, query, request)
            response = retrieve_response(serving, query, answer, message.request_id)
            self.recorder.count_unknown(response.unknown_share)
            search = Search(serving, index, request, query.vector, query.text)
            response.request_id = self._record(search, answer, message, message.request_id)
            response.timings.search_ns = answer.search_ns
            response.timings.rerank_ns = answer.rerank_ns
            fill_timings(response.timings, query, call.started_ns)
            return response

    async def retrieve_multi(
        self, message: pb.RetrieveMultiRequest, call: CallInfo
    ) -> pb.RetrieveMultiResponse:
        """Answer one query by several searches of one release."""
        with self.releases.resolve(message.release_id) as serving:
            require_count("targets", len(message.targets), self.limits.max_targets)
            indexes = [
                self._index(serving, target.entity_type, call.caller) for target in message.targets
            ]
            requests = [SearchRequest.parse(target, self.limits) for target in message.targets]
            check_answer_size(
                (
                    (request.k, len(request.attribute_names(index.attribute_table.schema)))
                    for request, index in zip(requests, indexes, strict=True)
                ),
                self.limits,
            )
            query = await self.queries.of_message(message, serving, call.context)
            self.recorder.count_encoding(query)
            response = pb.RetrieveMultiResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query.is_cached,
                request_id=message.request_id,
                unknown_share=serving.unknown_share(query.text),
            )
            self.recorder.count_unknown(response.unknown_share)
            size = 0
            for request, index in zip(requests, indexes, strict=True):
                target = self._target(serving, index, request)
                answer = await self.searches.search(target, query, request)
                size += len(answer.hits)
                self.searches.check_size(size)
                filled = response.answers.add(entity_type=request.entity_type)
                fill_answer(filled, answer, query_cached=query.is_cached)
                response.timings.search_ns += answer.search_ns
                response.timings.rerank_ns += answer.rerank_ns
                search = Search(serving, index, request, query.vector, query.text)
                response.request_id = self._record(search, answer, message, response.request_id)
            fill_timings(response.timings, query, call.started_ns)
            return response

    async def retrieve_batch(
        self, message: pb.RetrieveBatchRequest, call: CallInfo
    ) -> pb.RetrieveBatchResponse:
        """Answer many queries by the same search of one release."""
        with self.releases.resolve(message.release_id) as serving:
            index = self._index(serving, message.target.entity_type, call.caller)
            request = SearchRequest.parse(message.target, self.limits)
            attributes = len(request.attribute_names(index.attribute_table.schema))
            queries = self.searches_of(message)
            check_answer_size([(queries * request.k, attributes)], self.limits)
            batch = await self.queries.of_batch(message, serving, call.context)
            response = pb.RetrieveBatchResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                request_id=message.request_id,
            )
            target = self._target(serving, index, request)
            found = await self.searches.search_batch(target, batch, request, call.context)
            searches = BatchSearches(serving, index, request, batch)
            shares = await self._unknown_shares(serving, batch.texts)
            await self._fill_batch(response, message, searches, found, shares)
            self.recorder.count_batch(request.entity_type, found.answers)
            fill_timings(response.timings, batch, call.started_ns)
            return response

    async def embed(self, message: pb.EmbedRequest, call: CallInfo) -> pb.EmbedResponse:
        """Return the vectors of texts."""
        with self.releases.resolve(message.release_id) as serving:
            batch = await self.queries.of_texts(message.queries, serving, call.context)
            response = pb.EmbedResponse(
                embeddings=batch.vectors.astype("<f4", copy=False).tobytes(),
                dimension=serving.dimension,
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                form_id=serving.form_id,
                cache_hits=batch.cached,
            )
            fill_timings(response.timings, batch, call.started_ns)
            return response

    async def score(self, message: pb.ScoreRequest, call: CallInfo) -> pb.ScoreResponse:
        """Return the cosines of a query with given ids."""
        with self.releases.resolve(message.release_id) as serving:
            index = self._index(serving, message.entity_type, call.caller)
            require_count("ids", len(message.ids), self.limits.max_score_ids)
            query = await self.queries.of_message(message, serving, call.context)
            work = partial(scores_of, index, list(message.ids), query.vector)
            if len(message.ids) <= INLINE_SCORE_IDS:
                began = time.perf_counter_ns()
                scores = work()
                search_ns = time.perf_counter_ns() - began
            else:
                scores, search_ns = await self.searches.searcher.in_thread(work)
            response = pb.ScoreResponse(
                scores=scores,
                missing=int(np.count_nonzero(np.isnan(scores))),
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query.is_cached,
            )
            response.timings.search_ns = search_ns
            fill_timings(response.timings, query, call.started_ns)
            return response

    async def describe_release(
        self, message: pb.DescribeReleaseRequest, call: CallInfo
    ) -> pb.DescribeReleaseResponse:
        """Describe what is being served."""
        serving = self.releases.resolve(message.release_id)
        return describe_release(serving, self.releases.loaded, self.limits, call.caller)

    def _target(
        self, serving: ServingRelease, index: EntityIndex, request: SearchRequest
    ) -> SearchTarget:
        """Return what answers a request: an index alone, or all legs of its entity type."""
        fused = serving.release.fused[request.entity_type]
        legs = legs_of(fused, request, gate_by_default=self.config.query_gate)
        return SearchTarget(index, legs)

    def searches_of(self, message: pb.RetrieveBatchRequest) -> int:
        """Return how many searches a batch holds, before it is checked."""
        active = self.releases.active
        if message.queries or active is None:
            return len(message.queries)
        return len(message.embeddings) // (4 * active.dimension)

    async def _unknown_shares(self, serving: ServingRelease, texts: Sequence[str]) -> list[float]:
        """Return ``ServingRelease.unknown_share`` of each text; a thread splits them into tokens.

        In slices, so that other batches have their turn.
        """
        if not any(texts):
            return [0.0] * len(texts)
        shares: list[float] = []
        for start in range(0, len(texts), TEXTS_PER_SLICE):
            part = texts[start : start + TEXTS_PER_SLICE]
            work = partial(_shares_of, serving, part)
            found, _ = await self.searches.searcher.in_thread(work, bulk=True)
            shares += found
        return shares

    async def _fill_batch(
        self,
        response: pb.RetrieveBatchResponse,
        message: pb.RetrieveBatchRequest,
        searches: BatchSearches,
        found: BatchAnswers,
        unknown_shares: Sequence[float],
    ) -> None:
        """Write, cache and record the answers of a batch; others have their turn in between."""
        recorder = self.recorder
        hits = 0
        for row, (answer, key) in enumerate(zip(found.answers, found.keys, strict=True)):
            filled = response.answers.add()
            fill_answer(filled, answer, query_cached=searches.batch.cached[row])
            filled.unknown_share = unknown_shares[row]
            recorder.count_unknown(filled.unknown_share)
            if not answer.is_cached:
                self.searches.cache(key, answer)
                response.timings.search_ns += answer.search_ns
                response.timings.rerank_ns += answer.rerank_ns
            if recorder.draw_sample(answer):
                recorder.sample(searches.row(row), answer, message.language)
            if recorder.impressions is not None:
                response.request_id = recorder.log_impression(
                    searches.row(row), answer, message, response.request_id
                )
            hits += len(filled.hits)
            if hits > HITS_PER_TURN:
                hits = 0
                await asyncio.sleep(0)

    def _record(self, search: Search, answer: Answer, message: Labelled, request_id: str) -> str:
        """Record one search that is not part of a batch; returns the response's request id."""
        if isinstance(answer, Found):
            self.recorder.count_search(search.request.entity_type, answer)
        if self.recorder.draw_sample(answer):
            self.recorder.sample(search, answer, message.language)
        return self.recorder.log_impression(search, answer, message, request_id)

    @staticmethod
    def _index(serving: ServingRelease, entity_type: str, caller: Caller) -> EntityIndex:
        """Return the index of an entity type, if the release has it and the caller may use it."""
        index = serving.entities.get(entity_type)
        if index is None:
            shown = [name for name in serving.entities if caller.may_retrieve(name)]
            raise UnknownEntityType(entity_type[:64], shown)
        if caller.entity_types is not None:
            caller.require_entity_types((entity_type,))
        return index

    def _measurements(self) -> list[tuple[str, Labels, float]]:
        answers = self.searches.answers
        places = (self.admission, self.bulk_admission)
        refused = sum(item.refused for item in (*places, self.control_admission))
        rows: list[tuple[str, Labels, float]] = [
            ("omni_in_flight", (), float(sum(item.in_flight for item in places))),
            ("omni_refused", (), float(refused)),
            ("omni_cached_answers_hits", (), float(answers.hits)),
            ("omni_cached_answers_misses", (), float(answers.misses)),
            ("omni_cached_answers", (), float(len(answers))),
            ("omni_cached_answers_bytes", (), float(answers.size_bytes)),
        ]
        impressions = self.recorder.impressions
        if impressions is not None:
            rows.append(("omni_impressions_dropped", (), float(impressions.dropped)))
        return rows
