"""Methods that a server knows, and one call of one of them: its message, its deadline, its way out."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import grpc

from retrieval.http2.frames import Metadata, Refusal, metadata_of, timeout_seconds

if TYPE_CHECKING:
    from retrieval.http2.connection import Connection

Headers = Sequence[tuple[bytes, bytes]]


class Aborted(Exception):
    """A handler ended the call with a status."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str = "",
        trailing: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.trailing = code, message, tuple(trailing)


class Method(NamedTuple):
    """One RPC.

    Attributes:
        now: Answers or refuses at once from request bytes and call, or returns None and leaves the
            call to ``later``; never raises.
        later: Unary calls: request bytes and call to response bytes.
        stream: Streaming calls: takes the call, reads ``call.messages()`` or ``call.message``,
            writes with ``call.write``.
        door: Asked when a call's headers are here and its message is not: refuses it, or returns
            None and lets it in; never raises.
        many: Whether ``stream`` reads messages while they come; otherwise it begins, as ``later``
            does, when the one message is here.
    """

    now: Callable[[bytes, Call], bytes | Refusal | None] | None = None
    later: Callable[[bytes, Call], Awaitable[bytes]] | None = None
    stream: Callable[[Call], Awaitable[None]] | None = None
    door: Callable[[], Refusal | None] | None = None
    many: bool = False


class Details(NamedTuple):
    """What ``grpc.GenericRpcHandler.service`` is asked with."""

    method: str
    invocation_metadata: Metadata


class Head(NamedTuple):
    """A request's headers, understood.

    ``refusal``: an HTTP status or a gRPC one for what cannot be served.
    """

    method: Method
    timeout: float | None
    metadata: Metadata
    compression: str
    refusal: int | Aborted | None


NOTHING = Method()


class Methods:
    """Finds methods by path among the handlers that were registered, as ``grpc.aio.Server`` does."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, Method] = {}

    def add(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register handlers; the first that knows a path serves it."""
        self._handlers.extend(handlers)

    def find(self, path: str, metadata: Metadata) -> Method | None:
        """The method at a path, or None."""
        known = self._known.get(path)
        if known is None:
            for handler in self._handlers:
                found = handler.service(Details(path, metadata))
                if found is not None:
                    known = self._known[path] = _adapt(found)
                    break
        return known

    def head(self, headers: Headers) -> Head:
        """Understand the headers of a request."""
        fields = dict(headers)
        if fields.get(b":method") != b"POST":
            return Head(NOTHING, None, (), "", 405)
        if not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            return Head(NOTHING, None, (), "", 415)
        try:
            metadata = metadata_of(headers)
        except ValueError as error:
            return Head(
                NOTHING,
                None,
                (),
                "",
                Aborted(grpc.StatusCode.INVALID_ARGUMENT, f"metadata: {error}"),
            )
        timeout = None
        if b"grpc-timeout" in fields:
            timeout = timeout_seconds(fields[b"grpc-timeout"].decode("latin-1"))
            if timeout is None:
                return Head(
                    NOTHING,
                    None,
                    (),
                    "",
                    Aborted(
                        grpc.StatusCode.INVALID_ARGUMENT, "grpc-timeout: not a number with a unit"
                    ),
                )
        path = fields.get(b":path", b"").decode("latin-1")
        method = self.find(path, metadata)
        if method is None:
            return Head(
                NOTHING,
                None,
                (),
                "",
                Aborted(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path[:200]}"),
            )
        return Head(
            method,
            timeout,
            metadata,
            fields.get(b"grpc-encoding", b"identity").decode("latin-1"),
            None,
        )


def _adapt(handler: Any) -> Method:
    """A grpc handler with deserializer and serializer as a method over bytes."""
    parse: Callable[[bytes], Any] = handler.request_deserializer or (lambda content: content)
    pack: Callable[[Any], bytes] = handler.response_serializer or (lambda message: message)
    if not handler.request_streaming and not handler.response_streaming:
        behaviour = handler.unary_unary
        if handler.request_deserializer is None and handler.response_serializer is None:
            return Method(
                getattr(behaviour, "now", None), behaviour, None, getattr(behaviour, "door", None)
            )

        async def later(content: bytes, call: Call) -> bytes:
            return pack(await behaviour(_parsed(parse, content), call))

        return Method(None, later)

    async def requests(call: Call) -> AsyncIterator[Any]:
        async for content in call.messages():
            yield _parsed(parse, content)

    async def stream(call: Call) -> None:
        call.pack = pack
        if handler.request_streaming:
            behaviour, request = handler.stream_stream or handler.stream_unary, requests(call)
        else:
            assert call.message is not None, "a call of one message begins with it"
            behaviour, request = handler.unary_stream, _parsed(parse, call.message)
        answers = behaviour(request, call)
        if hasattr(answers, "__aiter__"):
            async for answer in answers:
                await call.write(answer)
        else:
            last = await answers
            if last is not None:
                await call.write(last)

    return Method(stream=stream, many=handler.request_streaming)


