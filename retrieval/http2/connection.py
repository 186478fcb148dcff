"""One HTTP/2 connection: frames in, calls started, answers out within the peer's flow-control windows.

An answer that a method gives at once is written without a task, a copy or a turn of the event loop;
answers to calls that came in one read leave in one write. Everything a peer can make this object
hold is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from retrieval.http2 import frames as wire
from retrieval.http2.calls import Aborted, Call, Head, take_messages
from retrieval.http2.draining import Leaving
from retrieval.http2.frames import WireError, frame

if TYPE_CHECKING:
    from retrieval.http2.server import Http2Server

log = logging.getLogger("omni.http2")

ANSWERS_PER_WRITE = 8
RECEIVE_WINDOW = 64 * 2**20
STREAM_WINDOW = 1 * 2**20
MAX_BUFFERED_BYTES = 64 * 2**20
"""Bytes of requests that are not answered, and of answers that wait for a window, on one connection; more and calls are refused."""
NOISE_ALLOWANCE = 10_000
"""Control frames beyond ten per answered call that a peer may send: pings, resets and settings are cheap to send and not to serve. Window
updates that go with reading answers are not counted.
"""
MAX_QUEUED_MESSAGES = 1000

_unpack = wire.FRAME.unpack_from
_pack_data = wire.FRAME_AND_PREFIX.pack
_TOO_LARGE = grpc.StatusCode.RESOURCE_EXHAUSTED


class Connection(Leaving):
    """The server's end of one connection."""

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.calls: dict[int, Call] = {}
        self.last_stream = 0
        self._clocked = 0  # the last stream whose deadline is watched, if it has one
        self.draining = False
        self.closed = False
        self.heard = time.monotonic()
        self.pinged = False
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self.greeted = False
        self._reader = wire.HeaderReader(server.methods.head)
        self._turned_away: set[int] = set()  # refused before their message had come
        self._block: tuple[int, int, bytearray] | None = (
            None  # stream, flags, headers that CONTINUATION goes on with
        )
        self._out: list[bytes] = []
        self._answers = 0
        self._window = self._granted = wire.DEFAULT_WINDOW  # now, and after the last update
        self._opened = (
            wire.DEFAULT_WINDOW
        )  # by all updates together: what is not in the window now was sent
        self._excused = 0
        self._starved: OrderedDict[int, Call] = (
            OrderedDict()
        )  # answers that wait for the connection's window, not for their stream's
        self._peer_window = wire.DEFAULT_WINDOW
        self._peer_frame = wire.DEFAULT_FRAME_BYTES
        self._size_update = b""
        self._unacknowledged = 0
        self._buffered = 0
        self._noise = 0
        self._served = 0
        self._pause = 0.0  # seconds, asked for by a refusal in this read
        self._resting = self._unread = (
            False  # the two reasons to read nothing: the server is full; the peer does not read
        )
        self._farewell: Callable[[], None] | None = None
        self._control = {**self.control_frames(), wire.CONTINUATION: self._on_continuation}

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write"), (
            "a stream transport"
        )
        self._transport = transport  # type: ignore[assignment]
        self.server.connections.add(self)
        values = {
            wire.MAX_CONCURRENT_STREAMS: self.server.max_streams,
            wire.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            wire.MAX_HEADER_LIST_SIZE: wire.MAX_HEADER_BYTES,
        }
        self._out += [
            wire.settings(values),
            wire.window_update(0, RECEIVE_WINDOW - wire.DEFAULT_WINDOW),
        ]
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the work of a caller who has gone."""
        self.closed = True
        self.server.connections.discard(self)
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.drop()

    def pause_writing(self) -> None:
        """The peer does not read: listen to it no more until it does."""
        self._unread = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._unread = False
        self._listen()

    def rest(self) -> None:
        """The server is full: let the peer's next calls gather."""
        self._resting = True
        if self._transport is not None:
            self._transport.pause_reading()

    def listen_again(self) -> None:
        """Hear what they are."""
        self._resting = False
        self._listen()

    def _listen(self) -> None:
        if self._transport is not None and not (self.closed or self._resting or self._unread):
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Take frames apart."""
        if self.closed:
            return
        self.heard = self.server.now()
        self.pinged = False
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        try:
            if not self.greeted:
                if data[: len(wire.PREFACE)] != wire.PREFACE[:end]:
                    raise WireError(wire.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
                if end < len(wire.PREFACE):
                    self._rest = bytes(data)
                    return
                at, self.greeted = len(wire.PREFACE), True
            while end - at >= 9:
                high, low, kind, flags, stream = _unpack(data, at)
                start = at + 9
                at = start + (high << 16) + low
                stream &= wire.MAX_WINDOW  # the highest bit is reserved
                if high or low > wire.DEFAULT_FRAME_BYTES:
                    raise WireError(wire.FRAME_SIZE_ERROR, f"a frame of {(high << 16) + low} bytes")
                if at > end:
                    at = start - 9
                    break
                if self._block is not None and kind != wire.CONTINUATION:
                    raise WireError(wire.PROTOCOL_ERROR, "a header block was interrupted")
                if kind == wire.DATA:
                    self._on_data(stream, flags, data[start:at])
                elif kind == wire.HEADERS:
                    self._on_headers(stream, flags, data[start:at])
                elif (handle := self._control.get(kind)) is not None:
                    handle(stream, flags, data[start:at])
                    self._noise += 1
                if self._noise > NOISE_ALLOWANCE + 10 * self._served:
                    raise WireError(wire.ENHANCE_YOUR_CALM, "too many control frames")
                if self.closed:
                    return
            self._rest = bytes(data[at:])
            if self.calls and self.last_stream > self._clocked:
                self._start_clocks()
        except WireError as error:
            self._fail(error)
            return
        except Exception:
            log.exception("a connection ends: reading what came failed")
            self._fail(WireError(wire.INTERNAL_ERROR, "internal error"))
            return
        if self._out:
            self._flush()
        if self._pause and not self._resting:
            pause, self._pause = self._pause, 0.0
            self.server.pacer.rest(self, pause)

    def _flush(self) -> None:
        out, self._out, self._answers = self._out, [], 0
        if self._transport is not None and out:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def _fail(self, error: WireError) -> None:
        log.debug("a connection ends: %s", error)
        self._out.append(
            frame(
                wire.GOAWAY,
                0,
                0,
                struct.pack(">LL", self.last_stream, error.code) + str(error).encode()[:100],
            )
        )
        self._flush()
        self.close()

    def close(self) -> None:
        """End the connection once what was written has left."""
        self.closed = True
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.drop()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now."""
        self.close()
        if self._transport is not None:
            self._transport.abort()

    # --- requests ---

    def _on_headers(self, stream: int, flags: int, payload: bytes) -> None:
        if flags & wire.PADDED:
            payload = _unpadded(payload)
        if flags & wire.PRIORITISED:
            payload = payload[5:]
        if flags & wire.END_HEADERS:
            self._open(stream, flags, payload)
        else:
            self._block = stream, flags, bytearray(payload)

    def _on_continuation(self, stream: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream:
            raise WireError(wire.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        _, first_flags, block = self._block
        block += payload
        if len(block) > wire.MAX_HEADER_BYTES:
            raise WireError(wire.ENHANCE_YOUR_CALM, "too many headers")
        if flags & wire.END_HEADERS:
            self._block = None
            self._open(stream, first_flags, bytes(block))

    def _open(self, stream: int, flags: int, block: bytes) -> None:
        head: Head = self._reader.read(block)
        if not stream & 1:
            raise WireError(wire.PROTOCOL_ERROR, f"stream {stream} is not a client's")
        if stream <= self.last_stream:
            call = self.calls.get(stream)
            if (
                call is not None or stream in self._turned_away
            ) and flags & wire.END_STREAM:  # trailers of a request: nothing for us
                self._on_data(stream, wire.END_STREAM, b"")
            return
        if self.draining:
            # Beyond the last stream that GOAWAY named: the client sends it to another server
            return
        self.last_stream = stream
        if len(self.calls) + len(self._turned_away) >= self.server.max_streams:
            self._reset(stream, wire.REFUSED_STREAM)
            return
        door = head.method.door
        if door is not None and (refusal := door()) is not None:
            if not flags & wire.END_STREAM:
                self._turned_away.add(stream)
            self._served += 1
            self._send_refusal(stream, refusal)
            return
        call = Call(self, stream, head)
        self.calls[stream] = call
        if head.refusal is not None:
            self._refuse(call, head.refusal)
        elif head.method.many:
            assert head.method.stream is not None, "it reads them"
            call.queue = asyncio.Queue()
            self._start(call, head.method.stream(call))
        if flags & wire.END_STREAM and stream in self.calls:
            self._on_data(stream, wire.END_STREAM, b"")

    def _on_data(self, stream: int, flags: int, payload: bytes) -> None:
        size = len(payload)  # padding included: what the peer's windows paid
        self._unacknowledged += size
        if self._unacknowledged > RECEIVE_WINDOW // 2:
            self._out.append(wire.window_update(0, self._unacknowledged))
            self._unacknowledged = 0
        if flags & wire.PADDED:
            payload = _unpadded(payload)
        call = self.calls.get(stream)
        if call is None or call.ended:
            if stream in self._turned_away:
                self._turned_away.discard(stream)
                if not flags & wire.END_STREAM:
                    self._reset(stream, wire.NO_ERROR)  # send no more of it
            elif (stream > self.last_stream and not self.draining) or stream == 0:
                raise WireError(wire.PROTOCOL_ERROR, f"DATA on stream {stream}, which is not open")
            return
        method = call.head.method
        if flags & wire.END_STREAM:
            call.ended = True
            if (
                len(payload) >= 5
                and payload[0] == 0
                and not call.body
                and call.message is None
                and method.stream is None
            ):  # one whole plain message: nearly always
                message = payload[5:]
                if (
                    len(message)
                    == int.from_bytes(payload[1:5], "big")
                    <= self.server.max_receive_bytes
                ):
                    if method.now is not None:
                        answer = method.now(message, call)
                        if answer is not None:
                            if type(answer) is wire.Refusal:
                                self._send_refusal(stream, answer)
                                self._close_call(call)
                            else:
                                self._answer(call, answer)  # type: ignore[arg-type]
                            return
                    assert method.later is not None, "a unary method"
                    self._start(call, method.later(message, call))
                    return
        elif not payload:
            self._noise += 1
        self._gather(call, payload, size)

    def _gather(self, call: Call, payload: bytes, size: int) -> None:
        """A message in several frames, a compressed one, or a stream of them; ``size`` bytes came for it."""
        call.body = body = (
            bytearray(call.body) if not isinstance(call.body, bytearray) else call.body
        )
        body += payload
        try:
            self._keep(
                call, take_messages(body, call.head.compression, self.server.max_receive_bytes)
            )
            self._hold(call)
            if call.ended:
                self._all_here(call)
        except Aborted as error:
            self._finish_with(call, error)
            return
        if size and not call.ended:
            self._out.append(wire.window_update(call.stream, size))

    @staticmethod
    def _keep(call: Call, messages: list[bytes]) -> None:
        """Queue the messages of a call of many; of another there may be one."""
        for message in messages:
            if call.queue is not None:
                call.queue.put_nowait(message)
                call.queued += len(message)
            elif call.message is None:
                call.message = message
            else:
                raise Aborted(
                    grpc.StatusCode.INVALID_ARGUMENT, "expected one message, but got several."
                )
        if call.queue is not None and call.queue.qsize() > MAX_QUEUED_MESSAGES:
            raise Aborted(_TOO_LARGE, "too many messages wait on this stream.")

    def _all_here(self, call: Call) -> None:
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
            assert method.later is not None, "a unary method"
            self._start(call, method.later(call.message, call))

    def took(self, call: Call, size: int) -> None:
        """A method took a message off its call's queue: what it makes of it is its own affair."""
        call.queued -= size
        if self.calls.get(call.stream) is call:
            self._count(call)

    def _start(self, call: Call, work: Any) -> None:
        call.task = task = self.server.loop.create_task(work)
        self._start_clock(call)
        task.add_done_callback(lambda done: self._finished(call, done))

    def _start_clock(self, call: Call) -> None:
        if call.ends is not None and call.timer is None:
            call.timer = self.server.loop.call_later(
                max(0.0, call.ends - time.monotonic()), self._expire, call
            )

    def _start_clocks(self) -> None:
        """Of calls that this read opened and did not answer, as most are: a deadline does not wait for a message."""
        for call in reversed(self.calls.values()):
            if call.stream <= self._clocked:
                break
            self._start_clock(call)
        self._clocked = self.last_stream

    def _expire(self, call: Call) -> None:
        call.timer = None
        if self.calls.get(call.stream) is call:
            self._finish_with(
                call,
                Aborted(
                    grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed; the work was dropped."
                ),
            )
            self._flush()

    def _finished(self, call: Call, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            error: BaseException | None = Aborted(
                grpc.StatusCode.CANCELLED, "the call was cancelled."
            )
        else:
            error = task.exception()
        if self.closed or self.calls.get(call.stream) is not call:
            return
        if error is None:
            if call.head.method.stream is None:
                self._answer(call, task.result())
            else:
                self._end_stream(call)
        elif isinstance(error, Aborted):
            self._finish_with(call, error)
        else:
            log.error("a call failed", exc_info=error)
            self._finish_with(
                call, Aborted(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}).")
            )
        self._flush()

    # --- answers ---

    def _answer(self, call: Call, message: bytes) -> None:
        """The whole answer of a unary call."""
        size = len(message) + 5
        stream = call.stream
        if (
            size > self._window
            or size > self._peer_window + call.window
            or size > self._peer_frame
            or self._size_update
        ):
            call.message = None
            try:
                self.send_message(call, message)
            except Aborted as error:
                self._finish_with(call, error)
            else:
                self._end_stream(call)
            return
        self._window -= size
        place = stream.to_bytes(4, "big")
        self._out.append(
            b"".join(
                (
                    wire.RESPONSE_START,
                    place,
                    wire.RESPONSE_BLOCK,
                    _pack_data(size >> 16, size & 0xFFFF, 0, 0, stream, 0, size - 5),
                    message,
                    wire.OK_START,
                    place,
                    wire.OK_BLOCK,
                )
            )
        )
        self._close_call(call)
        self._answers += 1
        if self._answers >= ANSWERS_PER_WRITE:
            self._flush()

    def send_message(self, call: Call, message: bytes) -> None:
        """Queue one message, with the response headers before the first, and send what the windows allow."""
        if self.calls.get(call.stream) is not call:
            return
        if len(message) > self.server.max_send_bytes:
            raise Aborted(
                _TOO_LARGE,
                f"the answer has {len(message)} bytes, more than {self.server.max_send_bytes}. Ask"
                " for less.",
            )
        self._respond(call)
        call.pending = (
            bytearray(call.pending) if not isinstance(call.pending, bytearray) else call.pending
        )
        call.pending += b"\x00" + len(message).to_bytes(4, "big") + message
        self._hold(call)
        self._pump(call)
        if call.head.method.stream is not None:
            self._flush()

    def _count(self, call: Call) -> None:
        """Account for the bytes that a call makes this connection keep."""
        held = len(call.body) + len(call.message or b"") + call.queued + len(call.pending)
        self._buffered += held - call.held
        call.held = held

    def _hold(self, call: Call) -> None:
        """Count, and end the call that is too much."""
        self._count(call)
        if self._buffered > MAX_BUFFERED_BYTES:
            raise Aborted(
                _TOO_LARGE, "this connection holds too many unfinished requests and unread answers."
            )

    def _respond(self, call: Call) -> None:
        if not call.responding:
            call.responding = True
            self._out.append(
                frame(
                    wire.HEADERS, wire.END_HEADERS, call.stream, self._updated(wire.RESPONSE_BLOCK)
                )
            )

    def _updated(self, block: bytes) -> bytes:
        """A header block; the first after the peer made its table smaller says that ours is empty."""
        update, self._size_update = self._size_update, b""
        return update + block

    def _end_stream(self, call: Call) -> None:
        call.task = None
        if call.pending:
            call.finishing = True
        else:
            self._respond(call)
            self._send_ok(call)

    def _send_ok(self, call: Call) -> None:
        self._out.append(
            frame(
                wire.HEADERS,
                wire.END_HEADERS | wire.END_STREAM,
                call.stream,
                self._updated(wire.OK_BLOCK),
            )
        )
        self._close_call(call)

    def _finish_with(self, call: Call, error: Aborted) -> None:
        """Trailers with the status of a failed call; nothing else if the answer had not begun."""
        block = wire.status_block(error.code, error.message, error.trailing)
        if not call.responding:
            block = wire.RESPONSE_BLOCK + block
        self._out.append(
            frame(
                wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, call.stream, self._updated(block)
            )
        )
        if not call.ended:
            self._out.append(
                frame(wire.RST_STREAM, 0, call.stream, wire.NO_ERROR.to_bytes(4, "big"))
            )
        self._close_call(call)

    def _refuse(self, call: Call, refusal: int | Aborted) -> None:
        if isinstance(refusal, Aborted):
            self._finish_with(call, refusal)
            return
        block = wire.literal(b":status", str(refusal).encode())
        self._out.append(
            frame(
                wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, call.stream, self._updated(block)
            )
        )
        self._close_call(call)

    def _send_refusal(self, stream: int, refusal: wire.Refusal) -> None:
        """The answer to a call that is not let in; it leaves with the others of this read."""
        self._pause = refusal.pause_seconds
        if self._size_update:
            self._out.append(
                frame(
                    wire.HEADERS,
                    wire.END_HEADERS | wire.END_STREAM,
                    stream,
                    self._updated(refusal.block),
                )
            )
        else:
            self._out.append(refusal.start + stream.to_bytes(4, "big") + refusal.block)

    def _close_call(self, call: Call) -> None:
        self._served += 1
        self.calls.pop(call.stream, None)
        if call.timer is not None or call.task is not None:
            call.drop()
        if call.held:
            self._buffered -= call.held
            self._starved.pop(call.stream, None)
        if self.draining and not self.calls:
            self._leave()


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise WireError(wire.PROTOCOL_ERROR, "padding")
    return payload[1 : len(payload) - payload[0]]
