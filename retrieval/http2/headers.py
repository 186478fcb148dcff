"""Header blocks of gRPC over HTTP/2 as bytes (RFC 7541), and what requests say in them.

``HeaderReader`` alone holds state: the header table of one connection.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import hpack

from retrieval.http2.frames import COMPRESSION_ERROR, MAX_HEADER_BYTES, Http2Error

CACHED_BYTES = 64 * 2**10
"""Estimated bytes that a connection may remember of decoded header blocks."""
CACHED_BLOCK_BYTES = CACHED_BYTES // 4
"""A block that takes more is decoded each time.

A call's token, which Node sends whole with every call, must fit: to decode it takes 1 ms.
"""
HEADER_OVERHEAD_BYTES = 200
"""Bytes that one remembered header takes beyond its characters; a block takes about two such."""

TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
TIMEOUT_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
MAX_MESSAGE_CHARACTERS = 1000

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
    for key, value in trailing:
        block += literal(key.encode(), _trailer_value(key, value))
    return block


def _trailer_value(key: str, value: str | bytes) -> bytes:
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


class HeaderReader:
    """Decodes the header blocks of one connection; a block that changes no table is remembered.

    Clients send the same few blocks over and over: after the first call of a kind a block is a row
    of table indexes, and decoding it is one look-up.

    Args:
        understand: Makes of names and values, in order, what ``read`` returns and remembers; it
            should take no more memory than they do.
    """

    def __init__(
        self, understand: Callable[[tuple[tuple[bytes, bytes], ...]], Any] = tuple
    ) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._understand = understand
        self._known: dict[bytes, Any] = {}
        self._known_bytes = 0

    def read(self, block: bytes) -> Any:
        """Return names and values, in order, or what ``understand`` makes of them.

        The same object comes back for a block that is known.

        Raises:
            Http2Error: The block cannot be decoded; the connection's header table is lost with it.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        table_before = self._table()
        try:
            headers = tuple(
                (bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)
            )
        except (hpack.HPACKError, IndexError, ValueError) as error:
            reason = f"a header block cannot be decoded: {error}"
            raise Http2Error(COMPRESSION_ERROR, reason) from error
        newest, max_bytes = self._table()
        found = self._understand(headers)
        if newest is not table_before[0] or max_bytes != table_before[1]:
            self._forget()
        else:
            self._remember(block, found, memory_bytes(block, headers))
        return found

    def _table(self) -> tuple[Any, int]:
        """Return the newest entry and the size of the table; a change of it changes one of them."""
        table = self._decoder.header_table
        return next(iter(table.dynamic_entries), None), table.maxsize

    def _remember(self, block: bytes, found: Any, size: int) -> None:
        if size > CACHED_BLOCK_BYTES:
            return
        if self._known_bytes + size > CACHED_BYTES:
            self._forget()
        self._known[block] = found
        self._known_bytes += size

    def _forget(self) -> None:
        self._known.clear()
        self._known_bytes = 0


def memory_bytes(block: bytes, headers: Headers) -> int:
    """Estimate how many bytes a header block, and what is made of it, take in memory."""
    characters = sum(len(name) + len(value) for name, value in headers)
    return len(block) + characters + HEADER_OVERHEAD_BYTES * (len(headers) + 2)
