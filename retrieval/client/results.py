"""Results of the clients: named and typed, unpacked from the protobuf messages of the answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from grpc_health.v1 import health_pb2

from encoders.extras import extra_named
from protos import retrieval_pb2 as pb
from retrieval.client import tables

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas
    import polars

    Float32 = npt.NDArray[np.float32]


class Hit(NamedTuple):
    """One retrieved entity."""

    id: str
    score: float  # cosine with the query, -1 to 1
    attributes: dict[str, Any]  # only the requested ones


class FusedScore(NamedTuple):
    """How one hit of a fused answer was scored."""

    fused: float  # by which the answer is ordered
    dense: float  # cosine, the hit's ``score``
    lexical: float  # words: share of the highest BM25 the query could reach
    votes: float  # share of the votes of known queries
    probability: float | None  # that the hit is relevant; None where it is not calibrated


class Timings(NamedTuple):
    """Nanoseconds inside the server; the network is not in them."""

    total_ns: int
    queue_ns: int
    encode_ns: int
    search_ns: int
    rerank_ns: int


class HitTable:
    """What an answer with hits can be turned into."""

    __slots__ = ()

    hits: list[Hit]
    fused: list[FusedScore] | None

    @property
    def ids(self) -> list[str]:
        """The ids, best first."""
        return [hit.id for hit in self.hits]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary per hit: ``rank``, ``id``, ``score``, and its attributes.

        A fused answer has ``fused``, ``lexical``, ``votes`` and ``probability``, too.
        """
        return tables.rows_of(self.hits, self.fused)

    def to_polars(self) -> polars.DataFrame:
        """Return ``to_dicts`` as a polars frame; the extra ``notebook`` brings polars."""
        return tables.polars_frame(self.to_dicts())

    def to_pandas(self) -> pandas.DataFrame:
        """Return ``to_dicts`` as a pandas frame; the extra ``notebook`` brings pandas."""
        return tables.pandas_frame(self.to_dicts())

    def _html(self, about: str) -> str:
        return tables.html_table(f"{len(self.hits)} hits, {about}", self.hits, self.fused)


@dataclass(frozen=True, slots=True)
class RetrieveResult(HitTable):
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
    """The hits come from the answer cache: an earlier search of the same text and fields."""
    legs: tuple[str, ...] = ()
    """Legs that a fused answer was made of; empty: vectors alone decided."""
    fused: list[FusedScore] | None = None
    """Scores of a fused answer, one a hit; None where vectors alone decided."""
    unknown_share: float = 0.0
    """Share of the query's characters that the query tower does not know."""

    def _repr_html_(self) -> str:
        """Show the hits in a notebook, with their pictures if those attributes were asked for."""
        took = f"{self.timings.total_ns / 1e6:.1f} ms in the server"
        return self._html(f"release {self.release_id}, plan {self.plan}, {took}")


@dataclass(frozen=True, slots=True)
class Answer(HitTable):
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
    legs: tuple[str, ...] = ()
    """As in ``RetrieveResult``."""
    fused: list[FusedScore] | None = None
    """As in ``RetrieveResult``."""

    def _repr_html_(self) -> str:
        """Show the hits in a notebook, as those of a ``RetrieveResult``."""
        return self._html(f"{self.entity_type}, plan {self.plan}")


