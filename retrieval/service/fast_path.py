"""``Retrieve`` in one function call, for requests that need no waiting.

Answered are cached answers, and plain short searches for a cached text or a ready vector, with a
few attributes or without. Refused
is what no token names, and what would find the server or the encoder's queue full, or its deadline
passed before its turn. A full server answers what is cached.
Everything else (new filters, encoding, re-ranking, impressions, traces, mistakes) returns None and
takes the full path in ``service.py``, which gives the same answers; a test compares the two.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from protos import retrieval_pb2 as pb
from retrieval.errors import Unauthenticated
from retrieval.http2.refusals import Refusal
from retrieval.service.admission import Refusals
from retrieval.service.answer_cache import CachedAnswer, cache_key
from retrieval.service.cached_search import INLINE_VALUES, CachedSearch
from retrieval.service.calls import CallContext, CallGate
from retrieval.service.query_vectors import Float32, QueryVectors
from retrieval.service.search_records import Search, SearchRecorder
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Found, cost_key
from retrieval.service.validation import check_answer_size, check_labels

if TYPE_CHECKING:
    from index_builder.search.entity_index import EntityIndex
    from retrieval.releases.manager import LiveReleases
    from retrieval.releases.serving_release import ServingRelease

MAX_BYTES = 16 * 2**10
"""A larger request is worth a task, where its fields are counted before it is parsed."""
MAX_K = 100
"""A search for more results is worth a thread."""
MAX_KNOWN_BYTES = 512
"""Of a request that is remembered as it was parsed."""
MAX_KNOWN = 4096
"""Requests that are remembered: at most some 8 MiB."""
MAX_SERIALIZED = 1000
"""Kinds of answers whose repeated fields are kept serialised."""

_parse = pb.RetrieveRequest.FromString
_clock_ns = time.perf_counter_ns


class Parsed(NamedTuple):
    """A checked request whose answer may be cached. Read-only: calls with equal bytes share it."""

    message: pb.RetrieveRequest
    request: SearchRequest


class FastPath:
    """Answers, refuses or declines one ``Retrieve``. Never raises.

    Args:
        gate: Of searches.
        releases: Which release answers.
        queries: Finds vectors of queries.
        searches: Finds answers.
        recorder: Records what was answered.
    """

    def __init__(
        self,
        gate: CallGate,
        releases: LiveReleases,
        queries: QueryVectors,
        searches: CachedSearch,
        recorder: SearchRecorder,
    ) -> None:
        self.refusals = Refusals("Retrieve", gate.admission, gate.metrics.count)
        self._admission = gate.admission
        self._tokens = gate.tokens
        self._count = gate.metrics.count
        self._request_seconds = gate.metrics.histogram("omni_request_seconds", ("Retrieve",))
        self._releases = releases
        self._limits = releases.config.limits
        self._max_label_bytes = self._limits.max_label_bytes  # no label of less can be too long
        self._queries = queries
        self._searches = searches
        self._recorder = recorder
        self._serialized: dict[tuple[object, ...], bytes] = {}
        self._known: dict[bytes, Parsed] = {}
        # Traces, impressions and a line for every call are the full path's
        self._declines_all = (
            gate.tracer is not None
            or recorder.impressions is not None
            or (gate.call_log is not None and gate.call_log.every)
        )

    def __call__(self, content: bytes, context: CallContext) -> bytes | Refusal | None:
        """Answer or refuse a serialised request.

        Returns:
            The serialised answer, a refusal, or None: then a place is reserved until the event
            loop's next turn, when the full path takes it.
        """
        is_full = self._admission.is_full
        answer: bytes | Refusal | None
        if self._declines_all or len(content) > MAX_BYTES:
            answer = self._refuse_stranger(context)
        else:
            answer = self._answer(content, context, is_full)
        if answer is None:
            if is_full:
                return self.refusals.when_full()
            self._admission.announce()
        return answer

    def _refuse_stranger(self, context: CallContext) -> Refusal | None:
        """Refuse a caller whom no token names: nothing is reserved for such."""
        if self._tokens is not None:
            try:
                self._tokens.caller(context.invocation_metadata())
            except Unauthenticated as error:
                return self.refusals.unauthenticated(error)
        return None

    def _answer(
        self, content: bytes, context: CallContext, is_full: bool
    ) -> bytes | Refusal | None:
        started_ns = _clock_ns()
        serving = self._releases.active
        if serving is None:
            return None
        entry = key = answer = None
        try:
            parsed = self._known.get(content) or self._parsed(content)
            if parsed is None:
                return None
            message, request = parsed
            index = self._index(message, request, serving, context)
            if index is None:
                return None
            vector = self._queries.quick_embedding(message, serving)
            if vector is None:
                entry, text = self._queries.find_cached(message.query, serving)
                if entry is None:
                    return None if is_full else self._refuse_late(text, serving, context)
                vector = entry.vector
                key = cache_key(index, request, text)
                answer = self._searches.answers.find(key)
            found = None
            if answer is None:
                if is_full or request.entity_type in serving.fused_by_default:
                    return None
                found = self._search(index, vector, request)
                if found is None:
                    return None
                answer = CachedAnswer(found.result, found.hits)
                if key is not None:
                    self._searches.answers.put(key, answer)
            unknown = 0.0 if entry is None else serving.unknown_share(text)
            response = pb.RetrieveResponse(request_id=message.request_id, unknown_share=unknown)
            timings = response.timings
            timings.search_ns = 0 if found is None else found.search_ns
            timings.total_ns = total_ns = _clock_ns() - started_ns
            repeated = self._serialize_repeated(serving, answer, entry is not None, found is None)
            # A message is the concatenation of its parts
            content_out: bytes = answer.hits + response.SerializeToString() + repeated
        except Unauthenticated as error:
            return self.refusals.unauthenticated(error)
        except Exception:  # the full path meets the same error, and reports it
            return None
        if entry is not None:
            serving.encoder.cache.used(entry)
            self._recorder.count_unknown(unknown)
        if found is not None:
            self._recorder.count_search(request.entity_type, found)
        self._count("omni_requests", ("Retrieve", "OK"))
        self._request_seconds.observe(total_ns / 1e9)
        self._admission.accepted += 1
        if not answer.is_reranked and self._recorder.shadow.wants():
            search = Search(serving, index, request, vector, "" if entry is None else text)
            self._recorder.sample(search, answer, message.language)
        return content_out

    def _parsed(self, content: bytes) -> Parsed | None:
        """Parse and check a request; None: its answer cannot be cached. Raises for mistakes.

        Search traffic repeats itself: short ones are remembered, unless an id makes them unique.
        """
        message = _parse(content)
        if len(content) > self._max_label_bytes:
            check_labels(message, self._limits)
        request = SearchRequest.parse(message, self._limits)
        if not request.is_cacheable:
            return None
        parsed = Parsed(message, request)
        if len(content) <= MAX_KNOWN_BYTES and message.query and not message.request_id:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[content] = parsed
        return parsed

    def _index(
        self,
        message: pb.RetrieveRequest,
        request: SearchRequest,
        serving: ServingRelease,
        context: CallContext,
    ) -> EntityIndex | None:
        """Return the index to ask; None where only the full path may answer or knows the error.

        Raises:
            Unauthenticated: An unknown token.
            PermissionDenied: The token does not hold the entity type.
        """
        if message.release_id not in ("", serving.release_id):
            return None
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            return None
        if self._tokens is not None:
            caller = self._tokens.caller(context.invocation_metadata())
            caller.require_entity_types((request.entity_type,))
            if caller.rate is not None:
                return None
        return serving.entities.get(request.entity_type)

    def _search(self, index: EntityIndex, vector: Float32, request: SearchRequest) -> Found | None:
        """Search where that is plain and known to be short."""
        if request.k > MAX_K or request.filter or request.min_score is not None:
            return None
        names: list[str] = []
        if request.attributes:
            names = request.attribute_names(index.attribute_table.schema)
            if request.k * len(names) > INLINE_VALUES:
                return None
            check_answer_size([(request.k, len(names))], self._limits)
        searcher = self._searches.searcher
        kind = cost_key(index, request, request.k)
        if not searcher.is_short(kind):
            return None
        started_ns = _clock_ns()
        result = index.search(vector, request.k, **request.options())
        search_ns = _clock_ns() - started_ns
        searcher.learn(kind, search_ns / 1e9)
        hits = self._searches.hits_now(index, result, names) if names else b""
        return None if hits is None else Found(result, search_ns, hits=hits)

    def _refuse_late(
        self, text: str, serving: ServingRelease, context: CallContext
    ) -> Refusal | None:
        """Refuse a text that has to be encoded and would not be in time; None if it may be."""
        if not serving.encoder.must_encode(text):
            return None
        error = serving.batcher.full() or serving.batcher.late(context.time_remaining())
        return None if error is None else self.refusals.of(error)

    def _serialize_repeated(
        self,
        serving: ServingRelease,
        answer: CachedAnswer,
        query_cached: bool,
        answer_cached: bool,
    ) -> bytes:
        """Serialise the fields that are the same in many responses; mostly a look-up."""
        key = (
            serving.release_id,
            serving.space_id,
            query_cached,
            answer_cached,
            answer.plan,
            answer.ef,
            answer.estimated_recall,
            answer.selectivity,
            answer.legs,
        )
        serialized = self._serialized.get(key)
        if serialized is None:
            if len(self._serialized) > MAX_SERIALIZED:
                self._serialized.clear()
            serialized = self._serialized[key] = pb.RetrieveResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=query_cached,
                plan=answer.plan,
                ef=answer.ef,
                estimated_recall=answer.estimated_recall,
                selectivity=answer.selectivity,
                answer_cached=answer_cached,
                legs=answer.legs,
            ).SerializeToString()
        return serialized
