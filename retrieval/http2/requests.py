"""Requests of one connection: HEADERS and DATA frames become calls, and calls run.

An answer that a method gives at once is written without a task, a copy or a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

import grpc

from retrieval.bounds.work_threads import WorkThreads
from retrieval.http2 import frames
from retrieval.http2.calls import PREFIX_BYTES, Call, Head, MethodTable
from retrieval.http2.frames import END_STREAM, Http2Error
from retrieval.http2.header_blocks import HeaderReader
from retrieval.http2.limits import CONTROL_FRAMES_PER_CALL, TransportLimits
from retrieval.http2.messages import inflated, take_messages
from retrieval.http2.refusals import Aborted, Refusal
from retrieval.http2.responses import ResponseWriter
from retrieval.http2.streams import Streams

log = logging.getLogger(__name__)

RECEIVE_WINDOW = 64 * 2**20
STREAM_WINDOW = 1 * 2**20
MAX_QUEUED_MESSAGES = 1000
MAX_BLOCK_BYTES = 128 * 2**10
"""Of one header block on the wire. A call with less, but too much, is refused; more ends the
connection."""
SMALL_FRAME_BYTES = 1024
"""A smaller frame of DATA that is not used is charged; larger ones pay with bandwidth."""
INLINE_INFLATE_BYTES = 4096
"""A longer compressed message is inflated in a thread."""


class RequestReader:
    """Opens calls, gathers their messages and runs their methods.

    Args:
        streams: Of the connection.
        responses: Writes the answers.
        methods: What can be called.
        limits: Of streams and messages.
        loop: Runs the calls.
        inflating: Inflates long messages.

    Attributes:
        interrupted_block: Stream, flags and bytes of a header block that CONTINUATION goes on
            with; nothing else may come meanwhile.
        timed_to: The last stream whose deadline is watched, if it has one.
    """

    __slots__ = (
        "_calls",
        "_headers",
        "_inflating",
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
        inflating: WorkThreads,
    ) -> None:
        self._streams = streams
        self._calls = streams.calls
        self._responses = responses
        self._headers = HeaderReader(methods.read_head)
        self._limits = limits
        self._loop = loop
        self._inflating = inflating
        self._unacknowledged = 0  # bytes since the last update of our receive window
        self.interrupted_block: tuple[int, int, bytearray] | None = None
        self.timed_to = 0

    # --- frames ---

    def on_headers(self, stream: int, flags: int, payload: bytes) -> None:
        """Take a HEADERS frame."""
        if flags & frames.PADDED:
            payload = frames.unpadded(payload)
        if flags & frames.PRIORITISED:
            if len(payload) < frames.PRIORITY_BYTES:
                raise Http2Error(frames.FRAME_SIZE_ERROR, "HEADERS without its priority")
            payload = payload[frames.PRIORITY_BYTES :]
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
        if len(block) > MAX_BLOCK_BYTES:
            raise Http2Error(frames.ENHANCE_YOUR_CALM, "too many headers")
        if flags & frames.END_HEADERS:
            self.interrupted_block = None
            self._open(stream, first_flags, bytes(block))

    def _open(self, stream: int, flags: int, block: bytes) -> None:
        """Open a stream with its whole header block, or end it with its trailers."""
        reader = self._headers
        head: Head = reader.read(block)
        streams = self._streams
        if reader.cost:
            streams.budget.left -= reader.cost
        if not stream & 1:
            raise Http2Error(frames.PROTOCOL_ERROR, f"stream {stream} is not a client's")
        if stream <= streams.last:
            self._on_trailers(stream, flags, head)
            return
        if streams.draining:
            # Beyond the last stream that GOAWAY named: the client sends it to another server
            streams.budget.left -= 1
            return
        if stream > streams.last + 2:
            streams.skip_to(stream)
        streams.last = stream
        if head.reset is not None:
            self._reset_unopened(stream, head.reset)
            return
        # A client may open the next stream before it gives up one that was refused
        if max(len(self._calls), len(streams.refused)) >= self._limits.max_streams:
            self._reset_unopened(stream, frames.REFUSED_STREAM)
            return
        method = head.method
        if method.refuse is not None and (refusal := method.refuse(head.metadata)) is not None:
            if not flags & END_STREAM:
                streams.refused.add(stream)
            streams.budget.left -= refusal.cost
            self._responses.refuse(stream, refusal)
            return
        call = Call(self._responses, stream, head)
        self._calls[stream] = call
        if head.error is not None:
            call.ended = bool(flags & END_STREAM)
            self._count_ended(head.error)
            self._responses.reject(call, head.error)
            streams.budget.left -= CONTROL_FRAMES_PER_CALL + 1  # it is not an accepted call
            return
        if method.client_streaming:
            assert method.stream is not None, "it reads them"
            call.queue = asyncio.Queue()
            self._start(call, method.stream(call))
        if flags & END_STREAM and stream in self._calls:
            self.on_data(stream, END_STREAM, b"")

    def _count_ended(self, error: int | Aborted) -> None:
        """Count a call that ends without its method, by gRPC status or HTTP status."""
        name = error.code.name if isinstance(error, Aborted) else str(error)
        self._responses.out.counts.ended_calls[name] += 1

    def _reset_unopened(self, stream: int, code: int) -> None:
        """Refuse a stream that opens no call, at the price of a control frame."""
        self._streams.budget.left -= 1
        self._responses.reset(stream, code)

    def _on_trailers(self, stream: int, flags: int, head: Head) -> None:
        """Take the header block of a stream that has been opened before."""
        streams = self._streams
        streams.budget.left -= 1
        call = self._calls.get(stream)
        if call is None:
            if stream in streams.refused:
                streams.refused.discard(stream)
            elif streams.was_skipped(stream):
                raise Http2Error(frames.PROTOCOL_ERROR, f"HEADERS on stream {stream}, out of order")
            elif stream not in streams.reset:
                raise Http2Error(frames.STREAM_CLOSED, f"HEADERS on stream {stream}, which ended")
            streams.end_lingering(stream)
        elif call.ended:
            self._reset(call, frames.STREAM_CLOSED)
        elif not flags & END_STREAM or not head.is_trailers:
            self._reset(call, frames.PROTOCOL_ERROR)
        else:  # what they say is not used
            self.on_data(stream, END_STREAM, b"")

    def _reset(self, call: Call, code: int) -> None:
        """End a call whose client has broken the rules of its stream."""
        self._responses.reset(call.stream, code)
        self._streams.cancel(call)

    def on_data(self, stream: int, flags: int, payload: bytes) -> None:
        """Take a DATA frame."""
        paid = len(payload)  # padding included: the peer's windows paid for it
        self._unacknowledged += paid
        if self._unacknowledged > RECEIVE_WINDOW // 2:
            self._responses.out.frames.append(frames.window_update(0, self._unacknowledged))
            self._unacknowledged = 0
        if flags & frames.PADDED:
            payload = frames.unpadded(payload)
        call = self._calls.get(stream)
        if call is None:
            self._on_data_without_call(stream, flags, paid)
            return
        if call.ended:
            self._reset(call, frames.STREAM_CLOSED)
            return
        announced = call.head.content_length
        if announced is not None:
            call.received += len(payload)
            if call.received > announced or (flags & END_STREAM and call.received < announced):
                self._reset(call, frames.PROTOCOL_ERROR)
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
                size = int.from_bytes(payload[1:PREFIX_BYTES], "big")
                if len(message) == size <= (method.max_bytes or self._limits.max_receive_bytes):
                    if method.answer_now is not None:
                        answer = method.answer_now(message, call)
                        if answer is not None:
                            if type(answer) is Refusal:
                                self._responses.refuse(stream, answer)
                                self._streams.close(call)
                                self._streams.budget.left -= CONTROL_FRAMES_PER_CALL + answer.cost
                            else:
                                self._responses.answer(call, answer)  # type: ignore[arg-type]
                            return
                    assert method.answer_later is not None, "a unary method"
                    self._start(call, method.answer_later(message, call))
                    return
        elif not payload:
            self._streams.budget.left -= 1
        self._gather(call, payload, paid)

    def _on_data_without_call(self, stream: int, flags: int, paid: int) -> None:
        streams = self._streams
        if stream in streams.refused:
            streams.refused.discard(stream)
            if not flags & END_STREAM:
                self._responses.reset(stream, frames.NO_ERROR)  # send no more of it
            return
        if stream == 0 or streams.never_opened(stream):
            raise Http2Error(frames.PROTOCOL_ERROR, f"DATA on stream {stream}, which is not open")
        if flags & END_STREAM:
            streams.end_lingering(stream)
        if stream in streams.reset or streams.draining:  # it was on its way
            if paid < SMALL_FRAME_BYTES:
                streams.budget.left -= 1
        else:
            self._reset_unopened(stream, frames.STREAM_CLOSED)

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
            self._count_ended(error)
            self._responses.fail(call, error)
            return
        if size and not call.ended:
            self._responses.out.frames.append(frames.window_update(call.stream, size))

    def _max_bytes(self, call: Call) -> int:
        return call.head.method.max_bytes or self._limits.max_receive_bytes

    def _take_messages(self, call: Call, body: bytearray) -> None:
        max_bytes = self._max_bytes(call)
        if call.head.method.is_http and body:
            call.add_message(bytes(body))
            body.clear()
        for content, is_compressed in take_messages(body, max_bytes):
            if call.queue is None:
                call.is_compressed = is_compressed
                call.add_message(content)
            else:
                if is_compressed:
                    content = inflated(content, call.head.compression, max_bytes)
                call.add_message(content)
        if call.queue is not None and call.queue.qsize() > MAX_QUEUED_MESSAGES:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many messages wait on this stream."
            )

    def _on_request_end(self, call: Call) -> None:
        """The client has sent all: a call of one message begins."""
        if call.queue is not None:
            call.queue.put_nowait(None)
        elif call.message is None or call.body:
            raise Aborted(
                grpc.StatusCode.INVALID_ARGUMENT,
                "expected one whole message, but the stream ended before its end.",
            )
        elif call.is_compressed and len(call.message) > INLINE_INFLATE_BYTES:
            self._start(call, self._inflate_and_run(call, call.message))
        else:
            if call.is_compressed:
                self._take_plain(call, self._inflated(call, call.message))
            self._start(call, self._work(call))

    def _work(self, call: Call) -> Any:
        """Return the work of a call whose one message is here."""
        method = call.head.method
        if method.stream is not None:
            return method.stream(call)
        assert method.answer_later is not None, "a unary method"
        assert call.message is not None, "it is here"
        return method.answer_later(call.message, call)

    def _inflated(self, call: Call, content: bytes) -> bytes:
        return inflated(content, call.head.compression, self._max_bytes(call))

    def _take_plain(self, call: Call, content: bytes) -> None:
        """Hold the inflated message in place of the compressed one."""
        call.message = content
        call.is_compressed = False
        if self._streams.is_open(call):
            self._streams.buffers.hold(call)

    async def _inflate_and_run(self, call: Call, content: bytes) -> Any:
        """Inflate a long message off the loop, then do the work of its call."""
        plain = await self._inflating.run(partial(self._inflated, call, content))
        self._take_plain(call, plain)
        return await self._work(call)

    # --- work and deadlines ---

    def _start(self, call: Call, work: Any) -> None:
        call.task = task = self._loop.create_task(work)
        self._set_deadline(call)
        task.add_done_callback(lambda done: self._finished(call, done))

    def _finished(self, call: Call, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        call.task = None  # it holds the call; an error's traceback does, too
        if self._streams.is_open(call):
            self._answer(call, task, error)
            self._responses.out.flush()
        if call.outcome is not None:
            for callback in call.outcome.callbacks:
                callback(call)

    def _answer(self, call: Call, task: asyncio.Task[Any], error: BaseException | None) -> None:
        """Send what the work of a call has come to."""
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
            call.is_cancelled = True
            reason = "the deadline passed; the work was dropped."
            error = Aborted(grpc.StatusCode.DEADLINE_EXCEEDED, reason)
            self._count_ended(error)
            self._responses.fail(call, error)
            self._responses.out.flush()
