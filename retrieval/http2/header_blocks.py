"""Header blocks decoded (RFC 7541), within bounds; those that can come again are remembered.

``hpack`` gives the static table and the Huffman code. Its decoder gives up a block that is too
large and loses the connection's table with it; this one reads on and tells that it was too large,
so that only the call ends that sent it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from retrieval.http2.frames import (
    COMPRESSION_ERROR,
    DEFAULT_TABLE_BYTES,
    MAX_HEADER_BYTES,
    Http2Error,
)
from retrieval.http2.headers import Headers

MAX_FIELDS = 100
"""Header fields of a request; a call with more is refused, and so many cost a control frame."""
FIELD_OVERHEAD_BYTES = 32
"""What a field counts beyond its characters (RFC 7541, section 4.1; RFC 9113, section 6.5.2)."""
CHARGED_BYTES = 512
"""Huffman-coded bytes of a block that cost as much as a control frame."""
CACHED_BYTES = 64 * 2**10
"""Estimated bytes that a connection may remember of decoded header blocks."""
CACHED_BLOCK_BYTES = CACHED_BYTES // 4
"""A block that takes more is decoded each time.

A call's token, which Node sends whole with every call, must fit: to decode it takes 1 ms.
"""
HEADER_OVERHEAD_BYTES = 200
"""Bytes that one remembered header takes beyond its characters; a block takes about two such."""

_STATIC = ((b"", b""), *HeaderTable.STATIC_TABLE)
_STATIC_COUNT = len(_STATIC)

Field = tuple[bytes, bytes]


class HpackDecoder:
    """Decodes the header blocks of one connection, in their order.

    Attributes:
        changed: Whether the last block changed the table.
        fields: How many the last block held.
        huffman_bytes: What it held of Huffman code, which is slow to decode.
    """

    __slots__ = ("_max_bytes", "_table", "_table_bytes", "changed", "fields", "huffman_bytes")

    def __init__(self) -> None:
        self.changed = False
        self.fields = 0
        self.huffman_bytes = 0
        self._table: deque[Field] = deque()  # newest first
        self._table_bytes = 0
        self._max_bytes = DEFAULT_TABLE_BYTES

    def decode(self, block: bytes) -> tuple[Field, ...] | None:
        """Return names and values in order; None if they are more than a request may have.

        Raises:
            Http2Error: The block cannot be decoded; the connection's table is lost with it.
        """
        self.changed = False
        self.huffman_bytes = 0
        try:
            return self._decode(block)
        except (HPACKDecodingError, IndexError, ValueError) as error:
            reason = f"a header block cannot be decoded: {error}"
            raise Http2Error(COMPRESSION_ERROR, reason) from error

    def _decode(self, block: bytes) -> tuple[Field, ...] | None:
        fields: list[Field] = []
        count = 0
        size = 0
        at = 0
        end = len(block)
        while at < end:
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 0x7F)
                field = self._entry(index)
            elif first & 0xE0 == 0x20:
                if count:
                    raise ValueError("a table size after a field")
                max_bytes, at = _integer(block, at, 0x1F)
                self._resize(max_bytes)
                continue
            else:
                field, at = self._literal(block, at)
                if first & 0x40:
                    self._add(field)
            count += 1
            size += FIELD_OVERHEAD_BYTES + len(field[0]) + len(field[1])
            if count <= MAX_FIELDS and size <= MAX_HEADER_BYTES:
                fields.append(field)
        self.fields = count
        return tuple(fields) if count == len(fields) else None

    def _literal(self, block: bytes, at: int) -> tuple[Field, int]:
        index, at = _integer(block, at, 0x3F if block[at] & 0x40 else 0x0F)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = self._string(block, at)
        value, at = self._string(block, at)
        return (name, value), at

    def _string(self, block: bytes, at: int) -> tuple[bytes, int]:
        is_huffman = block[at] & 0x80
        length, at = _integer(block, at, 0x7F)
        end = at + length
        if end > len(block):
            raise ValueError("a string is cut off")
        content = block[at:end]
        if is_huffman:
            self.huffman_bytes += length
            content = bytes(decode_huffman(content))
        return content, end

    def _entry(self, index: int) -> Field:
        if 0 < index < _STATIC_COUNT:
            return _STATIC[index]
        place = index - _STATIC_COUNT
        if not 0 <= place < len(self._table):
            raise ValueError(f"there is no entry {index}")
        return self._table[place]

    def _add(self, field: Field) -> None:
        self.changed = True
        size = FIELD_OVERHEAD_BYTES + len(field[0]) + len(field[1])
        self._evict(self._max_bytes - size)
        if size <= self._max_bytes:
            self._table.appendleft(field)
            self._table_bytes += size

    def _resize(self, max_bytes: int) -> None:
        if max_bytes > DEFAULT_TABLE_BYTES:
            raise ValueError(f"a table of {max_bytes} bytes")
        self.changed = True
        self._max_bytes = max_bytes
        self._evict(max_bytes)

    def _evict(self, room: int) -> None:
        """Drop the oldest entries until those left take at most ``room`` bytes."""
        while self._table_bytes > room and self._table:
            name, value = self._table.pop()
            self._table_bytes -= FIELD_OVERHEAD_BYTES + len(name) + len(value)


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Decode an integer whose prefix is ``mask``; returns it and where it ends."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in (0, 7, 14, 21):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is too long")


class HeaderReader:
    """Decodes the header blocks of one connection; a block that changes no table is remembered.

    Clients send the same few blocks over and over: after the first call of a kind a block is a row
    of table indexes, and decoding it is one look-up.

    Args:
        understand: Makes of names and values, in order, what ``read`` returns and remembers; of
            None, what it returns of a block with more fields or bytes than a request may have. It
            should take no more memory than they do.

    Attributes:
        cost: Control frames that the last block is worth.
    """

    def __init__(
        self, understand: Callable[[Headers | None], Any] = lambda headers: headers
    ) -> None:
        self.cost = 0
        self._decoder = HpackDecoder()
        self._understand = understand
        self._known: dict[bytes, Any] = {}
        self._known_bytes = 0

    def read(self, block: bytes) -> Any:
        """Return what ``understand`` makes of a block's names and values.

        The same object comes back for a block that is known.

        Raises:
            Http2Error: The block cannot be decoded; the connection's header table is lost with it.
        """
        known = self._known.get(block)
        if known is not None:
            self.cost = 0
            return known
        decoder = self._decoder
        headers = decoder.decode(block)
        self.cost = decoder.huffman_bytes // CHARGED_BYTES + decoder.fields // MAX_FIELDS
        found = self._understand(headers)
        if decoder.changed:
            self._forget()
        elif headers is not None:
            self._remember(block, found, memory_bytes(block, headers))
        return found

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
