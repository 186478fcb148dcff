"""What one connection does, and what another one notices: time, memory, places, descriptors."""

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import hpack
import pytest

from benchmarks.faults.attacks import Attack, attacks, fuzzing, run_attack
from retrieval.http2 import frames, limits
from retrieval.http2.calls import Call, Head, UnaryHandler
from retrieval.http2.limits import CONTROL_FRAME_BUDGET, Lifetimes
from retrieval.http2.server import Http2Server, connections_allowed
from tests.helpers.serving.raw_http2 import (
    FIELDS,
    HELLO,
    Code,
    Running,
    body,
    ended,
    fields_of,
    goaway_code,
    message,
    open_channel,
    opening,
    read_frames,
    read_until_pong,
    request,
    statuses,
)
from tests.helpers.waiting import until

MIB = 2**20
PING = frames.frame(frames.PING, 0, 0, bytes(8))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(max_streams=100)
    yield found
    found.stop(1.0)


class Neighbour:
    """Asks again and again on a connection of its own, in a thread."""

    def __init__(self, running: Running) -> None:
        self.slowest = 0.0
        self.asked = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._connection = running.connect()
        self._connection.sendall(HELLO)
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        encoder = hpack.Encoder()
        stream = 1
        try:
            while not self._stop.is_set():
                began = time.perf_counter()
                self._connection.sendall(request(stream, b"now", encoder=encoder))
                assert body(read_frames(self._connection, ended(stream)), stream) == b"now"
                self.slowest = max(self.slowest, time.perf_counter() - began)
                self.asked += 1
                stream += 2
                time.sleep(0.005)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> "Neighbour":
        until(lambda: self.asked > 3)
        return self

    def __exit__(self, *rest: object) -> None:
        self._stop.set()
        self._thread.join(20)
        self._connection.close()
        assert self.error is None, self.error


FRAME_ATTACKS = [
    attack for attack in attacks() if "bomb" not in attack.name and "batches" not in attack.name
]


