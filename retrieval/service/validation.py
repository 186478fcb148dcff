"""Requests checked at the door: every field against its meaning and the limits, before any work is done."""

from __future__ import annotations

import math
import unicodedata
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from encoders.errors import DataError, SpaceMismatch
from encoders.text.normal_forms import normalize_id, normalize_query
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import EmptyQuery, InvalidEmbedding, InvalidK, InvalidRequest, RequestTooLarge

Float32 = npt.NDArray[np.float32]

NORM_TOLERANCE = 1e-3


class Target(Protocol):
    """The fields that RetrieveRequest and Target share."""

    entity_type: str
    k: int
    filter: str
    min_score: float
    min_recall: float
    diversity: float
    collapse_above: float
    exact: bool

    def HasField(self, name: str) -> bool:
        """Whether an optional field was set."""
        ...


def checked_query(text: str, limits: Limits, field: str = "query") -> str:
    """Normalise a query text, or raise ``EmptyQuery`` or ``RequestTooLarge``."""
    if len(text) > limits.max_query_bytes or (
        len(text) * 4 > limits.max_query_bytes and len(text.encode()) > limits.max_query_bytes
    ):
        raise RequestTooLarge(field, limits.max_query_bytes, len(text.encode()), " bytes")
    normal = normalize_query(text)
    if not normal or not any(unicodedata.category(letter)[0] not in "CZ" for letter in normal):
        raise EmptyQuery(field)
    return normal


def checked_target(target: Target | pb.RetrieveRequest | pb.Target, limits: Limits) -> None:
    """Check the fields of one search.

    Raises:
        InvalidK: k outside 1..max_k.
        InvalidRequest: A number outside its range, or NaN.
        RequestTooLarge: Filter or excluded ids beyond the limits.
    """
    if not 0 < target.k <= limits.max_k:
        raise InvalidK(target.k, limits.max_k)
    if target.filter and len(target.filter.encode()) > limits.max_filter_bytes:
        raise RequestTooLarge(
            "filter", limits.max_filter_bytes, len(target.filter.encode()), " bytes"
        )
    message = cast(pb.Target, target)
    if len(message.exclude_ids) > limits.max_exclude_ids:
        raise RequestTooLarge(
            "exclude_ids", limits.max_exclude_ids, len(message.exclude_ids), " ids"
        )
    for name, low, high in (
        ("min_score", -1.0, 1.0),
        ("min_recall", 0.0, 1.0),
        ("diversity", 0.0, 1.0),
        ("collapse_above", 0.0, 1.0),
    ):
        if target.HasField(name):
            value = getattr(target, name)
            if not low <= value <= high or (name == "min_recall" and value == 0.0):
                bounds = (
                    "more than 0 and at most 1" if name == "min_recall" else f"{low:g} to {high:g}"
                )
                raise InvalidRequest(f"{name}: expected {bounds}, but got {value:g}.")


def checked_embedding(
    content: bytes, space_id: str, dimension: int, served_space: str, field: str = "embedding"
) -> Float32:
    """Read one ready vector, shape (D,) float32.

    Raises:
        InvalidEmbedding: Wrong length, NaN or infinity, or not of unit length.
        InvalidRequest: No space id came with it.
        SpaceMismatch: Made under another space id than the release's.
    """
    vector: Float32 = checked_embeddings(content, space_id, dimension, served_space, 1, field)[0]
    return vector


def checked_embeddings(
    content: bytes,
    space_id: str,
    dimension: int,
    served_space: str,
    max_rows: int,
    field: str = "embeddings",
) -> Float32:
    """Read ready vectors, shape (B, D) float32; raises as ``checked_embedding``, and ``RequestTooLarge`` above ``max_rows``."""
    row_bytes = 4 * dimension
    if len(content) % row_bytes or not content:
        raise InvalidEmbedding(
            f"{field}: expected little-endian float32 of {dimension} dimensions, {row_bytes} bytes"
            f" a vector, but got {len(content)} bytes."
        )
    rows = len(content) // row_bytes
    if rows > max_rows:
        if max_rows == 1:
            raise InvalidEmbedding(
                f"{field}: expected one vector of {row_bytes} bytes, but got {len(content)} bytes."
            )
        raise RequestTooLarge(field, max_rows, rows, " vectors")
    if not space_id:
        raise InvalidRequest(
            f"space_id: expected the space id that made {field}, but got none. Embed and"
            " DescribeRelease tell it."
        )
    if space_id != served_space:
        raise SpaceMismatch(served_space, space_id, field)
    vectors = np.frombuffer(content, dtype="<f4").reshape(rows, dimension)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    for row, norm in enumerate(norms.tolist()):
        if not math.isfinite(norm):
            raise InvalidEmbedding(f"{field}: vector {row} holds NaN or infinity.")
        if abs(norm - 1.0) > NORM_TOLERANCE:
            raise InvalidEmbedding(
                f"{field}: expected vectors of length 1 (within {NORM_TOLERANCE:g}), but vector"
                f" {row} has length {norm:.6g}. Divide it by its length."
            )
    return vectors.astype(np.float32, copy=False)


def checked_id(id: str, field: str) -> str:
    """An id in NFC, or ``InvalidRequest``."""
    try:
        normal = normalize_id(id)
    except DataError as error:
        raise InvalidRequest(f"{field}: {error}") from error
    if len(normal.encode()) > 65535:
        raise InvalidRequest(
            f"{field}: expected an id of at most 65,535 bytes, but got {len(normal.encode())}."
        )
    return normal


def require_count(field: str, count: int, limit: int) -> None:
    """Raise unless ``1 <= count <= limit``."""
    if count == 0:
        raise InvalidRequest(f"{field}: expected at least one, but got none.")
    if count > limit:
        raise RequestTooLarge(field, limit, count)


def one_of(text: str, embedding: bytes) -> None:
    """Raise unless exactly one of query text and ready embedding came."""
    if text and embedding:
        raise InvalidRequest("query: expected either text or an embedding, but got both.")


def to_value(value: object) -> pb.Value:
    """An attribute value for the wire."""
    if isinstance(value, bool):
        return pb.Value(bool_value=value)
    if isinstance(value, int):
        return (
            pb.Value(int_value=value)
            if -(2**63) <= value < 2**63
            else pb.Value(double_value=float(value))
        )
    if isinstance(value, float):
        return pb.Value(double_value=value)
    if isinstance(value, list | tuple):
        return pb.Value(
            list_value=pb.ValueList(values=[to_value(item) for item in value if item is not None])
        )
    return pb.Value(string_value=str(value))


def from_value(value: pb.Value) -> object:
    """An attribute value from the wire; raises ``InvalidRequest`` if nothing is set."""
    kind = value.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("attributes: expected a value, but got one with nothing set.")
    if kind == "list_value":
        return [from_value(item) for item in value.list_value.values]
    found: object = getattr(value, kind)
    return found
