"""Build the message of every call from the arguments of a client's method, before any network.

The options of a method are a ``TypedDict``: callers write plain keywords
(``client.retrieve("lamp", filter="price < 20")``), editors and type checkers know every one of
them, and both clients share one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypedDict, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from encoders.errors import InvalidVectors
from encoders.extras import extra_named
from protos import retrieval_pb2 as pb
from retrieval.client import results

if TYPE_CHECKING:
    import numpy.typing as npt

AttributeValue = str | int | float | bool | list["AttributeValue"]
R = TypeVar("R")
FusionChoice = bool | Sequence[float] | None
"""Fused or not, the weights of three legs, or what the release decides."""

ADMIN_DEADLINE_SECONDS = 300.0
"""Default of the calls that load a release."""


class SearchOptions(TypedDict, total=False):
    """How one entity type is searched."""

    filter: str
    """Boolean expression over attributes, e.g. ``price < 20 and brand == "Acme"``."""
    exclude_ids: Sequence[str]
    """Never return these."""
    min_score: float | None
    """Drop results with a smaller cosine."""
    min_recall: float | None
    """Wanted share of the exact top ``k`` (fused: of the answer over exact legs), above 0 up to 1.
    None: the release's default.
    """
    diversity: float | None
    """MMR lambda, 0 (variety) to 1 (relevance). None: plain ranking."""
    collapse_above: float | None
    """Cosine above which a result counts as a duplicate of a better one. None: keep all."""
    exact: bool
    """Scan everything instead of using the graph."""
    attributes: Sequence[str]
    """Names to return with each hit; ``["*"]`` for all."""
    fusion: FusionChoice
    """Whether words and known queries count beside vectors; or the weights of cosine, words and
    votes. None: the release decides.
    """
    min_probability: float | None
    """Drop hits of a fused answer that are less likely relevant, 0 to 1."""
    gate: bool | None
    """Whether a fused answer to nonsense is empty. None: as the server is configured."""


class VectorOptions(TypedDict, total=False):
    """A ready vector instead of query text."""

    embedding: npt.ArrayLike | None
    """``(D,)`` float32 unit vector; needs ``space_id``."""
    space_id: str
    """Which space ``embedding`` was made in."""


class ReleaseOptions(TypedDict, total=False):
    """Which release answers, and by when."""

    release_id: str
    """Answer from this release or fail. Empty: the active one."""
    deadline_seconds: float | None
    """For this call with its retries. None: the client's."""


class CallerOptions(ReleaseOptions, total=False):
    """Whom an answer is for."""

    language: str
    """Of the user; a label for metrics."""
    country: str
    """Of the user; a label for metrics."""
    request_id: str
    """Echoed in the answer and the impression log."""


class RetrieveOptions(SearchOptions, VectorOptions, CallerOptions, total=False):
    """Keywords of ``retrieve``."""


class MultiOptions(VectorOptions, CallerOptions, total=False):
    """Keywords of ``retrieve_multi``."""


class BatchOptions(CallerOptions, total=False):
    """Keywords of ``retrieve_batch``."""

    embeddings: npt.ArrayLike | None
    """``(B, D)`` float32 unit vectors instead of texts; need ``space_id``."""
    space_id: str
    """Which space ``embeddings`` were made in."""


class ScoreOptions(VectorOptions, ReleaseOptions, total=False):
    """Keywords of ``score``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One search of ``retrieve_multi`` or ``retrieve_batch``; ``SearchOptions`` says what each is.

    An entity type may come more than once in a ``retrieve_multi``, e.g. with different filters.
    """

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
    fusion: FusionChoice = None
    min_probability: float | None = None
    gate: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityWrite:
    """An entity to insert or replace: ``vector`` is ``(D,)`` float32, unit length."""

    id: str
    vector: npt.ArrayLike
    attributes: Mapping[str, AttributeValue] | None = None


class Call(NamedTuple, Generic[R]):
    """One call, ready to send.

    Attributes:
        method: Name of the RPC.
        message: What is sent.
        unpack: Turns the answer's message into the result of the client's method.
        deadline_seconds: For the call with its retries; None: the client's.
        retry: Whether the call may be repeated after a failure.
    """

    method: str
    message: Message
    unpack: Callable[[Any], R]
    deadline_seconds: float | None = None
    retry: bool = True


def retrieve(
    query: str, entity_type: str, k: int, options: RetrieveOptions
) -> Call[results.RetrieveResult]:
    """Build ``Retrieve``."""
    values, deadline = _values("retrieve", RetrieveOptions, options)
    _pack(values, "embedding", axes=1)
    values["fusion"] = fusion_to_proto(values.get("fusion"), values.pop("gate", None))
    message = pb.RetrieveRequest(query=query, entity_type=entity_type, k=k, **values)
    return Call("Retrieve", message, results.retrieve_result, deadline)


def retrieve_multi(
    query: str, targets: Sequence[Target], options: MultiOptions
) -> Call[results.Answers]:
    """Build ``RetrieveMulti``."""
    values, deadline = _values("retrieve_multi", MultiOptions, options)
    _pack(values, "embedding", axes=1)
    packed = [target_to_proto(target) for target in targets]
    message = pb.RetrieveMultiRequest(query=query, targets=packed, **values)
    return Call("RetrieveMulti", message, results.answers, deadline)