@dataclass(frozen=True, slots=True)
class Answers:
    """Several searches answered from one release, in the order of the request."""

    answers: list[Answer]
    release_id: str
    space_id: str
    timings: Timings
    request_id: str

    def _repr_html_(self) -> str:
        """Show every answer in a notebook."""
        return "".join(answer._repr_html_() for answer in self.answers)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Query vectors: ``vectors`` is ``(B, D)`` float32, unit rows in the order of the queries."""

    vectors: Float32
    release_id: str
    space_id: str
    form_id: str
    cache_hits: list[bool]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Scores:
    """Cosines in the order of the requested ids; NaN where the id is not in the index."""

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
    max_label_bytes: int
    max_attributes: int
    max_answer_values: int
    """0 of a server that does not tell it; likewise the two before."""


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


def value_to_python(value: pb.Value) -> Any:
    """Unpack an attribute value; an unset one is None."""
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "list_value":
        return [value_to_python(item) for item in value.list_value.values]
    return getattr(value, kind)


def _hits(hits: Iterable[pb.Hit]) -> list[Hit]:
    return [
        Hit(hit.id, hit.score, {name: value_to_python(v) for name, v in hit.attributes.items()})
        for hit in hits
    ]


def _fused(message: pb.RetrieveResponse | pb.Answer) -> list[FusedScore] | None:
    if not message.legs:
        return None
    return [
        FusedScore(
            hit.fused_score,
            hit.score,
            hit.lexical_score,
            hit.vote_score,
            _optional(hit, "probability"),
        )
        for hit in message.hits
    ]


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        total_ns=timings.total_ns,
        queue_ns=timings.queue_ns,
        encode_ns=timings.encode_ns,
        search_ns=timings.search_ns,
        rerank_ns=timings.rerank_ns,
    )


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def retrieve_result(response: pb.RetrieveResponse) -> RetrieveResult:
    """Unpack the answer of ``Retrieve``."""
    return RetrieveResult(
        hits=_hits(response.hits),
        release_id=response.release_id,
        space_id=response.space_id,
        cache_hit=response.cache_hit,
        plan=response.plan,
        ef=response.ef,
        estimated_recall=_optional(response, "estimated_recall"),
        selectivity=_optional(response, "selectivity"),
        timings=_timings(response.timings),
        request_id=response.request_id,
        query_space_id=response.query_space_id,
        answer_cached=response.answer_cached,
        legs=tuple(response.legs),
        fused=_fused(response),
        unknown_share=response.unknown_share,
    )


def _answer(answer: pb.Answer) -> Answer:
    return Answer(
        hits=_hits(answer.hits),
        entity_type=answer.entity_type,
        cache_hit=answer.cache_hit,
        plan=answer.plan,
        ef=answer.ef,
        estimated_recall=_optional(answer, "estimated_recall"),
        selectivity=_optional(answer, "selectivity"),
        search_ns=answer.search_ns,
        answer_cached=answer.answer_cached,
        legs=tuple(answer.legs),
        fused=_fused(answer),
    )


def answers(response: pb.RetrieveMultiResponse | pb.RetrieveBatchResponse) -> Answers:
    """Unpack the answer of ``RetrieveMulti`` or ``RetrieveBatch``."""
    return Answers(
        answers=[_answer(answer) for answer in response.answers],
        release_id=response.release_id,
        space_id=response.space_id,
        timings=_timings(response.timings),
        request_id=response.request_id,
    )


def embeddings(response: pb.EmbedResponse) -> Embeddings:
    """Unpack the answer of ``Embed``. Raises ``MissingDependency`` without numpy."""
    with extra_named("RetrievalClient.embed"):
        import numpy as np
    numbers = np.frombuffer(response.embeddings, dtype="<f4").astype(np.float32)
    return Embeddings(
        vectors=numbers.reshape(-1, max(response.dimension, 1)),  # (B, D)
        release_id=response.release_id,
        space_id=response.space_id,
        form_id=response.form_id,
        cache_hits=list(response.cache_hits),
        timings=_timings(response.timings),
    )


def scores(response: pb.ScoreResponse) -> Scores:
    """Unpack the answer of ``Score``. Raises ``MissingDependency`` without numpy."""
    with extra_named("RetrievalClient.score"):
        import numpy as np
    return Scores(
        scores=np.array(response.scores, dtype=np.float32),
        missing=response.missing,
        release_id=response.release_id,
        space_id=response.space_id,
        cache_hit=response.cache_hit,
        timings=_timings(response.timings),
    )


def _entity(entity: pb.EntityDescription) -> EntityDescription:
    return EntityDescription(
        entity_type=entity.entity_type,
        count=entity.count,
        index_kind=entity.index_kind,
        ann_recall_at_10=_optional(entity, "ann_recall_at_10"),
        ann_recall_low=_optional(entity, "ann_recall_low"),
        ann_recall_high=_optional(entity, "ann_recall_high"),
        live_sequence=entity.live_sequence,
        attributes=list(entity.attributes),
    )


def release_description(response: pb.DescribeReleaseResponse) -> ReleaseDescription:
    """Unpack the answer of ``DescribeRelease``."""
    limits = {field.name: getattr(response.limits, field.name) for field in fields(Limits)}
    return ReleaseDescription(
        release_id=response.release_id,
        parent_release_id=response.parent_release_id,
        created=response.created,
        space_id=response.space_id,
        form_id=response.form_id,
        dimension=response.dimension,
        entities={entity.entity_type: _entity(entity) for entity in response.entities},
        limits=Limits(**limits),
        loaded_release_ids=list(response.loaded_release_ids),
        server_version=response.server_version,
        manifest_json=response.manifest_json,
        query_space_id=response.query_space_id,
    )


def activation(response: pb.ActivateResponse) -> Activation:
    """Unpack the answer of ``Activate`` or ``Rollback``."""
    return Activation(response.release_id, response.previous_release_id, response.total_ns)


def written(response: pb.WriteResponse) -> Written:
    """Unpack the answer of ``Upsert`` or ``Delete``."""
    return Written(response.sequence, response.applied)


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """Return whether a health answer says SERVING."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)
