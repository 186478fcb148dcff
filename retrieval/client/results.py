"""What the client hands back: named, typed results instead of protobuf messages, and the conversions between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from encoders.errors import InvalidVectors
from protos import retrieval_pb2 as pb

AttributeValue = str | int | float | bool | list["AttributeValue"]
Float32 = npt.NDArray[np.float32]


class Hit(NamedTuple):
    """One retrieved entity."""

    id: str
    score: float  # cosine with the query, -1 to 1
    attributes: dict[str, Any]  # only the ones asked for


class Timings(NamedTuple):
    """Nanoseconds inside the server; the network is not in them."""

    total_ns: int
    queue_ns: int
    encode_ns: int
    search_ns: int
    rerank_ns: int


@dataclass(frozen=True, slots=True)
class RetrieveResult:
    """Answer to one query over one entity type, best first."""

    hits: list[Hit]
    release_id: str
    space_id: str
    cache_hit: bool
    plan: str
    ef: int
    estimated_recall: float | None
    selectivity: float | None
    timings: Timings
    request_id: str
    query_space_id: str = ""
    """Space of the query tower's bundle where it differs from ``space_id``; empty: the same."""
    answer_cached: bool = False
    """The hits were kept from an earlier search of the same text and fields."""

    @property
    def ids(self) -> list[str]:
        """The ids, best first."""
        return [hit.id for hit in self.hits]


@dataclass(frozen=True, slots=True)
class Answer:
    """One search of a ``retrieve_multi`` or ``retrieve_batch``."""

    hits: list[Hit]
    entity_type: str
    cache_hit: bool
    plan: str
    ef: int
    estimated_recall: float | None
    selectivity: float | None
    search_ns: int
    answer_cached: bool = False
    """As in ``RetrieveResult``."""

    @property
    def ids(self) -> list[str]:
        """The ids, best first."""
        return [hit.id for hit in self.hits]


@dataclass(frozen=True, slots=True)
class Answers:
    """Several searches answered from one release, in the order they were asked."""

    answers: list[Answer]
    release_id: str
    space_id: str
    timings: Timings
    request_id: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Query vectors: ``vectors`` is ``(B, D)`` float32 with unit rows, in the order of the queries."""

    vectors: Float32
    release_id: str
    space_id: str
    form_id: str
    cache_hits: list[bool]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Scores:
    """Cosines in the order of the ids asked for; NaN where the id is not in the index."""

    scores: Float32
    missing: int
    release_id: str
    space_id: str
    cache_hit: bool
    timings: Timings


@dataclass(frozen=True, slots=True)
class EntityDescription:
    """One entity type of the served release."""

    entity_type: str
    count: int
    index_kind: str
    ann_recall_at_10: float | None
    ann_recall_low: float | None
    ann_recall_high: float | None
    live_sequence: int
    attributes: list[str]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts."""

    max_k: int
    max_batch: int
    max_query_bytes: int
    max_message_bytes: int
    max_score_ids: int
    max_filter_bytes: int
    max_exclude_ids: int


@dataclass(frozen=True, slots=True)
class ReleaseDescription:
    """What is being served."""

    release_id: str
    parent_release_id: str
    created: str
    space_id: str
    form_id: str
    dimension: int
    entities: dict[str, EntityDescription]
    limits: Limits
    loaded_release_ids: list[str]
    server_version: str
    manifest_json: str
    query_space_id: str = ""
    """As in ``RetrieveResult``."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Outcome of ``activate`` or ``rollback``."""

    release_id: str
    previous_release_id: str
    total_ns: int


