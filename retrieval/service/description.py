"""What is being served, as the answer to DescribeRelease."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata

from index_builder.search.calibration import CurvePoint
from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.releases.serving_release import ServingRelease


@lru_cache(maxsize=1)
def server_version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("omnisearchsage")
    except metadata.PackageNotFoundError:
        return "unknown"


def limits_message(limits: Limits) -> pb.Limits:
    """Limits on the wire."""
    return pb.Limits(
        max_k=limits.max_k,
        max_batch=limits.max_batch,
        max_query_bytes=limits.max_query_bytes,
        max_message_bytes=limits.max_message_bytes,
        max_score_ids=limits.max_score_ids,
        max_filter_bytes=limits.max_filter_bytes,
        max_exclude_ids=limits.max_exclude_ids,
    )


def default_point(index: EntityIndex) -> CurvePoint | None:
    """The point of the calibration curve at which searches run by default: the first measured ef at or above the chosen one."""
    if index.calibration is None or not index.calibration.points:
        return None
    ef = index.calibration.ef_for(index.default_recall)
    points = index.calibration.points
    return (
        points[-1]
        if ef is None
        else next((point for point in points if point.ef >= ef), points[-1])
    )


def describe_entity(serving: ServingRelease, entity_type: str) -> pb.EntityDescription:
    """One entity type of a release."""
    index = serving.entities[entity_type]
    out = pb.EntityDescription(
        entity_type=entity_type,
        count=index.count,
        index_kind=index.kind,
        live_sequence=serving.follower.view(entity_type).sequence,
        attributes=sorted(index.attribute_table.schema),
    )
    if index.ann.exact:
        out.ann_recall_at_10 = out.ann_recall_low = out.ann_recall_high = 1.0
    elif (point := default_point(index)) is not None:
        out.ann_recall_at_10, out.ann_recall_low, out.ann_recall_high = (
            point.recall,
            point.low,
            point.high,
        )
    return out


def describe(
    serving: ServingRelease, loaded: Iterable[str], limits: Limits
) -> pb.DescribeReleaseResponse:
    """The whole answer."""
    manifest = serving.release.manifest
    return pb.DescribeReleaseResponse(
        release_id=serving.release_id,
        parent_release_id=manifest.parent or "",
        created=str(manifest.measured.get("created", "")),
        space_id=serving.space_id,
        query_space_id=serving.query_space_id,
        form_id=serving.form_id,
        dimension=serving.dimension,
        entities=[describe_entity(serving, entity_type) for entity_type in serving.entities],
        limits=limits_message(limits),
        loaded_release_ids=list(loaded),
        server_version=server_version(),
        manifest_json=json.dumps(
            {**asdict(manifest), "files": len(manifest.files)}, ensure_ascii=False, default=str
        ),
    )
