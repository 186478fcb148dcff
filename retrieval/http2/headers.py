"""Header fields of gRPC over HTTP/2: those we send as bytes, and what requests say in theirs."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence

import grpc

TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
TIMEOUT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
MAX_MESSAGE_CHARACTERS = 1000
NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")
"""Of a field: a token in lower case, a colon before it in pseudo-headers."""
BAD_VALUE = re.compile(rb"[\x00\r\n]|^[ \t]|[ \t]\Z")
CONNECTION_FIELDS = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
"""Fields of HTTP/1.1 that make a request of HTTP/2 malformed."""
PSEUDO_HEADERS = frozenset((b":method", b":scheme", b":path", b":authority"))

Headers = Sequence[tuple[bytes, bytes]]
Metadata = tuple[tuple[str, str | bytes], ...]


def literal(name: bytes, value: bytes) -> bytes:
    """Encode one header without Huffman code or index, so that every block stands alone."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """Encode the length of a string (RFC 7541, section 5.1, with a 7-bit prefix)."""
    count = len(text)
    if count < 127:
        return bytes((count,))
    out = bytearray((127,))
    count -= 127
    while count >= 128:
        out.append(count % 128 + 128)
        count //= 128
    out.append(count)
    return bytes(out)


STATUS_200 = b"\x88"
CONTENT_TYPE = literal(b"content-type", b"application/grpc")
RESPONSE_BLOCK = STATUS_200 + CONTENT_TYPE
OK_BLOCK = literal(b"grpc-status", b"0")
EMPTY_TABLE = b"\x20"
"""Says at the start of a header block that our header table is empty (RFC 7541, section 6.3)."""


def percent_encoded(message: str) -> bytes:
    """Encode a status message as gRPC sends it; at most 1,000 characters."""
    message = message[:MAX_MESSAGE_CHARACTERS]
    if message.isascii() and message.isprintable() and "%" not in message:
        return message.encode()
    return b"".join(
        bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in message.encode("utf-8", "replace")
    )


def status_block(
    code: grpc.StatusCode, message: str, trailing: Iterable[tuple[str, str | bytes]]
) -> bytes:
    """Encode the trailers of a failed call."""
    block = literal(b"grpc-status", str(code.value[0]).encode())
    if message:
        block += literal(b"grpc-message", percent_encoded(message))
    return block + metadata_block(trailing)


def metadata_block(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Encode metadata of an answer."""
    return b"".join(literal(key.encode(), _metadata_value(key, value)) for key, value in metadata)


def _metadata_value(key: str, value: str | bytes) -> bytes:
    if isinstance(value, str):
        return value.encode("latin-1", "replace")
    return base64.b64encode(value).rstrip(b"=") if key.endswith("-bin") else value


def timeout_seconds(text: str) -> float | None:
    """Read a ``grpc-timeout`` in seconds; None if it is malformed."""
    found = TIMEOUT.fullmatch(text)
    return float(found[1]) * TIMEOUT_SECONDS[found[2]] if found else None


def metadata_of(headers: Headers) -> Metadata:
    """Return what a handler may see: no pseudo headers; values of ``-bin`` names as bytes.

    Raises:
        ValueError: A ``-bin`` value is not base64.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith(b":"):
            continue
        key = name.decode("latin-1")
        if key.endswith("-bin"):
            found.append((key, _decoded(key, value)))
        else:
            found.append((key, value.decode("latin-1")))
    return tuple(found)


def _decoded(key: str, value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{key}: {error}") from error


def are_well_formed(headers: Headers) -> bool:
    """Return whether names and values are ones that HTTP/2 allows (RFC 9113, section 8.2)."""
    for name, value in headers:
        if NAME.fullmatch(name) is None or BAD_VALUE.search(value) is not None:
            return False
        if name in CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
            return False
    return True


def is_request(headers: Headers) -> bool:
    """Return whether well-formed fields are those of a request (RFC 9113, section 8.3).

    Each pseudo-header once, none unknown, all before the others; method, scheme and path are there.
    """
    found: dict[bytes, bytes] = {}
    regular = False
    for name, value in headers:
        if not name.startswith(b":"):
            regular = True
        elif regular or name in found or name not in PSEUDO_HEADERS:
            return False
        else:
            found[name] = value
    if found.get(b":method") == b"CONNECT":
        return found.keys() == {b":method", b":authority"}
    return all(found.get(name) for name in (b":method", b":scheme", b":path"))


def is_grpc(content_type: bytes) -> bool:
    """Return whether a content type is gRPC's, and not gRPC-Web's."""
    return content_type == b"application/grpc" or content_type.startswith(
        (b"application/grpc+", b"application/grpc;")
    )


def content_length(headers: Headers) -> int | None:
    """Return the announced bytes of a request's content; None if it announces none.

    Raises:
        ValueError: It is not a number, or several numbers.
    """
    found = {value for name, value in headers if name == b"content-length"}
    if not found:
        return None
    (value,) = found
    if not value.isdigit() or len(value) > 18:
        raise ValueError("content-length")
    return int(value)
