"""Methods that a server knows, and calls of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import grpc

from retrieval.http2.frames import PROTOCOL_ERROR
from retrieval.http2.headers import (
    Headers,
    Metadata,
    are_well_formed,
    content_length,
    is_grpc,
    is_request,
    metadata_of,
    timeout_seconds,
)
from retrieval.http2.refusals import Aborted, Refusal

PREFIX_BYTES = 5
"""Before each message of a stream: a compressed flag, and the length in four bytes."""
WRITE_AHEAD_BYTES = 64 * 2**10
"""A handler that writes a stream waits while more of it is unsent."""
IDENTITY_KEYS = ("x509_subject_alternative_name", "x509_common_name")


class Method(NamedTuple):
    """One RPC.

    Attributes:
        answer_now: Unary calls: answers or refuses at once from request bytes and call, or returns
            None and leaves the call to ``answer_later``; never raises.
        answer_later: Unary calls: request bytes and call to response bytes.
        stream: Streaming calls: takes the call, reads ``call.messages()`` or ``call.message``,
            writes with ``call.write``.
        refuse: Called with a call's metadata when its message is not here yet: returns its refusal,
            or None to admit it; never raises.
        max_bytes: Of a request message; 0: as many as the server takes of any method.
        client_streaming: Whether ``stream`` reads messages while they arrive; otherwise it begins,
            as ``answer_later`` does, when the one message is here.
        is_http: Whether it answers requests that are no gRPC calls: its messages are the pieces of
            a body, and it answers with ``Writer.send_http``.
    """

    answer_now: Callable[[bytes, Call], bytes | Refusal | None] | None = None
    answer_later: Callable[[bytes, Call], Awaitable[bytes]] | None = None
    stream: Callable[[Call], Awaitable[None]] | None = None
    refuse: Callable[[Metadata], Refusal | None] | None = None
    max_bytes: int = 0
    client_streaming: bool = False
    is_http: bool = False


NO_METHOD = Method()


class Head(NamedTuple):
    """A request's headers, understood.

    Attributes:
        method: What is called.
        timeout: Seconds until the caller's deadline; None without one.
        metadata: As handlers see it.
        compression: Of the request's messages.
        error: An HTTP status or a gRPC one, of a request that cannot be served.
        reset: An error code of HTTP/2, of headers that are not a request's.
        is_trailers: Whether the headers may end a request.
        content_length: Bytes of content that the request announces; None: it does not say.
        fields: All of them as they came, of a request that is no gRPC call.
    """

    method: Method = NO_METHOD
    timeout: float | None = None
    metadata: Metadata = ()
    compression: str = "identity"
    error: int | Aborted | None = None
    reset: int | None = None
    is_trailers: bool = False
    content_length: int | None = None
    fields: Headers = ()


class Writer(Protocol):
    """The side of a connection that a call's handler reaches.

    Attributes:
        peer: The client's address, as gRPC writes it.
        auth_context: What its certificate says; empty without one.
    """

    peer: str
    auth_context: dict[str, list[bytes]]

    def is_open(self, call: Call) -> bool:
        """Return whether a call has not ended."""

    def begin(self, call: Call, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Send the headers of a call's answer, if they have not been sent."""

    def send_message(self, call: Call, message: bytes) -> None:
        """Send one message of a call's answer, as far as the peer's windows allow."""

    def send_http(self, call: Call, block: bytes, content: bytes, cost: int) -> None:
        """Send header block and content of an answer that is not gRPC's; charge for the request."""

    def message_taken(self, call: Call, size: int) -> None:
        """Count no more a message of this size that a handler has taken off the call's queue."""


class Outcome:
    """What a handler has said about the end of its call, and who waits for it."""

    __slots__ = ("callbacks", "code", "details", "drained", "trailing")

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.trailing: tuple[tuple[str, str | bytes], ...] = ()
        self.callbacks: list[Callable[[Call], None]] = []
        self.drained: asyncio.Future[None] | None = None  # the writer of a stream waits

    def refuses(self) -> bool:
        """Return whether the call fails although its handler has returned."""
        return self.code is not grpc.StatusCode.OK

    def wake(self) -> None:
        """Let the writer of a stream go on."""
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)


