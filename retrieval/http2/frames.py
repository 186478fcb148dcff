"""HTTP/2 frames and header blocks as bytes (RFC 9113, RFC 7541, gRPC over HTTP/2).

No state but the header table of one connection.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grpc
import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

(
    DATA,
    HEADERS,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    PUSH_PROMISE,
    PING,
    GOAWAY,
    WINDOW_UPDATE,
    CONTINUATION,
) = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITISED = 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED = 0, 1, 2, 3, 5
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 6, 7, 8, 9, 11

(
    HEADER_TABLE_SIZE,
    ENABLE_PUSH,
    MAX_CONCURRENT_STREAMS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
) = (
    1,
    2,
    3,
    4,
    5,
    6,
)

DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_BYTES = 16_384
MAX_WINDOW = 2**31 - 1
MAX_HEADER_BYTES = 16_384
KEPT_BYTES = 64 * 2**10
"""What a connection remembers of header blocks may weigh this much."""
KEPT_BLOCK_BYTES = KEPT_BYTES // 4
"""One that weighs more is decoded each time.

A call's token, which Node sends whole with every call, must fit: to decode it takes 1 ms.
"""
HEADER_WEIGHT = 200
"""Bytes that one remembered header takes beyond its characters; a block takes about two such weights."""

FRAME = struct.Struct(">BHBBL")
"""Length (high byte, low two), type, flags, stream."""
FRAME_AND_PREFIX = struct.Struct(">BHBBLBL")
"""A DATA frame's header and gRPC's message prefix: compressed flag and length."""

TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
TIMEOUT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

Metadata = tuple[tuple[str, str | bytes], ...]


class WireError(Exception):
    """The peer broke the protocol; the connection ends with this HTTP/2 error code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    length = len(payload)
    return FRAME.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(
        SETTINGS, 0, 0, b"".join(struct.pack(">HL", key, value) for key, value in values.items())
    )


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def literal(name: bytes, value: bytes) -> bytes:
    """One header, neither Huffman-coded nor remembered by the peer, so that every block stands alone."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    count = len(text)
    if count < 127:
        return bytes((count,))
    out, count = bytearray((127,)), count - 127
    while count >= 128:
        out.append(count % 128 + 128)
        count //= 128
    out.append(count)
    return bytes(out)


STATUS_200 = b"\x88"
CONTENT_TYPE = literal(b"content-type", b"application/grpc")
RESPONSE_BLOCK = STATUS_200 + CONTENT_TYPE
OK_BLOCK = literal(b"grpc-status", b"0")
RESPONSE_START = FRAME.pack(0, len(RESPONSE_BLOCK), HEADERS, END_HEADERS, 0)[:5]
OK_START = FRAME.pack(0, len(OK_BLOCK), HEADERS, END_HEADERS | END_STREAM, 0)[:5]


def percent_encoded(message: str) -> bytes:
    """A status message as gRPC sends it; at most 1,000 characters."""
    if message.isascii() and message.isprintable() and "%" not in message:
        return message[:1000].encode()
    return b"".join(
        bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in message[:1000].encode("utf-8", "replace")
    )


def status_block(
    code: grpc.StatusCode, message: str, trailing: Iterable[tuple[str, str | bytes]]
) -> bytes:
    """The trailers of a failed call."""
    block = literal(b"grpc-status", str(code.value[0]).encode())
    if message:
        block += literal(b"grpc-message", percent_encoded(message))
    for key, value in trailing:
        if isinstance(value, bytes):
            value = (
                base64.b64encode(value).rstrip(b"=").decode()
                if key.endswith("-bin")
                else value.decode("latin-1")
            )
        block += literal(key.encode(), value.encode("latin-1", "replace"))
    return block


class Refusal(NamedTuple):
    """The whole answer to a call that is not taken in, ready to send but for the stream's number.

    Attributes:
        start: The first five bytes of the HEADERS frame: length, type, flags.
        block: Response headers and status in one.
        code: What ``block`` says, for other transports; ``message`` and ``trailing`` too.
        pause_seconds: How long the transport may read nothing from this connection afterwards;
            calls wait meanwhile.
    """

    start: bytes
    block: bytes
    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str | bytes], ...]
    pause_seconds: float = 0.0


def refusal(
    code: grpc.StatusCode,
    message: str,
    trailing: Sequence[tuple[str, str | bytes]] = (),
    pause_seconds: float = 0.0,
) -> Refusal:
    """Encode an answer that is nothing but a status."""
    block = RESPONSE_BLOCK + status_block(code, message, trailing)
    start = FRAME.pack(0, len(block), HEADERS, END_HEADERS | END_STREAM, 0)[:5]
    return Refusal(start, block, code, message, tuple(trailing), pause_seconds)


def timeout_seconds(text: str) -> float | None:
    """A ``grpc-timeout`` in seconds; None if it is malformed."""
    found = TIMEOUT.fullmatch(text)
    return float(found[1]) * TIMEOUT_SECONDS[found[2]] if found else None


class HeaderReader:
    """Decodes the header blocks of one connection; what left the dynamic table as it was is remembered as a whole.

    Clients send the same few blocks over and over: after the first call of a kind a block is a row
    of table indexes, and decoding it is one look-up.

    Args:
        understand: Makes of names and values, in order, what ``read`` returns and remembers; it
            should weigh no more than they do.
    """

    def __init__(
        self, understand: Callable[[tuple[tuple[bytes, bytes], ...]], Any] = tuple
    ) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._understand = understand
        self._known: dict[bytes, Any] = {}
        self._weight = 0

    def read(self, block: bytes) -> Any:
        """Names and values, in order, or what was made of them.

        The same object comes back for a block that is known.

        Raises:
            WireError: The block cannot be decoded; the connection's header table is lost with it.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table
        before = (next(iter(table.dynamic_entries), None), table.maxsize)
        try:
            headers = tuple(
                (bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)
            )
        except (hpack.HPACKError, IndexError, ValueError) as error:
            raise WireError(
                COMPRESSION_ERROR, f"a header block cannot be decoded: {error}"
            ) from error
        after = (next(iter(table.dynamic_entries), None), table.maxsize)
        found = self._understand(headers)
        if before[0] is not after[0] or before[1] != after[1]:
            self._forget()
        else:
            self._remember(block, found, weight_of(block, headers))
        return found

    def _remember(self, block: bytes, found: Any, weight: int) -> None:
        if weight > KEPT_BLOCK_BYTES:
            return
        if self._weight + weight > KEPT_BYTES:
            self._forget()
        self._known[block] = found
        self._weight += weight

    def _forget(self) -> None:
        self._known.clear()
        self._weight = 0


def weight_of(block: bytes, headers: Sequence[tuple[bytes, bytes]]) -> int:
    """About how many bytes a header block, and what is made of it, take in memory."""
    return (
        len(block)
        + sum(len(name) + len(value) for name, value in headers)
        + HEADER_WEIGHT * (len(headers) + 2)
    )


def metadata_of(headers: Sequence[tuple[bytes, bytes]]) -> Metadata:
    """What a handler may see: everything but pseudo headers; values of ``-bin`` names as bytes.

    Raises:
        ValueError: A ``-bin`` value is not base64.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith(b":"):
            continue
        key = name.decode("latin-1")
        if key.endswith("-bin"):
            try:
                found.append(
                    (key, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True))
                )
            except binascii.Error as error:
                raise ValueError(f"{key}: {error}") from error
        else:
            found.append((key, value.decode("latin-1")))
    return tuple(found)
