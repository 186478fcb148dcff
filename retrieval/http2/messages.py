"""gRPC messages in the bytes of a stream: cut apart, and inflated within bounds."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import grpc

from retrieval.http2.calls import PREFIX_BYTES
from retrieval.http2.refusals import Aborted

MAX_INFLATION = 100
"""Times that a compressed message may grow; text of search traffic grows about tenfold."""
FREE_INFLATION_BYTES = 256 * 2**10
"""A message may grow to this whatever its ratio."""


class Message(NamedTuple):
    """One message as it came."""

    content: bytes
    is_compressed: bool


def take_messages(body: bytearray, max_bytes: int) -> list[Message]:
    """Cut whole messages off the front of ``body``.

    Raises:
        Aborted: One is too large.
    """
    found: list[Message] = []
    at = 0
    while len(body) - at >= PREFIX_BYTES:
        length = int.from_bytes(body[at + 1 : at + PREFIX_BYTES], "big")
        if length > max_bytes:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message may have {max_bytes} bytes in this call, but {length} were announced.",
            )
        end = at + PREFIX_BYTES + length
        if len(body) < end:
            break
        found.append(Message(bytes(body[at + PREFIX_BYTES : end]), bool(body[at])))
        at = end
    del body[:at]
    return found


def inflated(content: bytes, compression: str, max_bytes: int) -> bytes:
    """Decompress one message, never beyond ``max_bytes`` or ``MAX_INFLATION``.

    Raises:
        Aborted: It is larger, not whole, or compressed in a way that is not known.
    """
    if compression not in ("gzip", "deflate"):
        raise Aborted(
            grpc.StatusCode.UNIMPLEMENTED,
            f"compression {compression[:40]!r} is not known; send gzip, deflate or identity.",
        )
    allowed = min(max_bytes, max(FREE_INFLATION_BYTES, MAX_INFLATION * len(content)))
    reader = zlib.decompressobj(31 if compression == "gzip" else 15)
    try:
        plain = reader.decompress(content, allowed + 1)
    except zlib.error as error:
        raise Aborted(
            grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be decompressed: {error}"
        ) from error
    if len(plain) > allowed:
        del plain, reader  # the error's traceback holds this frame
        raise Aborted(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"a message may have {max_bytes} bytes in this call, and {MAX_INFLATION} times those of"
            f" its compressed form, but this one grows beyond {allowed}.",
        )
    if not reader.eof:
        raise Aborted(grpc.StatusCode.INVALID_ARGUMENT, "the compressed message is cut off.")
    return plain
