"""Answers and descriptions as the messages of protos/retrieval.proto."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata

from index_builder.search.calibration import CurvePoint
from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import EVERYONE, Caller
from retrieval.service.answer_cache import CachedAnswer, add_hits
from retrieval.service.cached_search import Answer
from retrieval.service.query_vectors import Query, QueryBatch


def retrieve_response(
    serving: ServingRelease, query: Query, answer: Answer, request_id: str
) -> pb.RetrieveResponse:
    """Make the answer to Retrieve, but for timings."""
    source = answer if isinstance(answer, CachedAnswer) else answer.result
    response = pb.RetrieveResponse(
        release_id=serving.release_id,
        space_id=serving.space_id,
        query_space_id=serving.query_space_id,
        cache_hit=query.is_cached,
        plan=source.plan,
        ef=source.ef,
        estimated_recall=source.estimated_recall,
        selectivity=source.selectivity,
        request_id=request_id,
        answer_cached=answer.is_cached,
        unknown_share=serving.unknown_share(query.text),
    )
    if answer.hits:
        response.MergeFromString(answer.hits)
    else:
        add_hits(response.hits, answer.result)
    if isinstance(source, CachedAnswer):
        response.legs.extend(source.legs)
    elif source.fused is not None:
        response.legs.extend(source.fused.used)
    return response


def fill_answer(message: pb.Answer, answer: Answer, *, query_cached: bool) -> None:
    """Write the hits of one search, and how they were found, into an empty message."""
    if isinstance(answer, CachedAnswer):
        fields = _cached_answer_fields(
            answer.plan,
            answer.ef,
            answer.estimated_recall,
            answer.selectivity,
            query_cached,
            answer.legs,
        )
        message.MergeFromString(answer.hits + fields)
        return
    result = answer.result
    message.plan = result.plan
    message.ef = result.ef
    message.search_ns = answer.search_ns
    message.cache_hit = query_cached
    if result.estimated_recall is not None:
        message.estimated_recall = result.estimated_recall
    if result.selectivity is not None:
        message.selectivity = result.selectivity
    if result.fused is not None:
        message.legs.extend(result.fused.used)
    if answer.hits:
        message.MergeFromString(answer.hits)
    else:
        add_hits(message.hits, result)


@lru_cache(1000)
def _cached_answer_fields(
    plan: str,
    ef: int,
    recall: float | None,
    selectivity: float | None,
    query_cached: bool,
    legs: tuple[str, ...],
) -> bytes:
    """Serialise how a cached answer was found; the same few values come again and again."""
    answer = pb.Answer(
        plan=plan,
        ef=ef,
        estimated_recall=recall,
        selectivity=selectivity,
        cache_hit=query_cached,
        answer_cached=True,
        legs=legs,
    )
    serialized: bytes = answer.SerializeToString()
    return serialized


def fill_timings(timings: pb.Timings, query: Query | QueryBatch, started_ns: int) -> None:
    """Write how long encoding took, and the time since ``started_ns``."""
    timings.queue_ns = query.queue_ns
    timings.encode_ns = query.encode_ns
    timings.total_ns = time.perf_counter_ns() - started_ns


# ---- DescribeRelease -----------------------------------------------------------------------------


def describe_release(
    serving: ServingRelease, loaded: Iterable[str], limits: Limits, caller: Caller = EVERYONE
) -> pb.DescribeReleaseResponse:
    """Describe one release.

    Args:
        serving: The release.
        loaded: Ids of all releases in memory.
        limits: Of this server.
        caller: Sees the entity types that its token may retrieve.
    """
    manifest = serving.release.manifest
    shown = [name for name in serving.entities if caller.may_retrieve(name)]
    content = {**asdict(manifest), "files": len(manifest.files)}
    if caller.entity_types is not None:
        content["entities"] = {name: content["entities"][name] for name in shown}
        for private in ("measured", "query_upgrade"):  # they name all types
            del content[private]
    return pb.DescribeReleaseResponse(
        release_id=serving.release_id,
        parent_release_id=manifest.parent or "",
        created=str(manifest.measured.get("created", "")),
        space_id=serving.space_id,
        query_space_id=serving.query_space_id,
        form_id=serving.form_id,
        dimension=serving.dimension,
        entities=[_describe_entity(serving, entity_type) for entity_type in shown],
        limits=_limits_message(limits),
        loaded_release_ids=list(loaded),
        server_version=_server_version(),
        manifest_json=json.dumps(content, ensure_ascii=False, default=str),
    )


def _describe_entity(serving: ServingRelease, entity_type: str) -> pb.EntityDescription:
    index = serving.entities[entity_type]
    description = pb.EntityDescription(
        entity_type=entity_type,
        count=index.count,
        index_kind=index.kind,
        live_sequence=serving.follower.view(entity_type).sequence,
        attributes=sorted(index.attribute_table.schema),
    )
    if index.ann.exact:
        description.ann_recall_at_10 = 1.0
        description.ann_recall_low = 1.0
        description.ann_recall_high = 1.0
    elif (point := _default_point(index)) is not None:
        description.ann_recall_at_10 = point.recall
        description.ann_recall_low = point.low
        description.ann_recall_high = point.high
    return description


def _default_point(index: EntityIndex) -> CurvePoint | None:
    """Return the point of the calibration curve at which searches run by default.

    The first measured ef at or above the chosen one; the last one if the curve does not reach it.
    """
    if index.calibration is None or not index.calibration.points:
        return None
    points = index.calibration.points
    ef = index.calibration.ef_for(index.default_recall)
    if ef is None:
        return points[-1]
    return next((point for point in points if point.ef >= ef), points[-1])


def _limits_message(limits: Limits) -> pb.Limits:
    return pb.Limits(
        max_k=limits.max_k,
        max_batch=limits.max_batch,
        max_query_bytes=limits.max_query_bytes,
        max_message_bytes=limits.max_message_bytes,
        max_score_ids=limits.max_score_ids,
        max_filter_bytes=limits.max_filter_bytes,
        max_exclude_ids=limits.max_exclude_ids,
        max_label_bytes=limits.max_label_bytes,
        max_attributes=limits.max_attributes,
        max_answer_values=limits.max_answer_values,
    )


@lru_cache(maxsize=1)
def _server_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return metadata.version("omnisearchsage")
    except metadata.PackageNotFoundError:
        return "unknown"