@pytest.mark.slow
@pytest.mark.parametrize("attack", FRAME_ATTACKS, ids=lambda attack: attack.name)
def test_flood_of_one_connection_hardly_delays_another(running: Running, attack: Attack) -> None:
    """The attacker shares this process with the neighbour, so that the bound is a wide one."""
    with Neighbour(running) as neighbour:
        run_attack(attack, running.port, 1.0)
    assert neighbour.slowest < 1.0
    until(lambda: running.server.buffers.held == 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_frames_of_one_connection_leave_another_alone(running: Running, seed: int) -> None:
    with Neighbour(running) as neighbour:
        run_attack(fuzzing(seed), running.port, 1.5)
    assert neighbour.slowest < 1.0


# --- time ---


def test_long_read_is_served_in_slices(running: Running) -> None:
    """Many calls that came in one read do not hold up another connection until all are answered."""
    calls = b"".join(request(stream, b"now" + bytes(1000)) for stream in range(1, 401, 2))
    with running.connect() as connection:
        connection.sendall(HELLO + frames.window_update(0, 2**24) + calls)
        found = read_frames(connection, ended(*range(1, 401, 2)))
        assert len(statuses(found)) == 200
        until(lambda: running.server.buffers.held == 0)


CHARGED: dict[str, bytes] = {
    "unknown types": frames.frame(0xAA, 0, 0),
    "DATA of a closed stream": frames.frame(frames.DATA, 0, 1),
    "WINDOW_UPDATE of a closed stream": frames.window_update(1, 1),
    "RST_STREAM of a closed stream": frames.frame(frames.RST_STREAM, 0, 1, bytes(4)),
    "PRIORITY": frames.frame(frames.PRIORITY, 0, 1, bytes(5)),
    "GOAWAY": frames.frame(frames.GOAWAY, 0, 0, bytes(8)),
    "PING": PING,
    "acknowledgements": frames.frame(frames.PING, frames.ACK, 0, bytes(8)),
}


def send_all(connection: socket.socket, content: bytes) -> None:
    """Send what the server may refuse to take."""
    with contextlib.suppress(OSError):
        connection.sendall(content)


@pytest.mark.parametrize("kind", CHARGED)
def test_budget_every_frame_that_is_no_call_is_charged(running: Running, kind: str) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        read_frames(connection, ended(1))
        flood = CHARGED[kind] * (CONTROL_FRAME_BUDGET + 1000)
        sender = threading.Thread(target=send_all, args=(connection, flood))
        sender.start()
        with contextlib.suppress(OSError):
            found = read_frames(connection, lambda found: goaway_code(found) is not None)
            assert goaway_code(found) == frames.ENHANCE_YOUR_CALM
        sender.join()


REFUSED: dict[str, list[tuple[str, str]]] = {
    "malformed": [*FIELDS, ("X", "1")],
    "no such method": [(n, "/t.T/Nothing" if n == ":path" else v) for n, v in FIELDS],
    "no gRPC": [*FIELDS[:3], ("content-type", "text/html")],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_budget_requests_that_are_no_calls_are_charged(
    running: Running, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_FRAME_BUDGET", 100)
    monkeypatch.setattr(limits, "CONTROL_FRAMES_PER_SECOND", 0)
    with running.connect() as connection:
        connection.sendall(
            HELLO + b"".join(request(2 * i + 1, b"now", REFUSED[kind]) for i in range(300))
        )
        with contextlib.suppress(OSError):
            found = read_frames(connection, lambda found: goaway_code(found) is not None)
            assert goaway_code(found) == frames.ENHANCE_YOUR_CALM


@pytest.mark.slow
def test_budget_fills_up_with_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a rate: a connection that is kept alive by pings lives as long as it likes."""
    monkeypatch.setattr(limits, "CONTROL_FRAME_BUDGET", 50)
    monkeypatch.setattr(limits, "CONTROL_FRAMES_PER_SECOND", 400)
    with running.connect() as connection:
        connection.sendall(HELLO)
        for _ in range(20):
            connection.sendall(PING * 40)
            found = read_until_pong(connection)
            assert goaway_code(found) is None
            time.sleep(0.12)


# --- headers ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [("x-large", "a" * 20_000)],
        [("x-large", "!" * 60_000)],
        [(f"x-{number}", "1") for number in range(150)],
        [("x-same", "1")] * 2000,
    ],
    ids=["20 KB", "60 KB", "150 fields", "2,000 fields"],
)
def test_headers_beyond_the_limit_end_their_call_alone(
    running: Running, more: list[tuple[str, str]]
) -> None:
    """The table of the connection stays in step, too."""
    encoder = hpack.Encoder()
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"5", fields_of("Slow"), encoder))
        block = encoder.encode([*FIELDS, *more])
        pieces = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
        sent = frames.frame(frames.HEADERS, 0, 3, pieces[0])
        for piece in pieces[1:]:
            sent += frames.frame(frames.CONTINUATION, 0, 3, piece)
        sent += frames.frame(frames.CONTINUATION, frames.END_HEADERS, 3)
        sent += frames.frame(frames.DATA, frames.END_STREAM, 3, message(b"now"))
        again = [*FIELDS, ("x-later", "b" * 50)]
        connection.sendall(sent + request(5, b"now", again, encoder))
        found = read_frames(connection, ended(3, 5))
        assert statuses(found) == {3: 8, 5: 0} and goaway_code(found) is None
        connection.sendall(request(7, b"now", again, encoder))
        assert body(read_frames(connection, ended(7)), 7) == b"now"


def test_headers_without_end_end_the_connection(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + frames.frame(frames.HEADERS, 0, 1, b"\x83"))
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(frames.frame(frames.CONTINUATION, 0, 1, bytes(16_384)))
        with contextlib.suppress(OSError):
            found = read_frames(connection, lambda found: goaway_code(found) is not None)
            assert goaway_code(found) == frames.ENHANCE_YOUR_CALM


# --- memory ---


@contextlib.contextmanager
def small_server(**options: Any) -> Iterator[Running]:
    found = Running(**options)
    try:
        yield found
    finally:
        found.stop(0.5)


def test_buffers_of_all_connections_are_bounded_and_the_largest_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_SHARED_BYTES", 8 * MIB)
    with small_server() as running, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(running.connect()) for _ in range(4)]
        for number, peer in enumerate(peers):
            size = (3 if number else 4) * MIB
            begun = message(bytes(5 * MIB))[:size]
            pieces = [begun[at : at + 16_384] for at in range(0, size, 16_384)]
            sent = (
                HELLO
                + opening(1)
                + b"".join(frames.frame(frames.DATA, 0, 1, piece) for piece in pieces)
            )
            with contextlib.suppress(OSError):
                peer.sendall(sent)
        until(lambda: len(running.server.connections) < 4)
        assert running.server.buffers.held <= 8 * MIB
        with running.connect() as other:
            other.sendall(HELLO + request(1, b"now"))
            assert body(read_frames(other, ended(1)), 1) == b"now"


@pytest.mark.slow
def test_answers_that_nobody_reads_are_bounded(running: Running) -> None:
    """A peer with endless windows that does not read: its calls wait unread instead."""
    content = b"now" + bytes(200_000)
    whole = message(content)
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.settimeout(1.0)
        endless = frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31 - 1})
        connection.sendall(frames.PREFACE + endless + frames.window_update(0, 2**31 - 70_000))
        with contextlib.suppress(OSError):
            for stream in range(1, 2001, 2):
                connection.sendall(
                    opening(stream)
                    + b"".join(frames.frame(frames.DATA, 0, stream, piece) for piece in pieces)
                    + frames.frame(frames.DATA, frames.END_STREAM, stream)
                )
        (inside,) = [c for c in running.server.connections if c.streams.last > 1]
        assert inside.out.transport is not None
        assert inside.out.transport.get_write_buffer_size() < 8 * MIB
        assert inside.streams.buffers.held < limits.MAX_BUFFERED_BYTES
        connection.settimeout(20)
        found = read_frames(connection, lambda found: len(found) > 100)
        assert goaway_code(found) is None, "it reads again, and gets what it asked for"


@pytest.mark.slow
def test_stalled_connections_are_ended_and_busy_ones_are_not() -> None:
    lifetimes = Lifetimes(stalled_seconds=0.4)
    with small_server(lifetimes=lifetimes) as running, running.connect() as working:
        working.sendall(HELLO + request(1, b"2.5", fields_of("Slow")))
        stalled: list[bytes] = [
            HELLO + opening(1) + frames.frame(frames.DATA, 0, 1, message(bytes(9))[:7]),
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) + request(1, b"now"),
        ]
        for sent in stalled:
            with running.connect() as connection:
                connection.sendall(sent)
                read_until_pong(connection)
                until(lambda: len(running.server.connections) == 1)
        assert body(read_frames(working, ended(1)), 1) == b"late"


@pytest.mark.slow
def test_idle_and_old_connections_are_asked_to_go_and_lose_no_call() -> None:
    for lifetimes in (
        Lifetimes(max_idle_seconds=0.5, stalled_seconds=0.4),
        Lifetimes(max_age_seconds=0.5, stalled_seconds=0.4),
    ):
        with small_server(lifetimes=lifetimes) as running, open_channel(running) as channel:
            echo = channel.unary_unary("/t.T/Echo")
            for _ in range(30):
                assert echo(b"now", timeout=20) == b"now"
                time.sleep(0.05)
            with running.connect() as connection:
                connection.sendall(HELLO)
                found = read_frames(connection, lambda found: goaway_code(found) is not None)
                assert goaway_code(found) == frames.NO_ERROR


# --- how many ---


@pytest.mark.slow
def test_connections_beyond_the_limit_replace_the_idlest() -> None:
    with small_server(max_connections=5) as running, contextlib.ExitStack() as stack:
        busy = stack.enter_context(running.connect())
        busy.sendall(HELLO + request(1, b"1.5", fields_of("Slow")))
        until(lambda: running.behaviour.started == 1)
        idle = [stack.enter_context(running.connect()) for _ in range(20)]
        until(lambda: len(running.server.connections) <= 5)
        with running.connect() as new:
            new.sendall(HELLO + request(1, b"now"))
            assert body(read_frames(new, ended(1)), 1) == b"now"
        assert body(read_frames(busy, ended(1)), 1) == b"late"
        assert len(idle) == 20


def test_connections_allowed_leaves_descriptors_for_others() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 <= connections_allowed() < soft


def test_shared_listener_accepts_a_flood_in_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that share a socket wait for each other, but not for every connection."""
    turns: list[int] = []
    accept = Http2Server._accept
    monkeypatch.setattr(
        Http2Server, "_accept", lambda self, *rest: (turns.append(1), accept(self, *rest))[1]
    )
    connected = threading.Event()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        with small_server(listener=listener) as running, contextlib.ExitStack() as stack:
            first = stack.enter_context(running.connect())
            first.sendall(HELLO + request(1, b"now"))
            read_frames(first, ended(1))
            running.loop.call_soon_threadsafe(connected.wait, 60)
            del turns[:]
            for _ in range(400):
                stack.enter_context(running.connect())
            connected.set()
            until(lambda: len(running.server.connections) == 401)
            assert len(turns) < 20


# --- what handlers expect of a context ---


class Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...]


def served(handler: Callable[[bytes, Call], Any]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler("t.Own", {"Call": UnaryHandler(handler)})


def test_call_has_what_a_servicer_context_has(running: Running) -> None:
    seen: dict[str, Any] = {}
    finished: list[bool] = []

    async def handler(content: bytes, call: Call) -> bytes:
        seen["peer"] = call.peer()
        seen["state"] = call.cancelled(), call.done(), call.code(), call.auth_context()
        seen["identity"] = call.peer_identities(), call.peer_identity_key()
        call.add_done_callback(lambda ended: finished.append(ended.done()))
        await call.send_initial_metadata((("x-first", "1"),))
        call.set_trailing_metadata((("x-last", "2"), ("x-last-bin", b"\x00\xff")))
        if content == b"fail":
            call.set_code(grpc.StatusCode.ABORTED)
            call.set_details("as it said")
        return content

    running.server.add_generic_rpc_handlers((served(handler),))
    with open_channel(running) as channel:
        call = channel.unary_unary("/t.Own/Call")
        answer, done = call.with_call(b"fine", timeout=20)
        assert answer == b"fine" and ("x-first", "1") in done.initial_metadata()
        assert {("x-last", "2"), ("x-last-bin", b"\x00\xff")} <= set(done.trailing_metadata())
        with pytest.raises(grpc.RpcError) as caught:
            call(b"fail", timeout=20)
        assert caught.value.code() is Code.ABORTED and caught.value.details() == "as it said"
        assert ("x-last", "2") in caught.value.trailing_metadata()
    until(lambda: finished == [True, True])
    assert seen["peer"].startswith("ipv4:127.0.0.1:")
    assert seen["state"] == (False, False, Code.OK, {}) and seen["identity"] == (None, None)


def test_call_has_every_method_of_grpcs_contexts() -> None:
    for context in (grpc.aio.ServicerContext, grpc.ServicerContext):
        names = {name for name in dir(context) if not name.startswith("_")}
        assert names - set(dir(Call)) - {"read"} == set(), "handlers iterate instead of read"


def test_call_cancelled_by_its_handler_tells_the_client(running: Running) -> None:
    seen: list[Any] = []

    async def handler(content: bytes, call: Call) -> bytes:
        assert call.is_active() and call.add_callback(lambda: seen.append("ended"))
        assert call.cancel()
        try:
            await asyncio.sleep(30)
        finally:
            seen.append(call.cancelled())
        return content

    async def refuse(content: bytes, call: Call) -> bytes:
        await call.abort_with_status(Status(Code.ABORTED, "not now", (("x-a", "1"),)))
        raise AssertionError

    handlers = {"Call": UnaryHandler(handler), "Refuse": UnaryHandler(refuse)}
    running.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("t.Own3", handlers),)
    )
    with open_channel(running) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/t.Own3/Call")(b"", timeout=20)
        assert caught.value.code() is Code.CANCELLED
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/t.Own3/Refuse")(b"", timeout=20)
        assert caught.value.code() is Code.ABORTED and caught.value.details() == "not now"
        assert ("x-a", "1") in caught.value.trailing_metadata()
    until(lambda: seen == [True, "ended"])


def test_call_cancelled_by_its_client_says_so(running: Running) -> None:
    seen: list[tuple[bool, bool]] = []
    begun = threading.Event()

    async def handler(content: bytes, call: Call) -> bytes:
        call.add_done_callback(lambda ended: seen.append((ended.cancelled(), ended.done())))
        begun.set()
        await asyncio.sleep(30)
        return content

    running.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("t.Own2", {"Call": UnaryHandler(handler)}),)
    )
    with open_channel(running) as channel:
        call = channel.unary_unary("/t.Own2/Call").future(b"", timeout=20)
        assert begun.wait(20)
        call.cancel()
        until(lambda: seen == [(True, True)])