def _parsed(parse: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return parse(content)
    except Exception as error:
        raise Aborted(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the bytes are not the message of this method ({error}).",
        ) from error


class Call:
    """One call on one stream; handlers see it as their gRPC context."""

    __slots__ = (
        *(
            "body",
            "connection",
            "ended",
            "ends",
            "finishing",
            "head",
            "held",
            "message",
            "pack",
            "pending",
            "queue",
            "queued",
            "responding",
            "stream",
        ),
        *("task", "timer", "window"),
    )

    def __init__(self, connection: Connection, stream: int, head: Head) -> None:
        self.connection = connection
        self.stream = stream
        self.head = head
        self.ends = None if head.timeout is None else time.monotonic() + head.timeout
        self.body: bytes | bytearray = b""  # of a message that is not whole yet
        self.message: bytes | None = (
            None  # whole; kept and counted until the answer is here, as the method holds it
        )
        self.ended = False  # the client has sent all
        self.task: asyncio.Task[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.window = 0  # what this stream may send beyond (or short of) the peer's initial window
        self.pending: bytes | bytearray = b""  # waits for the peer's window
        self.held = 0  # bytes in body, message, queue and pending that the connection has counted
        self.responding = False  # response headers are out
        self.finishing = False  # all is in pending; trailers follow it
        self.queue: asyncio.Queue[bytes | None] | None = None
        self.queued = 0  # bytes in queue
        self.pack: Callable[[Any], bytes] | None = None

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        return None if self.ends is None else self.ends - time.monotonic()

    def invocation_metadata(self) -> Metadata:
        """The request's metadata."""
        return self.head.metadata

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """Leave with a status."""
        raise Aborted(code, details, trailing_metadata)

    async def write(self, message: Any) -> None:
        """Send one message of a streaming answer."""
        self.connection.send_message(self, self.pack(message) if self.pack is not None else message)

    async def messages(self) -> AsyncIterator[bytes]:
        """The messages of a streaming request."""
        assert self.queue is not None, "only calls of many messages have a queue"
        while (content := await self.queue.get()) is not None:
            self.connection.took(self, len(content))
            yield content

    def drop(self) -> None:
        """Stop the work and the clock of a call that nobody waits for any more."""
        if self.timer is not None:
            self.timer.cancel()
        if self.task is not None:
            self.task.cancel()


def take_messages(body: bytearray, compression: str, max_bytes: int) -> list[bytes]:
    """Cut whole messages off the front of ``body``.

    Raises:
        Aborted: One is too large, or compressed in a way that is not known.
    """
    found: list[bytes] = []
    while len(body) >= 5:
        length = int.from_bytes(body[1:5], "big")
        if length > max_bytes:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message may have {max_bytes} bytes, but {length} were announced.",
            )
        if len(body) < 5 + length:
            break
        content = bytes(body[5 : 5 + length])
        if body[0]:
            content = _inflated(content, compression, max_bytes)
        del body[: 5 + length]
        found.append(content)
    return found


def _inflated(content: bytes, compression: str, max_bytes: int) -> bytes:
    if compression not in ("gzip", "deflate"):
        raise Aborted(
            grpc.StatusCode.UNIMPLEMENTED,
            f"compression {compression[:40]!r} is not known; send gzip, deflate or identity.",
        )
    reader = zlib.decompressobj(31 if compression == "gzip" else 15)
    try:
        plain = reader.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise Aborted(
            grpc.StatusCode.INVALID_ARGUMENT, f"the message cannot be decompressed: {error}"
        ) from error
    if len(plain) > max_bytes:
        raise Aborted(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"a message may have {max_bytes} bytes, but this one grows beyond that.",
        )
    if not reader.eof:
        raise Aborted(grpc.StatusCode.INVALID_ARGUMENT, "the compressed message is cut off.")
    return plain
