"""Ends of calls that have no answer: a status, for one call or encoded once for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grpc

from retrieval.http2.frames import END_HEADERS, END_STREAM, FRAME, HEADERS
from retrieval.http2.headers import RESPONSE_BLOCK, status_block


class Aborted(Exception):
    """A call that ends with a status."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str = "",
        trailing: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing = tuple(trailing)


class Refusal(NamedTuple):
    """The whole answer to a call that is refused, ready to send but for the stream's number.

    Attributes:
        start: The first five bytes of the HEADERS frame: length, type, flags.
        block: Response headers and status in one.
        code: What ``block`` says, for other transports; ``message`` and ``trailing`` too.
        pause_seconds: How long the transport may read nothing from this connection afterwards;
            calls wait meanwhile.
        cost: Control frames that the call is charged; 0: its caller did nothing wrong.
    """

    start: bytes
    block: bytes
    code: grpc.StatusCode
    message: str
    trailing: tuple[tuple[str, str | bytes], ...]
    pause_seconds: float = 0.0
    cost: int = 0


def refusal(
    code: grpc.StatusCode,
    message: str,
    trailing: Sequence[tuple[str, str | bytes]] = (),
    pause_seconds: float = 0.0,
) -> Refusal:
    """Encode an answer that is nothing but a status."""
    block = RESPONSE_BLOCK + status_block(code, message, trailing)
    start = FRAME.pack(0, len(block), HEADERS, END_HEADERS | END_STREAM, 0)[:5]
    cost = int(code is grpc.StatusCode.UNAUTHENTICATED)
    return Refusal(start, block, code, message, tuple(trailing), pause_seconds, cost)
