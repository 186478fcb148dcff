"""Fields of requests checked against their meaning and the limits, before any work is done."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from encoders.errors import DataError, SpaceMismatch
from encoders.text.normal_forms import normalize_id, normalize_query
from protos import retrieval_pb2 as pb
from retrieval.config import Limits
from retrieval.errors import EmptyQuery, InvalidEmbedding, InvalidRequest, RequestTooLarge

Float32 = npt.NDArray[np.float32]

NORM_TOLERANCE = 1e-3
"""A ready vector's length may differ from 1 by so much."""


LABELS = ("request_id", "language", "country", "release_id", "space_id", "entity_type")
"""Fields of requests that only name something; they are echoed, logged or looked up."""


def check_labels(message: Message, limits: Limits) -> None:
    """Raise ``RequestTooLarge`` if a text that only names something is long."""
    for name in LABELS:
        text = getattr(message, name, "")
        if len(text) * 4 > limits.max_label_bytes:
            size = len(text.encode())
            if size > limits.max_label_bytes:
                raise RequestTooLarge(name, limits.max_label_bytes, size, " bytes")


def check_answer_size(wanted: Iterable[tuple[int, int]], limits: Limits) -> None:
    """Refuse a call whose answer could hold too much, before any work is done.

    Args:
        wanted: Of each search: hits, and attributes with each hit.
        limits: Of the server.

    Raises:
        RequestTooLarge: There are more than ``max_answer_values``.
    """
    values = sum(hits * (1 + attributes) for hits, attributes in wanted)
    if values > limits.max_answer_values:
        raise RequestTooLarge(
            "searches x k x (1 + attributes)", limits.max_answer_values, values, " values"
        )


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
    """Read ready vectors, shape (B, D) float32.

    Raises as ``checked_embedding``, and ``RequestTooLarge`` for more than ``max_rows``.
    """
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


def checked_id(id_: str, field: str) -> str:
    """Return an id in NFC, or raise ``InvalidRequest``."""
    try:
        normal = normalize_id(id_)
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


def to_value(value: object) -> pb.Value:
    """Convert an attribute value for the wire."""
    if isinstance(value, bool):
        return pb.Value(bool_value=value)
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return pb.Value(int_value=value)
        return pb.Value(double_value=float(value))
    if isinstance(value, float):
        return pb.Value(double_value=value)
    if isinstance(value, list | tuple):
        values = [to_value(item) for item in value if item is not None]
        return pb.Value(list_value=pb.ValueList(values=values))
    return pb.Value(string_value=str(value))


def from_value(value: pb.Value) -> object:
    """Convert an attribute value from the wire; raises ``InvalidRequest`` if nothing is set."""
    kind = value.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("attributes: expected a value, but got one with nothing set.")
    if kind == "list_value":
        return [from_value(item) for item in value.list_value.values]
    found: object = getattr(value, kind)
    return found
