"""What is recorded of an answered search: metrics, shadow samples, impressions."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from index_builder.search.entity_index import EntityIndex
from retrieval.config import ServeConfig
from retrieval.observability.impressions import Impression, ImpressionLog
from retrieval.observability.metric_catalogue import STAGES
from retrieval.observability.metrics import Metrics
from retrieval.observability.shadow_recall import FusedQuestion, Sample, ShadowRecall
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.cached_search import Answer
from retrieval.service.query_vectors import Float32, Query, QueryBatch
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Found

MOSTLY_UNKNOWN = 0.5
"""A query of which the tower knows no larger part of the characters counts as not understood."""


class Labelled(Protocol):
    """The fields of a request that only describe its caller."""

    language: str
    country: str
    request_id: str


class Search(NamedTuple):
    """One search with all that decides its answer.

    Attributes:
        serving: The release that answers.
        entity_index: Its index of the wanted entity type.
        request: What to search for and how.
        vector: Of the query, float32 ``(D,)``.
        text: Of the query; empty for a ready vector.
    """

    serving: ServingRelease
    entity_index: EntityIndex
    request: SearchRequest
    vector: Float32
    text: str = ""


class BatchSearches(NamedTuple):
    """The same search for each query of a batch."""

    serving: ServingRelease
    entity_index: EntityIndex
    request: SearchRequest
    batch: QueryBatch

    def row(self, number: int) -> Search:
        """Return one of them."""
        return Search(
            self.serving,
            self.entity_index,
            self.request,
            self.batch.vectors[number],
            self.batch.texts[number],
        )


class SearchRecorder:
    """Counts searches, samples them for the shadow recall, and logs impressions.

    Args:
        config: Whether query text may be logged; share and cost of shadow samples.
        releases: Only searches of the active release are sampled.
        metrics: Where searches and their stages are counted.
        impressions: Log of what was shown, or None.
    """

    def __init__(
        self,
        config: ServeConfig,
        releases: LiveReleases,
        metrics: Metrics,
        impressions: ImpressionLog | None,
    ) -> None:
        self.shadow = ShadowRecall(config.shadow_fraction, config.shadow_cpu, metrics)
        releases.on_change.append(self._forget_samples)
        self.impressions = impressions
        self._log_query_text = config.log_query_text
        self._releases = releases
        self._count = metrics.count
        stages = {stage: metrics.histogram("omni_stage_seconds", (stage,)) for stage in STAGES}
        self._queue_seconds = stages["queue"]
        self._encode_seconds = stages["encode"]
        self._search_seconds = stages["search"]
        self._rerank_seconds = stages["rerank"]

    def count_encoding(self, query: Query) -> None:
        """Count the stages of one query's encoding, if it was encoded."""
        if query.encode_ns:
            self._queue_seconds.observe(query.queue_ns / 1e9)
            self._encode_seconds.observe(query.encode_ns / 1e9)

    def count_unknown(self, share: float) -> None:
        """Count a query of which the tower does not know most characters."""
        if share > MOSTLY_UNKNOWN:
            self._count("omni_queries_not_understood", ())

    def count_search(self, entity_type: str, found: Found) -> None:
        """Count one search and its stages."""
        self._count("omni_searches", (entity_type, found.result.plan))
        self._search_seconds.observe(found.search_ns / 1e9)
        if found.rerank_ns:
            self._rerank_seconds.observe(found.rerank_ns / 1e9)

    def count_batch(self, entity_type: str, answers: Sequence[Answer]) -> None:
        """Count the searches that were run for one batch."""
        plans = Counter(answer.result.plan for answer in answers if isinstance(answer, Found))
        for plan, number in plans.items():
            self._count("omni_searches", (entity_type, plan), number)

    def draw_sample(self, answer: Answer) -> bool:
        """Draw whether to ``sample`` an answer; a re-ranked one cannot be judged."""
        return not answer.is_reranked and self.shadow.wants()

    def sample(self, search: Search, answer: Answer, language: str) -> None:
        """Offer an answered search to the shadow recall.

        Left out: exact ones, and those pinned to a release that others are not served from.
        """
        request = search.request
        if request.exact or search.serving is not self._releases.active:
            return
        result = answer.result
        fused, scores = None, result.scores
        if result.fused is not None:
            legs = search.serving.release.fused[request.entity_type]
            fused = FusedQuestion(legs, search.text, request.leg_weights)
            scores = result.fused.scores
        self.shadow.offer(
            Sample(
                entity_index=search.entity_index,
                live=search.entity_index.live,
                vector=search.vector,
                k=request.k,
                filter=request.filter,
                exclude_ids=request.stored_exclude_ids(),
                min_score=request.min_score,
                ids=result.ids,
                scores=scores,
                selectivity=result.selectivity,
                language=language,
                fused=fused,
            )
        )

    def log_impression(
        self, search: Search, answer: Answer, message: Labelled, request_id: str
    ) -> str:
        """Log what was shown, if impressions are logged.

        Args:
            search: What was answered.
            answer: Its hits, in the order shown.
            message: Language and country of the caller.
            request_id: Of the response so far; empty: one is made.

        Returns:
            The request id that the response has to carry.
        """
        if self.impressions is None:
            return request_id
        request_id = request_id or uuid.uuid4().hex
        self.impressions.add(
            Impression(
                request_id=request_id,
                release_id=search.serving.release_id,
                query=search.text if self._log_query_text else "",
                language=message.language,
                country=message.country,
                entity_type=search.request.entity_type,
                ids=list(answer.result.ids),
            )
        )
        return request_id

    async def _forget_samples(self, serving: ServingRelease) -> None:
        """Samples of another release say nothing about the one that is served now."""
        self.shadow.forget()

    def close(self) -> None:
        """Stop the shadow recall and close the log."""
        self.shadow.close()
        if self.impressions is not None:
            self.impressions.close()