def test_stream_writer_waits_for_a_client_that_does_not_read(running: Running) -> None:
    written: list[int] = []

    async def count(request: bytes, call: Call) -> Any:
        for number in range(100):
            yield bytes(100_000)
            written.append(number)

    handlers = {"Count": grpc.unary_stream_rpc_method_handler(count)}
    running.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("t.Own3", handlers),)
    )
    fields = [(n, "/t.Own3/Count" if n == ":path" else v) for n, v in FIELDS]
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"", fields))
        until(lambda: len(written) >= 1)
        time.sleep(0.2)
        assert len(written) < 5
        connection.sendall(frames.window_update(0, 2**24) + frames.window_update(1, 2**24))
        read_frames(connection, ended(1))
        assert len(written) == 100


async def test_connections_that_are_ended_already_make_no_room() -> None:
    server = Http2Server(max_receive_bytes=MIB, max_send_bytes=MIB, max_streams=10)
    first, second = server.make_connection(), server.make_connection()
    for number, connection in enumerate((first, second)):
        server.connections.add(connection)
        connection.last_read = float(number)
    assert server._end_idlest() and first.closed and not second.closed
    assert server._end_idlest() and second.closed
    assert not server._end_idlest()


async def test_bytes_of_a_connection_ended_while_it_holds_more_are_released_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_SHARED_BYTES", 1000)
    server = Http2Server(max_receive_bytes=MIB, max_send_bytes=MIB, max_streams=10)
    connection = server.make_connection()
    server.connections.add(connection)
    call = Call(connection.responses, 1, Head())
    connection.streams.calls[1] = call
    connection.streams.flow.congested[1] = call
    call.pending = bytearray(2000)
    buffers = connection.streams.buffers
    buffers.hold(call)
    assert connection.closed and not connection.streams.flow.congested
    buffers.release(call, 500)
    assert (buffers.held, call.held, server.buffers.held) == (0, 0, 0)
