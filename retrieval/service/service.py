"""The calls of protos/retrieval.proto: admission, query vector, search, answer; every error leaves through one door."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from index_builder.errors import UnknownEntityType
from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from retrieval.config import ServeConfig
from retrieval.errors import EmptyQuery, InvalidRequest, Overloaded
from retrieval.http2.calls import Call, UnaryHandler
from retrieval.http2.refusals import Refusal
from retrieval.observability.impressions import Impression, ImpressionLog
from retrieval.observability.metrics import STAGES, Metrics
from retrieval.observability.shadow_recall import Sample, ShadowRecall
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import EVERYONE, Caller, Tokens
from retrieval.service.admin import Changes
from retrieval.service.admission import Admission, Refusals, check_deadline, retry_trailer
from retrieval.service.answer_cache import AnswerCache, Key, ids_and_scores, key_of, shape_of
from retrieval.service.description import describe
from retrieval.service.fast_path import ReadyAnswers
from retrieval.service.responses import add_attributes, fill_answer, fill_kept
from retrieval.service.searcher import Found, Searcher, as_stored, options_of, scores_of
from retrieval.service.validation import (
    checked_embedding,
    checked_embeddings,
    checked_query,
    checked_target,
    one_of,
    require_count,
)
from retrieval.status import status_for

Float32 = npt.NDArray[np.float32]
log = logging.getLogger("omni.service")

RETRIEVAL = "omnisearchsage.v1.Retrieval"
ADMIN = "omnisearchsage.v1.Admin"
HITS_AT_ONCE = 2000
"""Hits of a batch that are written into its answer before other calls have their turn."""

Context = Any  # grpc.aio.ServicerContext; the web page passes a small stand-in


class Query(NamedTuple):
    """A query on its way to the index."""

    vector: Float32  # (D,)
    cached: bool
    queue_ns: int
    encode_ns: int
    text: str


class RetrievalService:
    """All calls. One instance per worker; methods run on its event loop.

    Args:
        config: Limits, log settings.
        releases: Which release answers.
        metrics: Where calls are counted.
        tokens: Known callers; None lets everyone do everything.
        impressions: Log of what was shown, or None.
        tracer: Writes spans, or None.
        change_release: Carries out Activate and Rollback (a supervisor, when there are several
            workers); None: ``releases`` does.
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
        change_release: Callable[[str], Awaitable[tuple[str, str]]] | None = None,
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.releases = releases
        self.metrics = metrics
        self.tokens = tokens
        self.impressions = impressions
        self.tracer = tracer
        self.leaving = False  # draining: health says so, and calls that still come are answered
        self.admission = Admission(config.max_in_flight)
        self.control = Admission(
            config.max_in_flight
        )  # admin calls and descriptions have places of their own
        self.searcher = Searcher(config.inline_search_us / 1e6, config.search_threads)
        self.answers = AnswerCache(config.answer_cache_bytes)
        self.shadow = ShadowRecall(config.shadow_fraction, config.shadow_cpu, metrics)
        self.changes = Changes(config, releases, change_release)
        self._stages = {
            stage: metrics.histogram("omni_stage_seconds", (stage,)) for stage in STAGES
        }
        metrics.add_source(self._measurements)

    def close(self) -> None:
        """Stop threads and close files."""
        self.shadow.close()
        self.searcher.close()
        self.changes.close()
        if self.tracer is not None:
            self.tracer.close()
        if self.impressions is not None:
            self.impressions.close()

    # --- the door ---

    def generic_handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Handlers to add to a ``grpc.aio`` server.

        Messages are parsed and serialised here, so that malformed bytes get a typed error.
        """
        retrieval = {
            "Retrieve": self.handler(
                "Retrieve", pb.RetrieveRequest, self.retrieve, now=ReadyAnswers(self)
            ),
            "RetrieveMulti": self.handler(
                "RetrieveMulti",
                pb.RetrieveMultiRequest,
                self.retrieve_multi,
                lambda r: len(r.targets),
            ),
            "RetrieveBatch": self.handler(
                "RetrieveBatch", pb.RetrieveBatchRequest, self.retrieve_batch, self._rows_of
            ),
            "Embed": self.handler("Embed", pb.EmbedRequest, self.embed, lambda r: len(r.queries)),
            "Score": self.handler("Score", pb.ScoreRequest, self.score),
            "DescribeRelease": self.handler(
                "DescribeRelease", pb.DescribeReleaseRequest, self.describe_release, control=True
            ),
        }
        admin = {
            "Activate": self.handler(
                "Activate", pb.ActivateRequest, self.changes.activate, admin=True
            ),
            "Rollback": self.handler(
                "Rollback", pb.RollbackRequest, self.changes.rollback, admin=True
            ),
            "Upsert": self.handler(
                "Upsert",
                pb.UpsertRequest,
                self.changes.upsert,
                lambda r: len(r.entities),
                admin=True,
            ),
            "Delete": self.handler(
                "Delete", pb.DeleteRequest, self.changes.delete, lambda r: len(r.ids), admin=True
            ),
        }

        def grpc_handlers(service: str, calls: dict[str, Any]) -> grpc.GenericRpcHandler:
            return grpc.method_handlers_generic_handler(
                service,
                {
                    name: UnaryHandler(call, answer_now=call.answer_now, refuse=call.refuse)
                    for name, call in calls.items()
                },
            )

        return grpc_handlers(RETRIEVAL, retrieval), grpc_handlers(ADMIN, admin)

    def handler(
        self,
        method: str,
        request_class: type[Message],
        call: Callable[[Any, Context, Caller, int], Awaitable[Message]],
        searches: Callable[[Any], int] | None = None,
        admin: bool = False,
        control: bool = False,
        now: Callable[[bytes, Context], bytes | Refusal | None] | None = None,
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Wrap a call: rights, parsing, admission, timing, errors to status.

        Args:
            method: RPC name.
            request_class: What the bytes hold.
            call: Answers a request.
            searches: How many places a request takes; None: one.
            admin: Whether the call needs the admin right.
            control: Whether the call is about the server: admitted, as admin calls are, however
                many questions are inside.
            now: Asked first; answers or refuses what needs no waiting. Our transport calls it
                itself (``answer_now``), and ``refuse`` before the message has come.
        """
        parse = request_class.FromString
        seconds = self.metrics.histogram("omni_request_seconds", (method,))
        count, ok = self.metrics.count, (method, "OK")
        apart = admin or control
        admission = self.control if apart else self.admission
        perf_counter_ns = time.perf_counter_ns

        async def handle(content: bytes, context: Context) -> bytes:
            started = perf_counter_ns()
            if now is not None and not isinstance(context, Call):
                ready = now(content, context)
                if isinstance(ready, Refusal):
                    await context.abort(ready.code, ready.message, ready.trailing)
                elif ready is not None:
                    return ready
            places = 0
            try:
                caller = EVERYONE
                if self.tokens is not None:
                    caller = self.tokens.caller(context.invocation_metadata())
                if admin:
                    caller.require_admin()
                try:
                    request = parse(content)
                except DecodeError as error:
                    raise InvalidRequest(
                        f"{method}: the bytes are not a {request_class.DESCRIPTOR.name} message"
                        f" ({error})."
                    ) from error
                wanted = 1 if searches is None else admission.cost_of(searches(request))
                admission.enter(wanted)
                places = wanted
                response = await call(request, context, caller, started)
                answer: bytes = response.SerializeToString()
                if self.tracer is not None:
                    self.tracer.record_call(
                        method,
                        request,
                        response,
                        perf_counter_ns() - started,
                        context.invocation_metadata() or (),
                    )
                count("omni_requests", ok)
                return answer
            except (
                asyncio.CancelledError
            ):  # by the caller, or by the transport because the caller's time is over
                remaining = context.time_remaining()
                count(
                    "omni_requests",
                    (
                        method,
                        "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED",
                    ),
                )
                raise
            except Exception as error:  # the one door: whatever went wrong becomes a typed status
                code, message = status_for(error)
                count("omni_requests", (method, code.name))
                if code is grpc.StatusCode.INTERNAL:
                    log.exception("%s failed", method)
                await context.abort(code, message, retry_trailer(error))
                raise AssertionError("abort raises") from error
            finally:
                took = (perf_counter_ns() - started) / 1e9
                if places:
                    admission.leave(places, took)
                seconds.observe(took)

        handle.answer_now = now  # type: ignore[attr-defined]
        handle.refuse = None if apart else Refusals(method, admission, count).at_the_door  # type: ignore[attr-defined]
        return handle

    # --- questions ---

    async def retrieve(
        self, request: pb.RetrieveRequest, context: Context, caller: Caller, started: int
    ) -> pb.RetrieveResponse:
        """One query, one entity type."""
        serving = self.releases.resolve(request.release_id)
        serving.in_flight += 1
        try:
            index = self._index(serving, request.entity_type, caller)
            checked_target(request, self.limits)
            query = await self._query(serving, request, context)
            self._observe_query(query)
            found = await self._search(index, query, request)
            result = found.result
            response = pb.RetrieveResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query.cached,
                plan=result.plan,
                ef=result.ef,
                estimated_recall=result.estimated_recall,
                selectivity=result.selectivity,
                request_id=request.request_id,
                answer_cached=found.kept,
            )
            add = response.hits.add
            for id, score in zip(found.ids, found.scores.tolist()):
                add(id=id, score=score)
            if request.attributes:
                add_attributes(response.hits, index, found.ids, request.attributes)
            self._after_search(serving, index, request, query, found, request)
            if self.impressions is not None:
                response.request_id = self._log_impression(
                    serving, request, request.entity_type, query.text, found.ids
                )
            timings = response.timings
            timings.search_ns = found.search_ns
            if query.encode_ns:
                timings.queue_ns, timings.encode_ns = query.queue_ns, query.encode_ns
            if found.rerank_ns:
                timings.rerank_ns = found.rerank_ns
            timings.total_ns = time.perf_counter_ns() - started
            return response
        finally:
            serving.in_flight -= 1

    async def retrieve_multi(
        self, request: pb.RetrieveMultiRequest, context: Context, caller: Caller, started: int
    ) -> pb.RetrieveMultiResponse:
        """One query, several searches, one release."""
        serving = self.releases.resolve(request.release_id)
        serving.in_flight += 1
        try:
            require_count("targets", len(request.targets), self.limits.max_targets)
            indexes = [
                self._index(serving, target.entity_type, caller) for target in request.targets
            ]
            for target in request.targets:
                checked_target(target, self.limits)
            query = await self._query(serving, request, context)
            response = pb.RetrieveMultiResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query.cached,
                request_id=request.request_id,
            )
            self._observe_query(query)
            for target, index in zip(request.targets, indexes, strict=True):
                found = await self._search(index, query, target)
                answer = fill_answer(response.answers.add(), index, target, query.cached, found)
                answer.entity_type = target.entity_type
                response.timings.search_ns += found.search_ns
                response.timings.rerank_ns += found.rerank_ns
                self._after_search(serving, index, target, query, found, request)
                if self.impressions is not None:
                    response.request_id = self._log_impression(
                        serving,
                        request,
                        target.entity_type,
                        query.text,
                        found.ids,
                        response.request_id,
                    )
            self._finish(response.timings, query.queue_ns, query.encode_ns, started)
            return response
        finally:
            serving.in_flight -= 1

    async def retrieve_batch(
        self, request: pb.RetrieveBatchRequest, context: Context, caller: Caller, started: int
    ) -> pb.RetrieveBatchResponse:
        """Many queries, the same search for each, one release."""
        serving = self.releases.resolve(request.release_id)
        serving.in_flight += 1
        try:
            target = request.target
            index = self._index(serving, target.entity_type, caller)
            checked_target(target, self.limits)
            if request.queries and request.embeddings:
                raise InvalidRequest("queries: expected either texts or embeddings, but got both.")
            queue_ns = encode_ns = 0
            if request.embeddings:
                vectors = checked_embeddings(
                    request.embeddings,
                    request.space_id,
                    serving.dimension,
                    serving.space_id,
                    self.limits.max_batch,
                )
                cached, texts = [False] * len(vectors), [""] * len(vectors)
            else:
                vectors, cached, queue_ns, encode_ns, texts = await self._query_many(
                    serving, request.queries, context
                )
            response = pb.RetrieveBatchResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                request_id=request.request_id,
            )
            shape, version, find = shape_of(target), index.version, self.answers.find
            keys = [
                Key(version, shape, text) if shape is not None and text else None for text in texts
            ]
            kept = [None if key is None else find(key) for key in keys]
            searched = [row for row, known in enumerate(kept) if known is None]
            rows = vectors if len(searched) == len(kept) else vectors[searched]
            found = dict(
                zip(searched, await self._search_batch(index, rows, target, context), strict=True)
            )
            hits = 0
            for row, known in enumerate(kept):
                answer = response.answers.add()
                if known is not None:
                    fill_kept(answer, known, cached[row])
                    plain, selectivity = True, known.selectivity
                else:
                    item = found[row]
                    fill_answer(answer, index, target, cached[row], item)
                    plain, selectivity, key = item.plain, item.result.selectivity, keys[row]
                    if key is not None:
                        self.answers.keep(key, item.result)
                    response.timings.search_ns += item.search_ns
                    response.timings.rerank_ns += item.rerank_ns
                if plain and self.shadow.wants():
                    ids, scores = ids_and_scores(answer.hits)
                    self.offer_shadow(
                        serving,
                        index,
                        vectors[row],
                        target,
                        ids,
                        scores,
                        selectivity,
                        request.language,
                    )
                if self.impressions is not None:
                    response.request_id = self._log_impression(
                        serving,
                        request,
                        target.entity_type,
                        texts[row],
                        [hit.id for hit in answer.hits],
                        response.request_id,
                    )
                hits += len(answer.hits)
                if hits > HITS_AT_ONCE:  # others have their turn
                    hits = 0
                    await asyncio.sleep(0)
            if searched:
                self.metrics.count(
                    "omni_searches",
                    (target.entity_type, found[searched[0]].result.plan),
                    len(searched),
                )
            self._finish(response.timings, queue_ns, encode_ns, started)
            return response
        finally:
            serving.in_flight -= 1

    async def embed(
        self, request: pb.EmbedRequest, context: Context, caller: Caller, started: int
    ) -> pb.EmbedResponse:
        """Texts to vectors."""
        serving = self.releases.resolve(request.release_id)
        serving.in_flight += 1
        try:
            vectors, cached, queue_ns, encode_ns, _ = await self._query_many(
                serving, request.queries, context
            )
            response = pb.EmbedResponse(
                embeddings=vectors.astype("<f4", copy=False).tobytes(),
                dimension=serving.dimension,
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                form_id=serving.form_id,
                cache_hits=cached,
            )
            self._finish(response.timings, queue_ns, encode_ns, started)
            return response
        finally:
            serving.in_flight -= 1

    async def score(
        self, request: pb.ScoreRequest, context: Context, caller: Caller, started: int
    ) -> pb.ScoreResponse:
        """Cosine of a query with given ids."""
        serving = self.releases.resolve(request.release_id)
        serving.in_flight += 1
        try:
            index = self._index(serving, request.entity_type, caller)
            require_count("ids", len(request.ids), self.limits.max_score_ids)
            query = await self._query(serving, request, context)
            work = partial(scores_of, index, list(request.ids), query.vector)
            if len(request.ids) <= 50:
                began = time.perf_counter_ns()
                scores, search_ns = work(), time.perf_counter_ns() - began
            else:
                scores, search_ns = await self.searcher.in_thread(work)
            response = pb.ScoreResponse(
                scores=scores,
                missing=int(np.count_nonzero(np.isnan(scores))),
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query.cached,
            )
            response.timings.search_ns = search_ns
            self._finish(response.timings, query.queue_ns, query.encode_ns, started)
            return response
        finally:
            serving.in_flight -= 1

    async def describe_release(
        self, request: pb.DescribeReleaseRequest, context: Context, caller: Caller, started: int
    ) -> pb.DescribeReleaseResponse:
        """What is being served."""
        serving = self.releases.resolve(request.release_id)
        return describe(serving, self.releases.loaded, self.limits)

    # --- shared parts ---

    def _index(self, serving: ServingRelease, entity_type: str, caller: Caller) -> EntityIndex:
        index = serving.entities.get(entity_type)
        if index is None:
            raise UnknownEntityType(entity_type[:64], list(serving.entities))
        if caller.entity_types is not None:
            caller.require_entity_types((entity_type,))
        return index

    async def _query(self, serving: ServingRelease, request: Any, context: Context) -> Query:
        """The query vector of a request with ``query``, ``embedding`` and ``space_id``."""
        if request.embedding:
            one_of(request.query, request.embedding)
            return Query(
                checked_embedding(
                    request.embedding, request.space_id, serving.dimension, serving.space_id
                ),
                False,
                0,
                0,
                "",
            )
        text = checked_query(request.query, self.limits)
        vector = serving.encoder.peek(text)
        if vector is not None:
            return Query(vector, True, 0, 0, text)
        self._check_time(serving, context, needed=not serving.encoder.joins(text))
        looked = await serving.encoder.load(text)
        return Query(looked.vector, looked.cached, looked.queue_ns, looked.encode_ns, text)

    async def _search(self, index: EntityIndex, query: Query, target: Any) -> Found:
        """One search, or what an earlier one found."""
        key = key_of(index, target, query.text)
        known = None if key is None else self.answers.find(key)
        if known is not None:
            result = known.result()
            return Found(result.ids, result.scores, result, 0, 0, True, kept=True)
        found = await self.searcher.search(index, query.vector, target)
        if key is not None:
            self.answers.keep(key, found.result)
        return found

    async def _query_many(
        self, serving: ServingRelease, queries: Sequence[str], context: Context
    ) -> tuple[Float32, list[bool], int, int, list[str]]:
        if not queries:
            raise EmptyQuery("queries")
        require_count("queries", len(queries), self.limits.max_batch)
        encoder, texts = serving.encoder, list(queries)
        vectors: Float32 = np.empty((len(texts), serving.dimension), dtype=np.float32)
        missing = []
        for row, text in enumerate(
            texts
        ):  # keys of the cache are normalised texts: a text that is a key needs no normalising
            entry = encoder.find(text)
            if entry is None:
                normal = texts[row] = checked_query(text, self.limits, f"queries[{row}]")
                entry = encoder.find(normal) if normal != text else None
            if entry is None:
                missing.append(row)
            else:
                encoder.cache.used(entry)
                vectors[row] = entry.vector
        self._check_time(serving, context, needed=False)
        cached, queue_ns, encode_ns = [True] * len(texts), 0, 0
        if missing:
            looked, hits, queue_ns, encode_ns = await encoder.lookup_many(
                [texts[row] for row in missing]
            )
            vectors[missing] = looked
            for row, hit in zip(missing, hits, strict=True):
                cached[row] = hit
        return vectors, cached, queue_ns, encode_ns, texts

    def _check_time(self, serving: ServingRelease, context: Context, needed: bool = True) -> None:
        """Refuse at once who cannot be answered in time, instead of encoding for nobody."""
        remaining = context.time_remaining()
        check_deadline(remaining)
        if needed:
            late = serving.batcher.late(remaining)
            if late is not None:
                raise Overloaded(*late)

    def _rows_of(self, request: pb.RetrieveBatchRequest) -> int:
        """How many searches a batch holds."""
        active = self.releases.active
        return len(request.queries) or (
            len(request.embeddings) // (4 * active.dimension) if active is not None else 0
        )

    async def _search_batch(
        self, index: EntityIndex, vectors: Float32, target: pb.Target, context: Context
    ) -> list[Found]:
        if not len(vectors):
            return []
        if target.HasField("diversity") or target.HasField("collapse_above"):
            found = []
            for vector in vectors:
                check_deadline(context.time_remaining())
                found.append(await self.searcher.search(index, vector, target))
                await asyncio.sleep(0)  # others have their turn
            return found
        results, took = await self.searcher.in_thread(
            partial(index.search_batch, vectors, target.k, **options_of(target))
        )
        each = took // max(1, len(vectors))
        return [Found(result.ids, result.scores, result, each, 0, True) for result in results]

    def _observe_query(self, query: Query) -> None:
        if query.encode_ns:
            self._stages["queue"].observe(query.queue_ns / 1e9)
            self._stages["encode"].observe(query.encode_ns / 1e9)

    def _after_search(
        self,
        serving: ServingRelease,
        index: EntityIndex,
        target: Any,
        query: Query,
        found: Found,
        request: Any,
    ) -> None:
        stages = self._stages
        if not found.kept:
            self.metrics.count("omni_searches", (target.entity_type, found.result.plan))
            stages["search"].observe(found.search_ns / 1e9)
        if found.rerank_ns:
            stages["rerank"].observe(found.rerank_ns / 1e9)
        if found.plain and self.shadow.wants():
            self.offer_shadow(
                serving,
                index,
                query.vector,
                target,
                found.ids,
                found.scores,
                found.result.selectivity,
                request.language,
            )

    def offer_shadow(
        self,
        serving: ServingRelease,
        index: EntityIndex,
        vector: Float32,
        target: Any,
        ids: Sequence[str],
        scores: Float32,
        selectivity: float | None,
        language: str,
    ) -> None:
        """Hand one answered search to the shadow recall, unless it was exact or pinned to a release that others are not served from."""
        if target.exact or serving is not self.releases.active:
            return
        min_score = target.min_score if target.HasField("min_score") else None
        excluded = tuple(map(as_stored, target.exclude_ids))
        self.shadow.offer(
            Sample(
                index,
                index.live,
                vector,
                target.k,
                target.filter,
                excluded,
                min_score,
                ids,
                scores,
                selectivity,
                language,
            )
        )

    def _log_impression(
        self,
        serving: ServingRelease,
        request: Any,
        entity_type: str,
        text: str,
        ids: Sequence[str],
        request_id: str = "",
    ) -> str:
        assert self.impressions is not None
        request_id = request_id or request.request_id or uuid.uuid4().hex
        shown = text if self.config.log_query_text else ""
        self.impressions.add(
            Impression(
                request_id,
                serving.release_id,
                shown,
                request.language,
                request.country,
                entity_type,
                list(ids),
            )
        )
        return request_id

    @staticmethod
    def _finish(timings: pb.Timings, queue_ns: int, encode_ns: int, started: int) -> None:
        timings.queue_ns, timings.encode_ns = queue_ns, encode_ns
        timings.total_ns = time.perf_counter_ns() - started

    def _measurements(self) -> list[tuple[str, tuple[str, ...], float]]:
        rows: list[tuple[str, tuple[str, ...], float]] = [
            ("omni_in_flight", (), float(self.admission.in_flight)),
            ("omni_refused", (), float(self.admission.refused + self.control.refused)),
            ("omni_answers_kept_hits", (), float(self.answers.hits)),
            ("omni_answers_kept_misses", (), float(self.answers.misses)),
            ("omni_answers_kept", (), float(len(self.answers))),
            ("omni_answers_kept_bytes", (), float(self.answers.size_bytes)),
        ]
        if self.impressions is not None:
            rows.append(("omni_impressions_dropped", (), float(self.impressions.dropped)))
        return rows