@dataclass(frozen=True, slots=True)
class Written:
    """Outcome of ``upsert`` or ``delete``: durable up to ``sequence``."""

    sequence: int
    applied: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One search of ``retrieve_multi`` or ``retrieve_batch``; the fields mean what they mean in ``retrieve``."""

    entity_type: str
    k: int = 10
    filter: str = ""
    exclude_ids: Sequence[str] = ()
    min_score: float | None = None
    min_recall: float | None = None
    diversity: float | None = None
    collapse_above: float | None = None
    exact: bool = False
    attributes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityWrite:
    """An entity to insert or replace: ``vector`` is ``(D,)`` float32, unit length."""

    id: str
    vector: npt.ArrayLike
    attributes: Mapping[str, AttributeValue] | None = None


def vector_bytes(vectors: npt.ArrayLike, axes: int) -> bytes:
    """Pack ``(D,)`` (``axes=1``) or ``(B, D)`` (``axes=2``) numbers as little-endian float32.

    Raises:
        InvalidVectors: The array has another number of axes, no elements, or is not numeric.
    """
    try:
        array = np.asarray(vectors, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise InvalidVectors(
            f"An embedding must be an array of numbers, but got {type(vectors).__name__}: {error}"
        ) from error
    if array.ndim != axes or array.size == 0:
        wanted = "(D,)" if axes == 1 else "(B, D)"
        raise InvalidVectors(
            f"An embedding here must have shape {wanted} and not be empty, but got {array.shape}."
        )
    return array.tobytes()


def value_to_python(value: pb.Value) -> Any:
    """Unpack an attribute value; an unset one is None."""
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "list_value":
        return [value_to_python(item) for item in value.list_value.values]
    return getattr(value, kind)


def value_to_proto(value: AttributeValue) -> pb.Value:
    """Pack an attribute value.

    Raises:
        TypeError: It is none of string, integer, float, boolean and list of these.
    """
    if isinstance(value, bool):
        return pb.Value(bool_value=value)
    if isinstance(value, str):
        return pb.Value(string_value=value)
    if isinstance(value, int):
        return pb.Value(int_value=value)
    if isinstance(value, float):
        return pb.Value(double_value=value)
    if isinstance(value, list | tuple):
        return pb.Value(list_value=pb.ValueList(values=[value_to_proto(item) for item in value]))
    raise TypeError(
        "An attribute must be a string, number, boolean or list of these, but got"
        f" {type(value).__name__}."
    )


def target_to_proto(target: Target) -> pb.Target:
    """Pack a ``Target``."""
    return pb.Target(
        entity_type=target.entity_type,
        k=target.k,
        filter=target.filter,
        exclude_ids=target.exclude_ids,
        min_score=target.min_score,
        min_recall=target.min_recall,
        diversity=target.diversity,
        collapse_above=target.collapse_above,
        exact=target.exact,
        attributes=target.attributes,
    )


def entity_to_proto(entity: EntityWrite) -> pb.Entity:
    """Pack an ``EntityWrite``."""
    attributes = {name: value_to_proto(value) for name, value in (entity.attributes or {}).items()}
    return pb.Entity(id=entity.id, embedding=vector_bytes(entity.vector, 1), attributes=attributes)


def _hits(hits: Iterable[pb.Hit]) -> list[Hit]:
    return [
        Hit(
            hit.id,
            hit.score,
            {name: value_to_python(value) for name, value in hit.attributes.items()},
        )
        for hit in hits
    ]


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        timings.total_ns, timings.queue_ns, timings.encode_ns, timings.search_ns, timings.rerank_ns
    )


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def retrieve_result(response: pb.RetrieveResponse) -> RetrieveResult:
    """Unpack the answer of ``Retrieve``."""
    return RetrieveResult(
        _hits(response.hits),
        response.release_id,
        response.space_id,
        response.cache_hit,
        response.plan,
        response.ef,
        _optional(response, "estimated_recall"),
        _optional(response, "selectivity"),
        _timings(response.timings),
        response.request_id,
        response.query_space_id,
        response.answer_cached,
    )


def _answer(answer: pb.Answer) -> Answer:
    return Answer(
        _hits(answer.hits),
        answer.entity_type,
        answer.cache_hit,
        answer.plan,
        answer.ef,
        _optional(answer, "estimated_recall"),
        _optional(answer, "selectivity"),
        answer.search_ns,
        answer.answer_cached,
    )


def answers(response: pb.RetrieveMultiResponse | pb.RetrieveBatchResponse) -> Answers:
    """Unpack the answer of ``RetrieveMulti`` or ``RetrieveBatch``."""
    found = [_answer(answer) for answer in response.answers]
    return Answers(
        found,
        response.release_id,
        response.space_id,
        _timings(response.timings),
        response.request_id,
    )


def embeddings(response: pb.EmbedResponse) -> Embeddings:
    """Unpack the answer of ``Embed``."""
    vectors = (
        np.frombuffer(response.embeddings, dtype="<f4")
        .astype(np.float32)
        .reshape(-1, max(response.dimension, 1))
    )  # (B, D)
    return Embeddings(
        vectors,
        response.release_id,
        response.space_id,
        response.form_id,
        list(response.cache_hits),
        _timings(response.timings),
    )


def scores(response: pb.ScoreResponse) -> Scores:
    """Unpack the answer of ``Score``."""
    return Scores(
        np.array(response.scores, dtype=np.float32),
        response.missing,
        response.release_id,
        response.space_id,
        response.cache_hit,
        _timings(response.timings),
    )


def release_description(response: pb.DescribeReleaseResponse) -> ReleaseDescription:
    """Unpack the answer of ``DescribeRelease``."""
    entities = {
        e.entity_type: EntityDescription(
            e.entity_type,
            e.count,
            e.index_kind,
            _optional(e, "ann_recall_at_10"),
            _optional(e, "ann_recall_low"),
            _optional(e, "ann_recall_high"),
            e.live_sequence,
            list(e.attributes),
        )
        for e in response.entities
    }
    limits = Limits(
        **{name: getattr(response.limits, name) for name in Limits.__dataclass_fields__}
    )
    return ReleaseDescription(
        response.release_id,
        response.parent_release_id,
        response.created,
        response.space_id,
        response.form_id,
        response.dimension,
        entities,
        limits,
        list(response.loaded_release_ids),
        response.server_version,
        response.manifest_json,
        response.query_space_id,
    )


def activation(response: pb.ActivateResponse) -> Activation:
    """Unpack the answer of ``Activate`` or ``Rollback``."""
    return Activation(response.release_id, response.previous_release_id, response.total_ns)


def written(response: pb.WriteResponse) -> Written:
    """Unpack the answer of ``Upsert`` or ``Delete``."""
    return Written(response.sequence, response.applied)
