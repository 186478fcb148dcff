"""Bounds on request messages, looked at in their bytes before anything is built from them.

An empty field takes two bytes on the wire and about a hundred once it is parsed, so that bytes
alone bound nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from retrieval.config import Limits
from retrieval.errors import InvalidRequest, MessageTooLarge, RequestTooLarge

SMALL_BYTES = 4096
"""A message of at most so many bytes holds no number of fields that matters."""
INLINE_BYTES = 32 * 2**10
"""A larger message is counted and parsed in a thread."""
FIXED_BYTES = 64 * 2**10
"""Room of every message for what has no limit of its own: ids of releases, labels, languages."""
ID_BYTES = 128
"""Bytes of one id, on average, that the size of a message of many ids allows for."""
VECTOR_BYTES = 8192
"""Bytes of one ready vector at most: 2,048 dimensions."""

FIELDS_PER_ENTITY = 500
"""Of an upsert, on average: an attribute takes four."""
SPARE_FIELDS = 1000
"""More than a method's limits allow, as the method says it better: it names the limit."""

Nested = dict[int, "Nested"]
"""Field number of each sub-message -> the sub-messages of that one."""


class MessageBounds(NamedTuple):
    """What one message of a method may hold.

    Attributes:
        max_bytes: On the wire, uncompressed.
        max_fields: At all depths together.
        max_items: In the message itself, apart from those of its sub-messages.
    """

    max_bytes: int
    max_fields: int
    max_items: int = 2**31


def bounds_of(limits: Limits) -> dict[str, MessageBounds]:
    """Return the bounds of each method's request, as the server's limits imply them."""
    ids = limits.max_exclude_ids
    target_bytes = limits.max_filter_bytes + ID_BYTES * ids + FIXED_BYTES
    query_bytes = limits.max_query_bytes + VECTOR_BYTES
    batch_bytes = limits.max_batch * max(limits.max_query_bytes + 4, VECTOR_BYTES)
    wanted = {
        "Retrieve": (query_bytes + target_bytes, ids, ids),
        "RetrieveMulti": (
            query_bytes + limits.max_targets * target_bytes,
            limits.max_targets * ids,
            limits.max_targets,
        ),
        "RetrieveBatch": (batch_bytes + target_bytes, limits.max_batch + ids, limits.max_batch),
        "Embed": (
            limits.max_batch * (limits.max_query_bytes + 4) + FIXED_BYTES,
            limits.max_batch,
            limits.max_batch,
        ),
        "Score": (
            query_bytes + ID_BYTES * limits.max_score_ids + FIXED_BYTES,
            limits.max_score_ids,
            limits.max_score_ids,
        ),
        "DescribeRelease": (FIXED_BYTES, 0, 0),
        "Activate": (FIXED_BYTES, 0, 0),
        "Rollback": (FIXED_BYTES, 0, 0),
        "Upsert": (
            limits.max_message_bytes,
            FIELDS_PER_ENTITY * limits.max_batch,
            limits.max_batch,
        ),
        "Delete": (
            ID_BYTES * limits.max_batch + FIXED_BYTES,
            limits.max_batch,
            limits.max_batch,
        ),
    }
    return {
        name: MessageBounds(
            min(size, limits.max_message_bytes), fields + SPARE_FIELDS, items + SPARE_FIELDS
        )
        for name, (size, fields, items) in wanted.items()
    }


def require_bounded(content: bytes, bounds: MessageBounds, nested: Nested) -> None:
    """Raise unless a serialised message holds no more bytes and fields than it may.

    Raises:
        MessageTooLarge: It has more bytes.
        RequestTooLarge: It has more fields.
        InvalidRequest: Its bytes are not a protobuf message.
    """
    if len(content) > bounds.max_bytes:
        raise MessageTooLarge(bounds.max_bytes, len(content))
    if len(content) <= SMALL_BYTES:
        return
    # First without a look into sub-messages: a million empty ones are as bad and sooner counted
    max_items = min(bounds.max_items, bounds.max_fields)
    for limit, inner in ((max_items, {}), (bounds.max_fields, nested)):
        if not _has_at_most(limit, content, inner):
            raise RequestTooLarge("the message", limit, limit + 1, " fields")


def nested_messages(descriptor: Descriptor) -> Nested:
    """Return which fields of a message are messages themselves, at all depths."""
    return _nested(descriptor, {})


def _nested(descriptor: Descriptor, known: dict[str, Nested]) -> Nested:
    found = known.get(descriptor.full_name)
    if found is None:
        found = known[descriptor.full_name] = {}
        for field in descriptor.fields:
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                found[field.number] = _nested(field.message_type, known)
    return found


def _has_at_most(limit: int, content: bytes, nested: Nested) -> bool:
    """Count fields, those of sub-messages too, and stop at the limit."""
    count = 0
    waiting = [(0, len(content), nested)]
    try:
        while waiting:
            at, end, inner = waiting.pop()
            while at < end:
                count += 1
                if count > limit:
                    return False
                tag, at = _varint(content, at)
                kind = tag & 7
                if kind == 2:
                    size, at = _varint(content, at)
                    below = inner.get(tag >> 3)
                    if below is not None and size:
                        waiting.append((at, at + size, below))
                    at += size
                elif kind == 0:
                    _, at = _varint(content, at)
                else:
                    at += FIXED_SIZES[kind]
            if at != end:
                raise IndexError
    except IndexError as error:
        raise InvalidRequest("the bytes are not the message of this method.") from error
    return True


FIXED_SIZES = (0, 8, 0, 0, 0, 4)
"""Bytes of a value by wire type; a group's begin and end have none, 6 and 7 are no types."""


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Read one number; returns it and where it ends."""
    byte = content[at]
    if byte < 128:
        return byte, at + 1
    value = byte & 127
    for shift in range(7, 70, 7):
        at += 1
        byte = content[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
    raise IndexError
