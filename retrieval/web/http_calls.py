"""Calls of the service that come over HTTP: their context, their body, their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from starlette.requests import Request

from retrieval.http2.calls import UnaryHandler
from retrieval.http2.refusals import Refusal
from retrieval.status import status_for
from retrieval.web.http_errors import CallFailed, Trailing

DEFAULT_SECONDS = 60.0
"""Deadline of a call that sets none."""
MAX_HELD_BYTES = 64 * 2**20
"""Bodies of all requests of a port together."""
SMALL_BODY_BYTES = 32 * 2**10
"""A body of at most so many is read whatever the others hold: slow uploads refuse no question."""


class ClientGone(Exception):
    """The client has closed its connection: nobody reads an answer."""


class HttpContext:
    """Takes the place of a gRPC context, so that rights, limits and metrics hold over HTTP, too.

    Args:
        request: Whose headers are the metadata.
        seconds: Until its deadline.
    """

    def __init__(self, request: Request, seconds: float) -> None:
        self._request = request
        self._deadline = time.monotonic() + seconds
        self._metadata: tuple[tuple[str, str], ...] | None = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the request's headers."""
        if self._metadata is None:
            self._metadata = tuple(self._request.headers.items())
        return self._metadata

    def time_remaining(self) -> float:
        """Return the seconds until the deadline."""
        return self._deadline - time.monotonic()

    def peer(self) -> str:
        """Return the address of the caller, as gRPC writes it."""
        client = self._request.client
        if client is None:
            return "unknown"
        return (
            f"ipv6:[{client.host}]:{client.port}"
            if ":" in client.host
            else (f"ipv4:{client.host}:{client.port}")
        )

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailing = (), /
    ) -> NoReturn:
        """End the call with a status."""
        raise CallFailed(code, details, trailing_metadata)


class BodyBudget:
    """Bytes of request bodies that a port holds at a time.

    Args:
        max_held: Of all together; small ones are counted, but never refused.
    """

    def __init__(self, max_held: int = MAX_HELD_BYTES) -> None:
        self._max_held = max_held
        self.held = 0

    @asynccontextmanager
    async def body_of(self, request: Request, max_bytes: int) -> AsyncIterator[bytes]:
        """Read a request's body of at most so many bytes and hold it until the block ends.

        Raises:
            CallFailed: It is too large, or all bodies together are.
            ClientGone: The client went before its end.
        """
        announced = int(request.headers.get("content-length", "0"))
        if announced > max_bytes:
            raise _too_large(max_bytes, f"{announced} were announced")
        content = bytearray()
        try:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                if len(content) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes, "more came")
                is_small = len(content) + len(chunk) <= SMALL_BODY_BYTES
                if not is_small and self.held + len(chunk) > self._max_held:
                    raise CallFailed(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"requests: all {self._max_held} bytes for them are taken. Try again in"
                        " 100 ms, with jitter.",
                        (("retry-after-ms", "100"),),
                    )
                content += chunk
                self.held += len(chunk)
                if not message.get("more_body", False):
                    break
            yield bytes(content)
        finally:
            self.held -= len(content)


def _too_large(max_bytes: int, got: str) -> CallFailed:
    return CallFailed(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"a message may have {max_bytes} bytes, but {got}. Split the request.",
    )


async def answer_call(
    handler: UnaryHandler, content: bytes, context: HttpContext, request: Request
) -> bytes:
    """Answer one unary call, as the gRPC port does.

    Args:
        handler: Of the method.
        content: The serialised request.
        context: Of the call.
        request: Watched for a client that goes away; its work is dropped then.

    Raises:
        CallFailed: The call ended with a status.
        ClientGone: Nobody reads its answer.
    """
    if handler.answer_now is not None:
        answer = handler.answer_now(content, context)
        if isinstance(answer, Refusal):
            raise CallFailed(answer.code, answer.message, answer.trailing)
        if answer is not None:
            return answer
    return await _while_connected(handler.answer_later(content, context), context, request)


async def _while_connected(work: Awaitable[bytes], context: HttpContext, request: Request) -> bytes:
    """Run a call until it is answered, its client has gone, or its time is over."""
    working = asyncio.ensure_future(work)
    listening: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(
            (working, listening),
            timeout=max(0.0, context.time_remaining()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if working.done():
            return working.result()
        if listening.done():
            raise ClientGone
        raise CallFailed(
            grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed; the work was dropped."
        )
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


def failure_of(error: Exception) -> CallFailed:
    """Return the status of an error outside a handler."""
    return CallFailed(*status_for(error))