def retrieve_batch(
    queries: Sequence[str], target: Target | None, options: BatchOptions
) -> Call[results.Answers]:
    """Build ``RetrieveBatch``."""
    values, deadline = _values("retrieve_batch", BatchOptions, options)
    _pack(values, "embeddings", axes=2)
    packed = target_to_proto(target or Target(entity_type="pin"))
    message = pb.RetrieveBatchRequest(queries=queries, target=packed, **values)
    return Call("RetrieveBatch", message, results.answers, deadline)


def score(
    query: str, ids: Sequence[str], entity_type: str, options: ScoreOptions
) -> Call[results.Scores]:
    """Build ``Score``."""
    values, deadline = _values("score", ScoreOptions, options)
    _pack(values, "embedding", axes=1)
    message = pb.ScoreRequest(query=query, ids=ids, entity_type=entity_type, **values)
    return Call("Score", message, results.scores, deadline)


def embed(
    queries: Sequence[str], release_id: str, deadline_seconds: float | None
) -> Call[results.Embeddings]:
    """Build ``Embed``."""
    message = pb.EmbedRequest(queries=queries, release_id=release_id)
    return Call("Embed", message, results.embeddings, deadline_seconds)


def describe_release(
    release_id: str, deadline_seconds: float | None
) -> Call[results.ReleaseDescription]:
    """Build ``DescribeRelease``."""
    message = pb.DescribeReleaseRequest(release_id=release_id)
    return Call("DescribeRelease", message, results.release_description, deadline_seconds)


def activate(release_id: str, deadline_seconds: float) -> Call[results.Activation]:
    """Build ``Activate``."""
    message = pb.ActivateRequest(release_id=release_id)
    return Call("Activate", message, results.activation, deadline_seconds)


def rollback(deadline_seconds: float) -> Call[results.Activation]:
    """Build ``Rollback``, which is never repeated: a second one would undo the first."""
    return Call("Rollback", pb.RollbackRequest(), results.activation, deadline_seconds, retry=False)


def upsert(
    entity_type: str,
    entities: Sequence[EntityWrite],
    space_id: str,
    deadline_seconds: float | None,
) -> Call[results.Written]:
    """Build ``Upsert``."""
    packed = [entity_to_proto(entity) for entity in entities]
    message = pb.UpsertRequest(entity_type=entity_type, space_id=space_id, entities=packed)
    return Call("Upsert", message, results.written, deadline_seconds)


def delete(
    entity_type: str, ids: Sequence[str], deadline_seconds: float | None
) -> Call[results.Written]:
    """Build ``Delete``."""
    message = pb.DeleteRequest(entity_type=entity_type, ids=ids)
    return Call("Delete", message, results.written, deadline_seconds)


def health_check(service: str, deadline_seconds: float) -> Call[bool]:
    """Build the health service's ``Check``."""
    message = health_pb2.HealthCheckRequest(service=service)
    return Call("Health.Check", message, results.is_serving, deadline_seconds, retry=False)


def _values(
    method: str, known: type, options: Mapping[str, Any]
) -> tuple[dict[str, Any], float | None]:
    """Split a method's keywords into the fields of its message and the deadline.

    Raises:
        TypeError: A keyword is none of the method's.
    """
    values = dict(options)
    names: frozenset[str] = known.__optional_keys__  # type: ignore[attr-defined]
    unknown = values.keys() - names
    if unknown:
        raise TypeError(
            f"{method}() got an unexpected keyword argument {min(unknown)!r}. It takes"
            f" {', '.join(sorted(names))}."
        )
    return values, values.pop("deadline_seconds", None)


def _pack(values: dict[str, Any], name: str, axes: int) -> None:
    """Replace an embedding among the fields, if there is one, by its bytes."""
    if values.get(name) is not None:
        values[name] = vector_bytes(values[name], axes)


def vector_bytes(vectors: npt.ArrayLike, axes: int) -> bytes:
    """Pack ``(D,)`` (``axes=1``) or ``(B, D)`` (``axes=2``) numbers as little-endian float32.

    Raises:
        InvalidVectors: The array has another number of axes, no elements, or is not numeric.
        MissingDependency: numpy is not installed.
    """
    with extra_named("Sending vectors"):
        import numpy as np
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
    values = {field.name: getattr(target, field.name) for field in fields(target)}
    values["fusion"] = fusion_to_proto(target.fusion, values.pop("gate"))
    return pb.Target(**values)


def fusion_to_proto(choice: FusionChoice, gate: bool | None) -> pb.Fusion | None:
    """Pack whether an answer is to be fused, by which weights, and whether nonsense gets none."""
    if choice is None and gate is None:
        return None
    if choice is None or isinstance(choice, bool):
        return pb.Fusion(enabled=choice, gate=gate)
    return pb.Fusion(weights=choice, gate=gate)


def entity_to_proto(entity: EntityWrite) -> pb.Entity:
    """Pack an ``EntityWrite``."""
    attributes = {name: value_to_proto(value) for name, value in (entity.attributes or {}).items()}
    return pb.Entity(id=entity.id, embedding=vector_bytes(entity.vector, 1), attributes=attributes)
