"""``Retrieve`` without waiting: what is kept, or plain, cached (or a ready vector) and quick to search, is answered in one function call.

What would find the server or the encoder's queue full, or its deadline passed before its turn, is
refused as quickly. Everything else (new filters, encoding, re-ranking, impressions, traces,
mistakes) returns None and takes the general path in ``service.py``, which gives the same answers; a
test compares the two.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from protos import retrieval_pb2 as pb
from retrieval.http2.refusals import Refusal
from retrieval.security import EVERYONE
from retrieval.service.admission import Refusals
from retrieval.service.answer_cache import KeptAnswer, Key, Shape, hits_on_the_wire, shape_of
from retrieval.service.validation import NORM_TOLERANCE, checked_query

if TYPE_CHECKING:
    from index_builder.search.entity_index import EntityIndex, SearchResult
    from retrieval.encoding.query_cache import Entry
    from retrieval.releases.serving_release import ServingRelease
    from retrieval.service.service import RetrievalService

MAX_K = 100
"""More results are worth a thread."""
LOW, HIGH = (1 - NORM_TOLERANCE) ** 2, (1 + NORM_TOLERANCE) ** 2

_parse = pb.RetrieveRequest.FromString
_now = time.perf_counter_ns


class ReadyAnswers:
    """Callable with request bytes and call; returns response bytes, a refusal, or None where the general path must go. Never raises."""

    def __init__(self, service: RetrievalService) -> None:
        self.refusals = Refusals("Retrieve", service.admission, service.metrics.count)
        self.service = service
        self.releases = service.releases
        self.admission = service.admission
        self.searcher = service.searcher
        self.answers = service.answers
        self.shadow = service.shadow
        self._max_k = service.limits.max_k
        self._count = service.metrics.count
        self._request_seconds = service.metrics.histogram("omni_request_seconds", ("Retrieve",))
        self._search_seconds = service.metrics.histogram("omni_stage_seconds", ("search",))
        self._tails: dict[tuple[Any, ...], bytes] = {}
        self._always_general = service.impressions is not None or service.tracer is not None

    def __call__(self, content: bytes, context: Any) -> bytes | Refusal | None:
        """Answer, refuse, or decline: then the call takes its place in the event loop's next turn."""
        if self.admission.full:
            return self.refusals.at_the_door()
        answer = self._answer(content, context)
        if answer is None:
            self.admission.announce()
        return answer

    def _answer(self, content: bytes, context: Any) -> bytes | Refusal | None:
        started = _now()
        serving = self.releases.active
        admission = self.admission
        if serving is None or self._always_general:
            return None
        try:
            request = _parse(content)
            index = serving.entities.get(request.entity_type)
            shape = shape_of(request)
            if (
                index is None
                or shape is None
                or not 0 < shape.k <= self._max_k
                or request.release_id not in ("", serving.release_id)
            ):
                return None
            if self.service.tokens is not None:
                caller = self.service.tokens.caller(context.invocation_metadata())
                if caller is not EVERYONE:
                    caller.require_entity_types((request.entity_type,))
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                return None
            vector = _ready_vector(request, serving)
            entry = kept = key = None
            if vector is None:
                entry, text = self._cached(request, serving)
                if entry is None:
                    return self._hopeless(text, serving, remaining)
                vector = entry.vector
                key = Key(index.version, shape, text)
                kept = self.answers.find(key)
            how: SearchResult | KeptAnswer
            if kept is not None:
                how, hits, search_ns = kept, kept.hits, 0
            else:
                found = self._search(index, vector, shape)
                if found is None:
                    return None
                how, search_ns = found
                hits = hits_on_the_wire(how.ids, how.scores)
                if key is not None:
                    self.answers.keep(key, how, hits)
            response = pb.RetrieveResponse(request_id=request.request_id)
            timings = response.timings
            timings.search_ns = search_ns
            timings.total_ns = total_ns = _now() - started
            answer: bytes = (
                hits + response.SerializeToString() + self._tail(serving, entry is not None, how)
            )
        except Exception:  # the general way meets the same mistake, or memory that is short for all, and has the words for it
            return None
        if entry is not None:
            serving.encoder.cache.used(entry)
        if kept is None:
            self._count("omni_searches", (request.entity_type, how.plan))
            self._search_seconds.observe(search_ns / 1e9)
        self._count("omni_requests", ("Retrieve", "OK"))
        self._request_seconds.observe(total_ns / 1e9)
        admission.accepted += 1
        if self.shadow.wants():
            shown = how.result() if isinstance(how, KeptAnswer) else how
            self.service.offer_shadow(
                serving,
                index,
                vector,
                request,
                shown.ids,
                shown.scores,
                shown.selectivity,
                request.language,
            )
        return answer

    def _search(
        self, index: EntityIndex, vector: np.ndarray, shape: Shape
    ) -> tuple[SearchResult, int] | None:
        """Search what is plain and known to be short; returns what was found and the nanoseconds, or None."""
        k, min_recall, expression, min_score = shape
        if (
            k > MAX_K
            or expression
            or min_score is not None
            or (min_recall is not None and not 0 < min_recall <= 1)
        ):
            return None
        key = self.searcher.plain_key(index, k, min_recall)
        if not self.searcher.is_short(key):
            return None
        searching = _now()
        result = (
            index.search(vector, k)
            if min_recall is None
            else index.search(vector, k, min_recall=min_recall)
        )
        search_ns = _now() - searching
        self.searcher.learn(key, search_ns / 1e9)
        return result, search_ns

    @staticmethod
    def _cached(request: pb.RetrieveRequest, serving: ServingRelease) -> tuple[Entry | None, str]:
        """What is cached, and the text it belongs to.

        Keys of the cache are normalised texts: a text that is a key needs no normalising.
        """
        encoder = serving.encoder
        text = request.query
        entry = encoder.find(text)
        if entry is None:
            normal = checked_query(text, serving.limits)
            if normal != text:
                return encoder.find(normal), normal
        return entry, text

    def _hopeless(
        self, text: str, serving: ServingRelease, remaining: float | None
    ) -> Refusal | None:
        """The refusal of a text that must be encoded and would not be, or too late; None if there is hope."""
        if not serving.encoder.must_encode(text):
            return None
        why = serving.batcher.full() or serving.batcher.late(remaining)
        return None if why is None else self.refusals.of(*why)

    def _tail(self, serving: ServingRelease, cached: bool, how: SearchResult | KeptAnswer) -> bytes:
        """The fields that repeat from answer to answer, serialised once; parts of a message may simply follow each other."""
        kept = isinstance(how, KeptAnswer)
        key = (
            serving.release_id,
            serving.space_id,
            cached,
            kept,
            how.plan,
            how.ef,
            how.estimated_recall,
            how.selectivity,
        )
        tail = self._tails.get(key)
        if tail is None:
            if len(self._tails) > 1000:
                self._tails.clear()
            tail = self._tails[key] = pb.RetrieveResponse(
                release_id=serving.release_id,
                space_id=serving.space_id,
                query_space_id=serving.query_space_id,
                cache_hit=cached,
                plan=how.plan,
                ef=how.ef,
                estimated_recall=how.estimated_recall,
                selectivity=how.selectivity,
                answer_cached=kept,
            ).SerializeToString()
        return tail


def _ready_vector(request: pb.RetrieveRequest, serving: ServingRelease) -> np.ndarray | None:
    """The request's own vector, shape (D,) float32; None if it holds a text; raises ``ValueError`` for what is not plain."""
    embedding = request.embedding
    if not embedding:
        return None
    if (
        request.query
        or request.space_id != serving.space_id
        or len(embedding) != 4 * serving.dimension
    ):
        raise ValueError("not plain")
    vector = np.frombuffer(embedding, dtype="<f4")
    if not LOW <= vector.dot(vector) <= HIGH:
        raise ValueError("not of unit length")
    return vector
