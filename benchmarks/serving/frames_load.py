"""A minimal gRPC caller: HTTP/2 frames made once and sent over and over.

So the server is what gets measured.

``grpc.aio`` costs a client some 300 microseconds of CPU per call; on a machine whose cores client
and server share, that measures the client. Here a call costs about a tenth of it, for every server
alike. Answers are checked for their status, not parsed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import hpack

from benchmarks.serving.load import Load, Outcome, Recorder, run_processes
from retrieval.http2 import frames
from retrieval.http2.header_blocks import HeaderReader

WINDOW = 2**30
GRPC = "application/grpc"


class FrameClient(asyncio.Protocol):
    """One connection with a fixed number of calls in flight; each answer starts the next call.

    Args:
        method: Full name of the RPC.
        payloads: Serialised requests, sent in turn.
        first: Index of the first payload.
        lanes: Calls in flight.
    """

    content_type = GRPC
    status = b"grpc-status"
    good_status = b"0"

    def __init__(
        self, method: str, authority: str, payloads: list[bytes], first: int, lanes: int
    ) -> None:
        encoder, fields = hpack.Encoder(), self.fields(method, authority)
        self._blocks = [
            encoder.encode(fields),
            encoder.encode(fields),
        ]  # the second is indexes into what the first put in the table
        self._bodies = [self.framed(payload) for payload in payloads]
        self._next, self._lanes = first, lanes
        self._stream = 1
        self._sent: dict[int, float] = {}
        self._ready: deque[None] = deque()
        self._reader = HeaderReader()
        self._heads: dict[int, tuple[tuple[bytes, bytes], ...]] = {}  # of answers without trailers
        self._window, self._peer_stream_window = frames.DEFAULT_WINDOW, frames.DEFAULT_WINDOW
        self._received = 0
        self._rest = b""
        self._out: list[bytes] = []
        self._transport: Any = None
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recorder: Recorder | None = None
        self.end = 0.0

    def fields(self, method: str, authority: str) -> list[tuple[str, str]]:
        """Headers of every call."""
        return [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", authority),
            ("content-type", self.content_type),
            ("te", "trailers"),
        ]

    def framed(self, payload: bytes) -> bytes:
        """Return what a request's DATA frames carry."""
        return b"\x00" + len(payload).to_bytes(4, "big") + payload

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, with windows that never close."""
        self._transport = transport
        transport.write(  # type: ignore[attr-defined]
            frames.PREFACE
            + frames.settings({frames.INITIAL_WINDOW_SIZE: WINDOW, frames.ENABLE_PUSH: 0})
            + frames.window_update(0, WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail loudly if calls were under way."""
        for future in (self.greeted, self.done):
            if not future.done():
                future.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def start(self, recorder: Recorder, end: float) -> None:
        """Begin all lanes; ``done`` is set when the last answer after ``end`` has come."""
        self.recorder, self.end = recorder, end
        for _ in range(self._lanes):
            self._ask()
        self._flush()

    def body(self, number: int) -> bytes:
        """One message with its prefix."""
        return self._bodies[number % len(self._bodies)]

    def _ask(self) -> None:
        body = self.body(self._next)
        if len(body) > self._window or len(body) > self._peer_stream_window:
            self._ready.append(None)
            return
        self._next += 1
        stream, self._stream = self._stream, self._stream + 2
        self._window -= len(body)
        block = self._blocks[0] if stream == 1 else self._blocks[1]
        self._out.append(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block))
        for at in range(0, len(body), frames.DEFAULT_FRAME_BYTES):
            last = at + frames.DEFAULT_FRAME_BYTES >= len(body)
            piece = body[at : at + frames.DEFAULT_FRAME_BYTES]
            self._out.append(
                frames.frame(frames.DATA, frames.END_STREAM if last else 0, stream, piece)
            )
        self._sent[stream] = time.perf_counter()

    def _flush(self) -> None:
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    def data_received(self, data: bytes) -> None:
        """Take answers; start the next calls."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 9:
            high, low, kind, flags, stream = frames.FRAME.unpack_from(data, at)
            start = at + 9
            stop = start + (high << 16) + low
            if stop > end:
                break
            at = stop
            if kind == frames.DATA:
                self._received += stop - start
                if flags & frames.END_STREAM:
                    self._answered(stream, self._heads.pop(stream))
            elif kind == frames.HEADERS:
                headers = self._reader.read(data[start:stop])
                if flags & frames.END_STREAM:
                    self._answered(stream, headers)
                elif self.content_type != GRPC:
                    self._heads[stream] = headers
            else:
                self._control(kind, flags, stream, data[start:stop])
        self._rest = data[at:]
        if self._received > WINDOW // 4:
            self._out.append(frames.window_update(0, self._received))
            self._received = 0
        self._flush()

    def _answered(self, stream: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        assert self.recorder is not None, "started"
        sent = self._sent.pop(stream)
        status = next((value for name, value in headers if name == self.status), b"none")
        if status == self.good_status:
            self.recorder.answered(sent)
        else:
            name = f"{self.status.decode()} {status.decode()}"
            self.recorder.errors[name] = self.recorder.errors.get(name, 0) + 1
        if time.perf_counter() < self.end:
            self._ask()
        elif not self._sent and not self.done.done():
            self.done.set_result(None)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.SETTINGS and not flags & frames.ACK:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == frames.INITIAL_WINDOW_SIZE:
                    self._peer_stream_window = int.from_bytes(payload[at + 2 : at + 6], "big")
            self._out.append(frames.frame(frames.SETTINGS, frames.ACK, 0))
            if not self.greeted.done():
                self.greeted.set_result(None)
        elif kind == frames.PING and not flags & frames.ACK:
            self._out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
            for _ in range(len(self._ready)):
                self._ready.popleft()
                self._ask()
        elif kind in (frames.GOAWAY, frames.RST_STREAM) and not self.done.done():
            self.done.set_exception(ConnectionError(f"frame {kind}: {payload[:200]!r}"))


class JsonClient(FrameClient):
    """The same for the Connect protocol's unary calls as JSON."""

    content_type = "application/json"
    status = b":status"
    good_status = b"200"

    def framed(self, payload: bytes) -> bytes:
        """Return the payload."""
        return payload


class FrameCalls(NamedTuple):
    """What one client process sends."""

    address: str
    method: str
    payloads: list[bytes]
    client: type[FrameClient]


def frame_load(
    address: str,
    method: str,
    payloads: list[bytes],
    load: Load,
    client: type[FrameClient] = FrameClient,
) -> Outcome:
    """Drive one method in a closed loop with prepared frames instead of gRPC stubs."""
    return run_processes(
        partial(_frame_process, FrameCalls(address, method, payloads, client)), load
    )


def _frame_process(calls: FrameCalls, load: Load, number: int, ready: Any, queue: Any) -> None:
    import uvloop

    address, method, payloads, make = calls

    async def main() -> Outcome:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            lambda: make(method, address, payloads, number * 104_729, load.concurrency),
            host,
            int(port),
        )
        await asyncio.wait_for(client.greeted, 30)
        await asyncio.to_thread(ready.wait, 120)
        begin = time.perf_counter()
        recorder = Recorder(begin + load.warmup_seconds)
        client.start(recorder, recorder.begin + load.seconds)
        await asyncio.wait_for(client.done, load.seconds + load.warmup_seconds + 60)
        return recorder.outcome()

    queue.put(uvloop.run(main()))
