"""A small server on the HTTP/2 transport, in a thread, and what it takes to send it bytes that no
client of grpcio would send.
"""

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass, field

import grpc
import hpack

from retrieval.http2 import frames
from retrieval.http2.calls import UnaryHandler
from retrieval.http2.refusals import Refusal, refusal
from retrieval.http2.server import Http2Server
from tests.helpers.waiting import PATIENCE_SECONDS

Code = grpc.StatusCode

MAX_RECEIVE = 6 * 2**20
FULL = refusal(Code.RESOURCE_EXHAUSTED, "100% full", (("retry-after-ms", "9"),))


@dataclass
class Behaviour:
    started: int = 0
    """Calls of Slow that have begun."""
    cancelled: int = 0
    seen: list = field(default_factory=list)
    full: bool = False
    """Whether calls of Guarded are refused before their message."""
    pause: float = 0.0
    """Seconds for which such a refusal asks the transport to read nothing."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def handlers(self) -> grpc.GenericRpcHandler:
        async def echo(content: bytes, context) -> bytes:
            await asyncio.sleep(0)
            self.seen.append(context.invocation_metadata())
            return content

        def now(content: bytes, context) -> bytes | Refusal | None:
            if content == b"now boom":
                raise RuntimeError("a bug")
            return FULL if content[:4] == b"full" else content if content[:3] == b"now" else None

        async def guarded(content: bytes, context) -> bytes:
            self.seen.append(content)
            return content

        def refuse(metadata) -> Refusal | None:
            return FULL._replace(pause_seconds=self.pause) if self.full else None

        async def slow(content: bytes, context) -> bytes:
            self.started += 1
            try:
                await asyncio.sleep(float(content))
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return b"late"

        async def fail(content: bytes, context) -> bytes:
            await context.abort(
                Code.FAILED_PRECONDITION,
                content.decode(),
                (("retry-after-ms", "7"), ("x-bin", b"\x00\xff")),
            )
            raise AssertionError

        async def crash(content: bytes, context) -> bytes:
            raise RuntimeError("secret")

        async def count(request: bytes, context):
            for i in range(int(request)):
                yield str(i).encode()

        async def chat(requests, context):
            async for request in requests:
                yield request * 2

        async def hoard(requests, context):
            await self.gate.wait()
            async for request in requests:
                yield str(len(request)).encode()

        unary = grpc.unary_unary_rpc_method_handler
        calls = {
            "Echo": UnaryHandler(echo, answer_now=now),
            "Guarded": UnaryHandler(guarded, refuse=refuse),
            "Slow": unary(slow),
            "Fail": unary(fail),
            "Crash": unary(crash),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
            "Hoard": grpc.stream_stream_rpc_method_handler(hoard),
        }
        return grpc.method_handlers_generic_handler("t.T", calls)


class Running:
    """A server in a thread."""

    def __init__(self, port: int = 0, max_streams: int = 100, **options) -> None:
        self.behaviour = Behaviour()
        self.loop = asyncio.new_event_loop()
        started = threading.Event()

        async def main() -> None:
            self.server = Http2Server(
                max_receive_bytes=MAX_RECEIVE,
                max_send_bytes=MAX_RECEIVE,
                max_streams=max_streams,
                **options,
            )
            self.server.add_generic_rpc_handlers((self.behaviour.handlers(),))
            shared = options.get("listener")
            self.port = (
                shared.getsockname()[1]
                if shared is not None
                else self.server.add_port(f"127.0.0.1:{port}")
            )
            await self.server.start()
            started.set()
            await self.server.wait_for_termination()

        self.thread = threading.Thread(
            target=self.loop.run_until_complete, args=(main(),), daemon=True
        )
        self.thread.start()
        assert started.wait(PATIENCE_SECONDS)

    def stop(self, grace: float) -> None:
        stopped = asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop)
        stopped.result(PATIENCE_SECONDS)
        self.thread.join(PATIENCE_SECONDS)

    def connect(self) -> socket.socket:
        found = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found


def open_channel(running: Running, **options) -> grpc.Channel:
    limits = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.insecure_channel(f"127.0.0.1:{running.port}", options=[*limits, *options.items()])


# --- bytes ---

FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/t.T/Echo"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
HELLO = frames.PREFACE + frames.settings({})


def fields_of(method: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    """The headers of a call of another method than Echo."""
    return [
        (name, f"/t.T/{method}" if name == ":path" else value) for name, value in FIELDS
    ] + list(more)


def opening(stream: int, fields=FIELDS, flags: int = 0) -> bytes:
    """The headers of a call, by themselves."""
    return frames.frame(
        frames.HEADERS, frames.END_HEADERS | flags, stream, hpack.Encoder().encode(fields)
    )


def message(content: bytes, compressed: bool = False) -> bytes:
    """One gRPC message, as DATA frames carry it."""
    return bytes([compressed]) + len(content).to_bytes(4, "big") + content


def request(
    stream: int, content: bytes, fields=FIELDS, encoder: hpack.Encoder | None = None
) -> bytes:
    block = (encoder or hpack.Encoder()).encode(fields)
    return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block) + frames.frame(
        frames.DATA, frames.END_STREAM, stream, message(content)
    )


def read_frames(connection: socket.socket, enough) -> list[tuple[int, int, int, bytes]]:
    """Read until ``enough(frames)``, and no frame is left half read, or the server closes."""
    found: list[tuple[int, int, int, bytes]] = []
    rest = b""
    while rest or not enough(found):
        piece = connection.recv(65536)
        if not piece:
            break
        rest += piece
        while len(rest) >= 9:
            length = int.from_bytes(rest[:3], "big")
            if len(rest) < 9 + length:
                break
            found.append((rest[3], rest[4], int.from_bytes(rest[5:9], "big"), rest[9 : 9 + length]))
            rest = rest[9 + length :]
    return found


def ended(*streams: int):
    return lambda found: (
        {s for kind, flags, s, _ in found if kind == frames.HEADERS and flags & frames.END_STREAM}
        >= set(streams)
    )


def body(found, stream: int) -> bytes:
    return b"".join(
        payload for kind, _, s, payload in found if kind == frames.DATA and s == stream
    )[5:]


def statuses(found) -> dict[int, int]:
    """By stream, the gRPC status that it ended with."""
    decoder = hpack.Decoder()
    fields = [
        (stream, dict(decoder.decode(payload)))
        for kind, _, stream, payload in found
        if kind == frames.HEADERS
    ]
    return {stream: int(named["grpc-status"]) for stream, named in fields if "grpc-status" in named}


def read_until_pong(connection: socket.socket) -> list[tuple[int, int, int, bytes]]:
    """Read what the server sends until it has read everything that was sent so far."""
    connection.sendall(frames.frame(frames.PING, 0, 0, b"so far ?"))
    return read_frames(
        connection,
        lambda found: any(kind == frames.PING and flags & frames.ACK for kind, flags, *_ in found),
    )


def goaway_code(found) -> int | None:
    return next(
        (
            struct.unpack(">LL", payload[:8])[1]
            for kind, _, _, payload in found
            if kind == frames.GOAWAY
        ),
        None,
    )