class Call:
    """One call on one stream; handlers see it as their gRPC context.

    It has what ``grpc.aio.ServicerContext`` and ``grpc.ServicerContext`` have, but for ``read``
    (handlers iterate) and for compression of answers, which is never used.
    """

    __slots__ = (
        "body",
        "deadline",
        "ended",
        "finishing",
        "head",
        "held",
        "is_cancelled",
        "is_compressed",
        "message",
        "outcome",
        "pack",
        "pending",
        "queue",
        "queued",
        "received",
        "responding",
        "stream",
        "task",
        "timer",
        "window",
        "writer",
    )

    def __init__(self, writer: Writer, stream: int, head: Head) -> None:
        self.writer = writer
        self.stream = stream
        self.head = head
        self.deadline = None if head.timeout is None else time.monotonic() + head.timeout
        self.body: bytes | bytearray = b""  # of a message that is not whole yet
        self.message: bytes | None = None  # whole; held until the answer is here
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
        self.received = 0  # bytes of content, where the request announces how many
        self.is_compressed = False  # the message is
        self.is_cancelled = False
        self.outcome: Outcome | None = None

    def time_remaining(self) -> float | None:
        """Return the seconds until the caller's deadline; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def invocation_metadata(self) -> Metadata:
        """Return the request's metadata."""
        return self.head.metadata

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """End the call with a status."""
        raise Aborted(code, details, trailing_metadata)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with a status in one object."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    async def write(self, message: Any) -> None:
        """Send one message of a streaming answer; waits for a client that does not read."""
        self.writer.send_message(self, self.pack(message) if self.pack is not None else message)
        while len(self.pending) > WRITE_AHEAD_BYTES and self.writer.is_open(self):
            outcome = self._outcome()
            outcome.drained = asyncio.get_running_loop().create_future()
            await outcome.drained

    # --- what handlers and interceptors expect of a context ---

    def _outcome(self) -> Outcome:
        if self.outcome is None:
            self.outcome = Outcome()
        return self.outcome

    def peer(self) -> str:
        """Return the client's address, e.g. ``ipv4:127.0.0.1:40000``."""
        return self.writer.peer

    def auth_context(self) -> dict[str, list[bytes]]:
        """Return what the client's certificate says; empty without one."""
        return self.writer.auth_context

    def peer_identity_key(self) -> str | None:
        """Return which entry of ``auth_context`` names the client, or None."""
        return next((key for key in IDENTITY_KEYS if key in self.writer.auth_context), None)

    def peer_identities(self) -> list[bytes] | None:
        """Return the client's names, or None."""
        key = self.peer_identity_key()
        return None if key is None else self.writer.auth_context[key]

    def cancelled(self) -> bool:
        """Return whether the client has given the call up, or its deadline has passed."""
        return self.is_cancelled

    def done(self) -> bool:
        """Return whether the call has ended."""
        return not self.writer.is_open(self)

    def is_active(self) -> bool:
        """Return whether the call goes on."""
        return self.writer.is_open(self)

    def cancel(self) -> bool:
        """Stop the work and end the call with CANCELLED; returns whether it went on until now."""
        if self.task is None or not self.writer.is_open(self):
            return False
        self.is_cancelled = True
        return self.task.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Have ``callback`` called when the work has ended; False: the call has ended already."""
        if not self.writer.is_open(self):
            return False
        self.add_done_callback(lambda call: callback())
        return True

    def add_done_callback(self, callback: Callable[[Call], None]) -> None:
        """Have ``callback`` called with this call when its work has ended."""
        self._outcome().callbacks.append(callback)

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Send the headers of the answer now, with this metadata."""
        self.writer.begin(self, metadata)

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Send this metadata with the status."""
        self._outcome().trailing = tuple(metadata)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the metadata that is sent with the status."""
        return () if self.outcome is None else self.outcome.trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """End the call with this status when its handler returns."""
        self._outcome().code = code

    def code(self) -> grpc.StatusCode:
        """Return the status that the handler has set."""
        return grpc.StatusCode.OK if self.outcome is None else self.outcome.code

    def set_details(self, details: str) -> None:
        """Send this text with the status."""
        self._outcome().details = details

    def details(self) -> str:
        """Return the text that the handler has set."""
        return "" if self.outcome is None else self.outcome.details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Do nothing: answers are sent as they are."""

    def disable_next_message_compression(self) -> None:
        """Do nothing: answers are sent as they are."""

    # --- what the transport does with it ---

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield the messages of a streaming request."""
        assert self.queue is not None, "only calls of many messages have a queue"
        while (content := await self.queue.get()) is not None:
            self.writer.message_taken(self, len(content))
            yield content

    def add_message(self, message: bytes) -> None:
        """Queue a message of a call of many; any other call has one.

        Raises:
            Aborted: A second message of a call of one.
        """
        if self.queue is not None:
            self.queue.put_nowait(message)
            self.queued += len(message)
        elif self.message is None:
            self.message = message
        else:
            raise Aborted(
                grpc.StatusCode.INVALID_ARGUMENT, "expected one message, but got several."
            )

    def size_bytes(self) -> int:
        """Count the bytes that the connection holds for this call."""
        return len(self.body) + len(self.message or b"") + self.queued + len(self.pending)

    def drop(self) -> None:
        """Stop the work and the timer of a call that nobody waits for any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.task is not None:
            self.task.cancel()
            self.task = None  # a task that holds its call must not be held by it


class UnaryHandler:
    """A unary method over bytes that this transport may answer, or refuse, without a task.

    Has the attributes of ``grpc.RpcMethodHandler``, so that any gRPC server takes it and calls
    ``unary_unary``; this transport calls the other functions, where there are any.

    Args:
        unary_unary: Answers a call, however long that takes.
        answer_now: As in ``Method``.
        answer_later: What ``unary_unary`` does after ``answer_now``; by default all of it.
        refuse: As in ``Method``.
        max_bytes: As in ``Method``.
    """

    request_streaming = False
    response_streaming = False
    request_deserializer = None
    response_serializer = None
    unary_stream = None
    stream_unary = None
    stream_stream = None

    def __init__(
        self,
        unary_unary: Callable[[bytes, Any], Awaitable[bytes]],
        *,
        answer_now: Callable[[bytes, Any], bytes | Refusal | None] | None = None,
        answer_later: Callable[[bytes, Any], Awaitable[bytes]] | None = None,
        refuse: Callable[[Metadata], Refusal | None] | None = None,
        max_bytes: int = 0,
    ) -> None:
        self.unary_unary = unary_unary
        self.answer_now = answer_now
        self.answer_later = answer_later or unary_unary
        self.refuse = refuse
        self.max_bytes = max_bytes


class HandlerCallDetails(NamedTuple):
    """Argument of ``grpc.GenericRpcHandler.service``."""

    method: str
    invocation_metadata: Metadata


MALFORMED = Head(reset=PROTOCOL_ERROR)
TRAILERS = Head(reset=PROTOCOL_ERROR, is_trailers=True)
TOO_MANY_HEADERS = Head(
    error=Aborted(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "expected at most 100 header fields of 16 KiB together, but got more. Send less metadata.",
    )
)


def _invalid(code: grpc.StatusCode, message: str) -> Head:
    return Head(error=Aborted(code, message))


class MethodTable:
    """Finds methods by path among the registered handlers, as ``grpc.aio.Server`` does."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, Method] = {}
        self._http: Method | None = None

    def add(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register handlers; the first that knows a path serves it."""
        self._handlers.extend(handlers)

    def serve_http(self, method: Method) -> None:
        """Have this method answer all requests that are no gRPC calls."""
        self._http = method

    def find(self, path: str, metadata: Metadata) -> Method | None:
        """Return the method at a path, or None."""
        known = self._known.get(path)
        if known is None:
            for handler in self._handlers:
                found = handler.service(HandlerCallDetails(path, metadata))
                if found is not None:
                    known = self._known[path] = _adapt(found)
                    break
        return known

    def read_head(self, headers: Headers | None) -> Head:
        """Understand the headers of a request; None: they are more than it may have."""
        if headers is None:
            return TOO_MANY_HEADERS
        if not are_well_formed(headers):
            return MALFORMED
        if not any(name.startswith(b":") for name, _ in headers):
            return TRAILERS
        if not is_request(headers):
            return MALFORMED
        try:
            length = content_length(headers)
        except ValueError:
            return MALFORMED
        return self._read_request(headers)._replace(content_length=length)

    def _read_request(self, headers: Headers) -> Head:
        fields = dict(headers)
        if not is_grpc(fields.get(b"content-type", b"")):
            if self._http is None or b":path" not in fields:
                return Head(error=415)
            return Head(self._http, fields=headers)
        if fields.get(b":method") != b"POST":
            return Head(error=405)
        try:
            metadata = metadata_of(headers)
        except ValueError as error:
            return _invalid(grpc.StatusCode.INVALID_ARGUMENT, f"metadata: {error}")
        timeout = None
        if b"grpc-timeout" in fields:
            timeout = timeout_seconds(fields[b"grpc-timeout"].decode("latin-1"))
            if timeout is None:
                reason = "grpc-timeout: not a number with a unit"
                return _invalid(grpc.StatusCode.INVALID_ARGUMENT, reason)
        path = fields.get(b":path", b"").decode("latin-1")
        method = self.find(path, metadata)
        if method is None:
            return _invalid(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path[:200]}")
        compression = fields.get(b"grpc-encoding", b"identity").decode("latin-1")
        return Head(method, timeout, metadata, compression)


def _adapt(handler: Any) -> Method:
    """Turn a grpc handler with deserializer and serializer into a method over bytes."""
    if isinstance(handler, UnaryHandler):
        return Method(
            answer_now=handler.answer_now,
            answer_later=handler.answer_later,
            refuse=handler.refuse,
            max_bytes=handler.max_bytes,
        )
    parse: Callable[[bytes], Any] = handler.request_deserializer or (lambda content: content)
    pack: Callable[[Any], bytes] = handler.response_serializer or (lambda message: message)
    if handler.request_streaming or handler.response_streaming:
        return _adapt_streaming(handler, parse, pack)

    async def unary(content: bytes, call: Call) -> bytes:
        return pack(await handler.unary_unary(_parsed(parse, content), call))

    return Method(answer_later=unary)


def _adapt_streaming(
    handler: Any, parse: Callable[[bytes], Any], pack: Callable[[Any], bytes]
) -> Method:
    async def requests(call: Call) -> AsyncIterator[Any]:
        async for content in call.messages():
            yield _parsed(parse, content)

    async def stream(call: Call) -> None:
        call.pack = pack
        if handler.request_streaming:
            behaviour = handler.stream_stream or handler.stream_unary
            answers = behaviour(requests(call), call)
        else:
            assert call.message is not None, "a call of one message begins with it"
            answers = handler.unary_stream(_parsed(parse, call.message), call)
        if hasattr(answers, "__aiter__"):
            async for answer in answers:
                await call.write(answer)
        else:
            last = await answers
            if last is not None:
                await call.write(last)

    return Method(stream=stream, client_streaming=handler.request_streaming)


def _parsed(parse: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return parse(content)
    except Exception as error:
        raise Aborted(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the bytes are not the message of this method ({error}).",
        ) from error
