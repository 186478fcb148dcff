"""The bytes of the live log: records with length, sequence number and checksum, one an entry."""

from __future__ import annotations

import json
import math
import struct
import unicodedata
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from encoders.errors import InvalidVectors
from index_builder.errors import LiveLogError

FILE_MAGIC = b"OMNILIVE"
FILE_VERSION = 1
FILE_HEADER = struct.Struct("<8sIIQ")  # magic, version, reserved, first sequence
RECORD_MAGIC = b"OLR1"
# Magic, payload bytes, sequence, xxh3-64 of (length, sequence, payload)
RECORD_HEADER = struct.Struct("<4sIQQ")
# Operation, time ns, space id, id bytes, dimension, JSON bytes
_PAYLOAD_HEADER = struct.Struct("<BQ32sHII")
MAX_PAYLOAD_BYTES = 16 * 2**20
_CHECKED_HEADER = struct.Struct("<IQ")  # payload bytes, sequence
UPSERT, DELETE = 1, 2
_NO_SPACE = bytes(32)
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEntry:
    """One write: an upsert (vector present) or a delete (vector None).

    Attributes:
        id: The entity.
        vector: float32 ``(D,)``, unit norm; None deletes the entity.
        space_id: Space of the vector, 64 hexadecimal digits; empty for a delete.
        attributes: Values for filters and responses.
        source: The catalogue row the vector was made from, so that a rebuild with another bundle
            can embed it again; None if unknown.
        sequence: Position in the log, from 1; 0 before it is written.
        time_ns: When it was written, nanoseconds since 1970.
        repeats: Sequence of the write that this entry repeats with a vector of another space; 0: it
            is a write of its own.
    """

    id: str
    vector: np.ndarray | None = None
    space_id: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    sequence: int = 0
    time_ns: int = 0
    repeats: int = 0

    @property
    def version(self) -> int:
        """Sequence of the write whose data this entry holds."""
        return self.repeats or self.sequence

    @property
    def is_delete(self) -> bool:
        """Whether this entry deletes the entity."""
        return self.vector is None


def check_entry(entry: LiveEntry, dimension: int) -> None:
    """Refuse what must never enter an index.

    Args:
        entry: What is about to be written.
        dimension: Length of the vectors of this log.

    Raises:
        LiveLogError: The id is empty, too long, not NFC or holds an unpaired surrogate, or the
            space id is malformed.
        InvalidVectors: The vector has another shape or dtype, holds NaN or Inf, or is not of unit
            norm.
    """
    try:
        encoded = entry.id.encode()
    except UnicodeEncodeError as error:
        raise LiveLogError(
            f"id {entry.id!r} cannot be written as UTF-8 ({error.reason}); send a valid Unicode"
            " string"
        ) from error
    if not 0 < len(encoded) <= 65535 or not unicodedata.is_normalized("NFC", entry.id):
        raise LiveLogError(
            f"an id must be 1 to 65,535 bytes of NFC text, but got {len(encoded)} bytes:"
            f" {entry.id[:60]!r}; normalise it with unicodedata.normalize('NFC', id)"
        )
    if entry.vector is None:
        return
    vector = entry.vector
    if vector.shape != (dimension,) or vector.dtype != np.float32:
        raise InvalidVectors(
            f"entity {entry.id!r}: expected float32 of shape ({dimension},), but got {vector.dtype}"
            f" of shape {vector.shape}"
        )
    norm = math.sqrt(vector.dot(vector))
    if not math.isfinite(norm):
        raise InvalidVectors(
            f"entity {entry.id!r}: the vector holds NaN or Inf; embed the entity again"
        )
    if abs(norm - 1.0) > 1e-3:
        raise InvalidVectors(
            f"entity {entry.id!r}: expected unit norm, but got {norm:.6f}; divide the vector by its"
            " norm"
        )
    if len(entry.space_id) != 64:
        raise LiveLogError(
            f"entity {entry.id!r}: a space id has 64 hexadecimal digits, but got"
            f" {entry.space_id[:70]!r}"
        )


def _checksum(length: int, sequence: int, payload: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(b"".join((_CHECKED_HEADER.pack(length, sequence), payload)))


def encode_payload(entry: LiveEntry, time_ns: int) -> bytes:
    """Encode everything of an entry but its sequence number.

    Raises:
        LiveLogError: Attributes or source cannot be written as JSON, or the entry is larger than 16
            MiB.
    """
    identifier = entry.id.encode()
    vector = b"" if entry.vector is None else entry.vector.astype("<f4", copy=False).tobytes()
    extra: dict[str, Any] = {}
    if entry.attributes:
        extra["attributes"] = entry.attributes
    if entry.source is not None:
        extra["source"] = entry.source
    if entry.repeats:
        extra["repeats"] = entry.repeats
    try:
        text = b""
        if extra:
            compact = json.dumps(extra, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            text = compact.encode()
        space = bytes.fromhex(entry.space_id) if entry.space_id else _NO_SPACE
    except (TypeError, ValueError) as error:
        raise LiveLogError(
            f"entity {entry.id!r}: attributes and source must be JSON values and the space id"
            f" hexadecimal: {error}"
        ) from error
    head = _PAYLOAD_HEADER.pack(
        DELETE if entry.is_delete else UPSERT,
        time_ns,
        space,
        len(identifier),
        len(vector) // 4,
        len(text),
    )
    payload = b"".join((head, identifier, vector, text))
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LiveLogError(
            f"entity {entry.id!r}: an entry may have at most {MAX_PAYLOAD_BYTES:,} bytes, but has"
            f" {len(payload):,}; shorten its attributes"
        )
    return payload


def frame(payload: bytes, sequence: int) -> bytes:
    """Put the record header before a payload."""
    checksum = _checksum(len(payload), sequence, payload)
    return RECORD_HEADER.pack(RECORD_MAGIC, len(payload), sequence, checksum) + payload


def decode_payload(payload: memoryview, sequence: int) -> LiveEntry:
    """Decode what ``encode_payload`` encoded; the vector is a private read-only copy."""
    content = bytes(payload)
    fields = _PAYLOAD_HEADER.unpack_from(content)
    operation, time_ns, space, id_bytes, dimension, text_bytes = fields
    start = _PAYLOAD_HEADER.size
    identifier = content[start : start + id_bytes].decode()
    start += id_bytes
    if operation == DELETE:
        return LiveEntry(id=identifier, sequence=sequence, time_ns=time_ns)
    vector = np.ndarray((dimension,), _FLOAT32, content, start)  # bytes: read-only
    start += 4 * dimension
    extra = json.loads(content[start : start + text_bytes]) if text_bytes else {}
    return LiveEntry(
        id=identifier,
        vector=vector,
        space_id=space.hex(),
        attributes=extra.get("attributes", {}),
        source=extra.get("source"),
        sequence=sequence,
        time_ns=time_ns,
        repeats=int(extra.get("repeats", 0)),
    )


def next_record(content: memoryview, offset: int, sequence: int) -> tuple[memoryview, int] | None:
    """Return the payload of the record at ``offset`` and the offset after it.

    None if no whole, valid record of that sequence number stands there.
    """
    body = offset + RECORD_HEADER.size
    if body > len(content):
        return None
    magic, length, found, checksum = RECORD_HEADER.unpack_from(content, offset)
    if (
        magic != RECORD_MAGIC
        or found != sequence
        or length > MAX_PAYLOAD_BYTES
        or body + length > len(content)
    ):
        return None
    payload = content[body : body + length]
    return (payload, body + length) if _checksum(length, found, payload) == checksum else None
