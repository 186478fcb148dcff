"""Requests of one connection: HEADERS and DATA frames become calls, and calls run.

An answer that a method gives at once is written without a task, a copy or a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from typing import Any

import grpc

from retrieval.http2 import frames
from retrieval.http2.calls import PREFIX_BYTES, Call, Head, MethodTable
from retrieval.http2.frames import END_STREAM, Http2Error
from retrieval.http2.headers import HeaderReader
from retrieval.http2.limits import TransportLimits
from retrieval.http2.refusals import Aborted, Refusal
from retrieval.http2.responses import ResponseWriter
from retrieval.http2.streams import Streams

log = logging.getLogger(__name__)

RECEIVE_WINDOW = 64 * 2**20
STREAM_WINDOW = 1 * 2**20
MAX_QUEUED_MESSAGES = 1000


class RequestReader:
    """Opens calls, gathers their messages and runs their methods.

    Args:
        streams: Of the connection.
        responses: Writes the answers.
        methods: What can be called.
        limits: Of streams and messages.
        loop: Runs the calls.

    Attributes:
        interrupted_block: Stream, flags and bytes of a header block that CONTINUATION goes on
            with; nothing else may come meanwhile.
        timed_to: The last stream whose deadline is watched, if it has one.
    """

    __slots__ = (
        "_calls",
        "_headers",
        "_limits",
        "_loop",
        "_responses",
        "_streams",
        "_unacknowledged",
        "interrupted_block",
        "timed_to",
    )

    def __init__(
        self,
        streams: Streams,
        responses: ResponseWriter,
        methods: MethodTable,
        limits: TransportLimits,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._streams = streams
        self._calls = streams.calls
        self._responses = responses
        self._headers = HeaderReader(methods.read_head)
        self._limits = limits
        self._loop = loop
        self._unacknowledged = 0  # bytes since the last update of our receive window
        self.interrupted_block: tuple[int, int, bytearray] | None = None
        self.timed_to = 0

    # --- frames ---

    def on_headers(self, stream: int, flags: int, payload: bytes) -> None:
        """Take a HEADERS frame."""
        if flags & frames.PADDED:
            payload = frames.unpadded(payload)
        if flags & frames.PRIORITISED:
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._open(stream, flags, payload)
        else:
            self.interrupted_block = stream, flags, bytearray(payload)

    def on_continuation(self, stream: int, flags: int, payload: bytes) -> None:
        """Take a CONTINUATION frame."""
        if self.interrupted_block is None or self.interrupted_block[0] != stream:
            raise Http2Error(frames.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        _, first_flags, block = self.interrupted_block
        block += payload
        if len(block) > frames.MAX_HEADER_BYTES:
            raise Http2Error(frames.ENHANCE_YOUR_CALM, "too many headers")
        if flags & frames.END_HEADERS:
            self.interrupted_block = None
            self._open(stream, first_flags, bytes(block))

    def _open(self, stream: int, flags: int, block: bytes) -> None:
        """Open a stream with its whole header block."""
        head: Head = self._headers.read(block)
        streams = self._streams
        if not stream & 1:
            raise Http2Error(frames.PROTOCOL_ERROR, f"stream {stream} is not a client's")
        if stream <= streams.last:
            known = stream in self._calls or stream in streams.refused
            if known and flags & END_STREAM:  # trailers of a request say nothing that is used
                self.on_data(stream, END_STREAM, b"")
            return
        if streams.draining:
            # Beyond the last stream that GOAWAY named: the client sends it to another server
            return
        streams.last = stream
        if len(self._calls) + len(streams.refused) >= self._limits.max_streams:
            self._responses.reset(stream, frames.REFUSED_STREAM)
            return
        method = head.method
        if method.refuse is not None and (refusal := method.refuse()) is not None:
            if not flags & END_STREAM:
                streams.refused.add(stream)
            streams.count_refusal()
            self._responses.refuse(stream, refusal)
            return
        call = Call(self._responses, stream, head)
        self._calls[stream] = call
        if head.error is not None:
            self._responses.reject(call, head.error)
        elif method.client_streaming:
            assert method.stream is not None, "it reads them"
            call.queue = asyncio.Queue()
            self._start(call, method.stream(call))
        if flags & END_STREAM and stream in self._calls:
            self.on_data(stream, END_STREAM, b"")

    def on_data(self, stream: int, flags: int, payload: bytes) -> None:
        """Take a DATA frame."""
        size = len(payload)  # padding included: the peer's windows paid for it
        self._unacknowledged += size
        if self._unacknowledged > RECEIVE_WINDOW // 2:
            self._responses.out.frames.append(frames.window_update(0, self._unacknowledged))
            self._unacknowledged = 0
        if flags & frames.PADDED:
            payload = frames.unpadded(payload)
        call = self._calls.get(stream)
        if call is None or call.ended:
            self._on_data_without_call(stream, flags)
            return
        if flags & END_STREAM:
            call.ended = True
            # One whole plain message of a unary call: nearly always
            if (
                len(payload) >= PREFIX_BYTES
                and payload[0] == 0
                and not call.body
                and call.message is None
                and (method := call.head.method).stream is None
            ):
                message = payload[PREFIX_BYTES:]
                announced = int.from_bytes(payload[1:PREFIX_BYTES], "big")
                if len(message) == announced <= self._limits.max_receive_bytes:
                    if method.answer_now is not None:
                        answer = method.answer_now(message, call)
                        if answer is not None:
                            if type(answer) is Refusal:
                                self._responses.refuse(stream, answer)
                                self._streams.close(call)
                            else:
                                self._responses.answer(call, answer)  # type: ignore[arg-type]
                            return
                    assert method.answer_later is not None, "a unary method"
                    self._start(call, method.answer_later(message, call))
                    return
        elif not payload:
            self._streams.budget.left -= 1
        self._gather(call, payload, size)

    def _on_data_without_call(self, stream: int, flags: int) -> None:
        streams = self._streams
        if stream in streams.refused:
            streams.refused.discard(stream)
            if not flags & END_STREAM:
                self._responses.reset(stream, frames.NO_ERROR)  # send no more of it
        elif stream == 0 or streams.never_opened(stream):
            raise Http2Error(frames.PROTOCOL_ERROR, f"DATA on stream {stream}, which is not open")

    # --- messages ---

    def _gather(self, call: Call, payload: bytes, size: int) -> None:
        """Add to a message in several frames, a compressed one, or a stream of them.

        Args:
            call: Whose message it is.
            payload: The frame's content.
            size: Bytes that the peer's windows paid for it.
        """
        if not isinstance(call.body, bytearray):
            call.body = bytearray(call.body)
        call.body += payload
        try:
            self._take_messages(call, call.body)
            self._streams.buffers.hold(call)
            if call.ended:
                self._on_request_end(call)
        except Aborted as error:
            self._responses.fail(call, error)
            return
        if size and not call.ended:
            self._responses.out.frames.append(frames.window_update(call.stream, size))

    def _take_messages(self, call: Call, body: bytearray) -> None:
        for message in take_messages(body, call.head.compression, self._limits.max_receive_bytes):
            call.add_message(message)
        if call.queue is not None and call.queue.qsize() > MAX_QUEUED_MESSAGES:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many messages wait on this stream."
            )

    def _on_request_end(self, call: Call) -> None:
        """The client has sent all: a call of one message begins."""
        method = call.head.method
        if call.queue is not None:
            call.queue.put_nowait(None)
        elif call.message is None or call.body:
            raise Aborted(
                grpc.StatusCode.INVALID_ARGUMENT,
                "expected one whole message, but the stream ended before its end.",
            )
        elif method.stream is not None:
            self._start(call, method.stream(call))
        else:
            assert method.answer_later is not None, "a unary method"
            self._start(call, method.answer_later(call.message, call))

    # --- work and deadlines ---

    def _start(self, call: Call, work: Any) -> None:
        call.task = task = self._loop.create_task(work)
        self._set_deadline(call)
        task.add_done_callback(lambda done: self._finished(call, done))

    def _finished(self, call: Call, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if not self._streams.is_open(call):
            return
        if task.cancelled():
            error = Aborted(grpc.StatusCode.CANCELLED, "the call was cancelled.")
        if error is None:
            if call.head.method.stream is None:
                self._responses.answer(call, task.result())
            else:
                self._responses.end(call)
        elif isinstance(error, Aborted):
            self._responses.fail(call, error)
        else:
            log.error("a call failed", exc_info=error)
            reason = f"internal error ({type(error).__name__})."
            self._responses.fail(call, Aborted(grpc.StatusCode.INTERNAL, reason))
        self._responses.out.flush()

    def _set_deadline(self, call: Call) -> None:
        if call.deadline is not None and call.timer is None:
            left = max(0.0, call.deadline - time.monotonic())
            call.timer = self._loop.call_later(left, self._expire, call)

    def set_deadlines(self) -> None:
        """Watch the deadlines of calls that this read opened and did not answer.

        Most are answered at once and need no timer; a deadline does not wait for a message.
        """
        for call in reversed(self._calls.values()):
            if call.stream <= self.timed_to:
                break
            self._set_deadline(call)
        self.timed_to = self._streams.last

    def _expire(self, call: Call) -> None:
        call.timer = None
        if self._streams.is_open(call):
            reason = "the deadline passed; the work was dropped."
            self._responses.fail(call, Aborted(grpc.StatusCode.DEADLINE_EXCEEDED, reason))
            self._responses.out.flush()


def take_messages(body: bytearray, compression: str, max_bytes: int) -> list[bytes]:
    """Cut whole messages off the front of ``body``.

    Raises:
        Aborted: One is too large, or compressed in a way that is not known.
    """
    found: list[bytes] = []
    while len(body) >= PREFIX_BYTES:
        length = int.from_bytes(body[1:PREFIX_BYTES], "big")
        if length > max_bytes:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message may have {max_bytes} bytes, but {length} were announced.",
            )
        end = PREFIX_BYTES + length
        if len(body) < end:
            break
        content = bytes(body[PREFIX_BYTES:end])
        if body[0]:
            content = _inflated(content, compression, max_bytes)
        del body[:end]
        found.append(content)
    return found


def _inflated(content: bytes, compression: str, max_bytes: int) -> bytes:
    """Decompress one message, never beyond ``max_bytes``."""
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
