"""Answers as frames: sent at once where the peer's windows allow it, else when they open."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from retrieval.http2 import frames, headers
from retrieval.http2.calls import PREFIX_BYTES, Call
from retrieval.http2.frames import END_HEADERS, END_STREAM, frame
from retrieval.http2.refusals import Aborted, Refusal
from retrieval.http2.streams import FrameWriter, Streams

ANSWERS_PER_WRITE = 8
STOP_SECONDS = 1.0
"""How long a client has to read a whole HTTP answer before it is told to send no more.

Some clients (curl 7) take the answer for lost if both reach them together.
"""
MAX_LINGERING = 100
"""Streams of a connection that wait for that; the others are reset at once."""
FRAMES_PER_WRITE = 16
"""Frames of long answers that are gathered before the transport says whether the peer reads."""

RESPONSE_START = frames.FRAME.pack(0, len(headers.RESPONSE_BLOCK), frames.HEADERS, END_HEADERS, 0)[
    :5
]
OK_START = frames.FRAME.pack(0, len(headers.OK_BLOCK), frames.HEADERS, END_HEADERS | END_STREAM, 0)[
    :5
]
RESPONSE_BLOCK = headers.RESPONSE_BLOCK
OK_BLOCK = headers.OK_BLOCK

_pack_data = frames.FRAME_AND_PREFIX.pack


class ResponseWriter:
    """Writes the answers of one connection.

    Args:
        out: Where frames go.
        streams: The calls that are answered.
        max_send_bytes: Of one message.

    Attributes:
        table_shrunk: The peer has made its header table smaller: the next header block says that
            ours is empty.
        pause_seconds: For how long a refusal in this read asks to read nothing.
        peer: As in ``calls.Writer``.
        auth_context: Likewise.
    """

    __slots__ = (
        "_flow",
        "_max_send_bytes",
        "_streams",
        "auth_context",
        "out",
        "pause_seconds",
        "peer",
        "table_shrunk",
    )

    def __init__(self, out: FrameWriter, streams: Streams, max_send_bytes: int) -> None:
        self.out = out
        self.table_shrunk = False
        self.pause_seconds = 0.0
        self.peer = "unknown"
        self.auth_context: dict[str, list[bytes]] = {}
        self._streams = streams
        self._flow = streams.flow
        self._max_send_bytes = max_send_bytes

    # --- whole answers ---

    def answer(self, call: Call, message: bytes) -> None:
        """Send the whole answer of a unary call."""
        flow = self._flow
        out = self.out
        stream = call.stream
        size = len(message) + PREFIX_BYTES
        if (
            size > flow.window
            or size > flow.stream_window + call.window
            or size > flow.frame_bytes
            or self.table_shrunk
            or out.is_congested
            or call.outcome is not None
        ):
            self._answer_in_parts(call, message)
            return
        flow.window -= size
        place = stream.to_bytes(4, "big")
        out.frames.append(
            b"".join(
                (
                    RESPONSE_START,
                    place,
                    RESPONSE_BLOCK,
                    _pack_data(size >> 16, size & 0xFFFF, 0, 0, stream, 0, size - 5),
                    message,
                    OK_START,
                    place,
                    OK_BLOCK,
                )
            )
        )
        self._streams.close(call)
        out.answers += 1
        if out.answers >= ANSWERS_PER_WRITE:
            out.flush()

    def _answer_in_parts(self, call: Call, message: bytes) -> None:
        """Send an answer that the windows stop, or that is longer than a frame."""
        call.message = None
        outcome = call.outcome
        try:
            if outcome is not None and outcome.refuses():
                raise Aborted(outcome.code, outcome.details, outcome.trailing)
            self.send_message(call, message)
        except Aborted as error:
            self.fail(call, error)
        else:
            self.end(call)

    def refuse(self, stream: int, refusal: Refusal) -> None:
        """Answer a call that is refused; the answer leaves with the others of this read."""
        self.pause_seconds = refusal.pause_seconds
        if self.table_shrunk:
            self._send_headers(stream, refusal.block, END_STREAM)
        else:
            self.out.frames.append(refusal.start + stream.to_bytes(4, "big") + refusal.block)

    def fail(self, call: Call, error: Aborted) -> None:
        """End a call with a status; with nothing else if its answer had not begun."""
        if call.head.method.is_http:
            self._fail_http(call, error)
            return
        block = headers.status_block(error.code, error.message, error.trailing)
        if not call.responding:
            block = RESPONSE_BLOCK + block
        self._send_headers(call.stream, block, END_STREAM)
        self._close(call)

    def _fail_http(self, call: Call, error: Aborted) -> None:
        """End a request that is no gRPC call, with an HTTP status if its answer had not begun."""
        if call.responding:
            self.reset(call.stream, frames.INTERNAL_ERROR)
            self._streams.close(call)
        else:
            is_full = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            self.reject(call, 429 if is_full else 500)

    def _close(self, call: Call) -> None:
        """Forget a call whose answer has ended; a client that goes on sending is told not to."""
        if not call.ended:
            if call.head.method.is_http:
                self._stop_later(call.stream)
            else:
                self.reset(call.stream, frames.NO_ERROR)
        self._streams.close(call)

    def _stop_later(self, stream: int) -> None:
        """Ignore what still comes, and tell the client in a while to send no more."""
        streams = self._streams
        if len(streams.lingering) >= MAX_LINGERING:
            self.reset(stream, frames.NO_ERROR)
            return
        streams.remember_reset(stream)
        loop = asyncio.get_running_loop()
        streams.lingering[stream] = loop.call_later(STOP_SECONDS, self._stop, stream)

    def _stop(self, stream: int) -> None:
        del self._streams.lingering[stream]
        self.reset(stream, frames.NO_ERROR)
        self.out.flush()

    def reject(self, call: Call, error: int | Aborted) -> None:
        """End a call that cannot be served, with an HTTP status or a gRPC one."""
        if isinstance(error, Aborted):
            self.fail(call, error)
            return
        status = headers.literal(b":status", str(error).encode())
        self._send_headers(call.stream, status, END_STREAM)
        self._close(call)

    def is_open(self, call: Call) -> bool:
        """Return whether a call has not ended."""
        return self._streams.is_open(call)

    def reset(self, stream: int, code: int) -> None:
        """End a stream with RST_STREAM; what is still on its way is ignored."""
        self._streams.remember_reset(stream)
        self.out.counts.resets[code] += 1
        self.out.frames.append(frames.reset_stream(stream, code))

    # --- answers in parts ---

    def send_message(self, call: Call, message: bytes) -> None:
        """Queue one message, after the response headers, and send what the windows allow."""
        if not self._streams.is_open(call):
            return
        if len(message) > self._max_send_bytes:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the answer has {len(message)} bytes, more than {self._max_send_bytes}. Ask"
                " for less.",
            )
        self.begin(call)
        self._queue(call, b"\x00" + len(message).to_bytes(4, "big") + message)
        if call.head.method.stream is not None:
            self.out.flush()

    def send_http(self, call: Call, block: bytes, content: bytes, cost: int) -> None:
        """Send header block and content of an answer that is not gRPC's; ``end`` ends it."""
        self._streams.budget.left -= cost
        if self._streams.is_open(call):
            call.responding = True
            self._send_headers(call.stream, block)
            self._queue(call, content)

    def _queue(self, call: Call, content: bytes) -> None:
        """Hold content of an answer, and send what the windows allow."""
        if not isinstance(call.pending, bytearray):
            call.pending = bytearray(call.pending)
        call.pending += content
        self._streams.buffers.hold(call)
        self.resume(call)

    def message_taken(self, call: Call, size: int) -> None:
        """Count no more a message that a handler has taken off the call's queue."""
        call.queued -= size
        if self._streams.is_open(call):
            self._streams.buffers.count(call)

    def end(self, call: Call) -> None:
        """End a call whose whole answer has been handed over; trailers follow its last byte."""
        call.task = None
        outcome = call.outcome
        if outcome is not None and outcome.refuses():
            self.fail(call, Aborted(outcome.code, outcome.details, outcome.trailing))
        elif call.pending:
            call.finishing = True
        else:
            self.begin(call)
            self._send_ok(call)

    def resume(self, call: Call) -> None:
        """Send what the windows allow of an answer that waits."""
        flow = self._flow
        pending = call.pending
        while pending and isinstance(pending, bytearray):
            if self.out.is_congested:
                flow.congested[call.stream] = call
                return
            room = min(flow.room(call), len(pending))
            if room <= 0:
                flow.block(call)
                return
            self.out.frames.append(frame(frames.DATA, 0, call.stream, bytes(pending[:room])))
            del pending[:room]
            flow.window -= room
            call.window -= room
            self._streams.buffers.release(call, room)
            if len(self.out.frames) >= FRAMES_PER_WRITE:
                self.out.flush()
        if call.finishing:
            self._send_ok(call)
        elif call.outcome is not None:
            call.outcome.wake()

    def resume_blocked(self) -> None:
        """Send on after a larger window of the connection, those that wait for it alone."""
        flow = self._flow
        while flow.blocked and flow.window > 0 and not self.out.is_congested:
            _, call = flow.blocked.popitem(last=False)
            self.resume(call)

    def resume_congested(self) -> None:
        """Send on, as the peer reads again, until it does not."""
        flow = self._flow
        while flow.congested and not self.out.is_congested:
            _, call = flow.congested.popitem(last=False)
            self.resume(call)
        self.out.flush()

    def resume_all(self) -> None:
        """Send on after a larger window of every stream, at the price of that much work."""
        waiting = [call for call in self._streams.calls.values() if call.pending]
        self._streams.budget.spend_on_calls(len(waiting))
        for call in waiting:
            self.resume(call)

    def begin(self, call: Call, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
        """Send the headers of a call's answer, if they have not been sent."""
        if not call.responding and self._streams.is_open(call):
            call.responding = True
            self._send_headers(call.stream, RESPONSE_BLOCK + headers.metadata_block(metadata))

    def _send_ok(self, call: Call) -> None:
        if call.head.method.is_http:
            self.out.frames.append(frame(frames.DATA, END_STREAM, call.stream))
            self._close(call)
            return
        block = OK_BLOCK
        if call.outcome is not None:
            outcome = call.outcome
            block = headers.status_block(grpc.StatusCode.OK, outcome.details, outcome.trailing)
        self._send_headers(call.stream, block, END_STREAM)
        self._close(call)

    def _send_headers(self, stream: int, block: bytes, flags: int = 0) -> None:
        if self.table_shrunk:
            self.table_shrunk = False
            block = headers.EMPTY_TABLE + block
        self.out.frames.append(frame(frames.HEADERS, END_HEADERS | flags, stream, block))
