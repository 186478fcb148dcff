"""The HTTP/2 transport against grpcio's clients and against bytes that no client of grpcio would
send.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.http2 import frames as wire
from retrieval.http2.connection import NOISE_ALLOWANCE
from tests.helpers.raw_http2 import (
    FIELDS,
    HELLO,
    MAX_RECEIVE,
    Code,
    Running,
    body,
    ended,
    frames,
    goaway,
    open_channel,
    request,
)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.stop(1.0)


@pytest.fixture(scope="module")
def channel(running: Running) -> Iterator[grpc.Channel]:
    with open_channel(running) as found:
        yield found


def fails(call, content, code: grpc.StatusCode, **options) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(content, **{"timeout": 20, **options})
    assert caught.value.code() is code, caught.value
    return caught.value


@pytest.mark.parametrize(
    "size", [0, 1, 5, 100, 16_374, 16_375, 16_384, 65_535, 70_000, 1_100_000, 5_000_000]
)
@pytest.mark.parametrize("start", [b"now", b"later"])
def test_messages_of_all_sizes_come_back(channel: grpc.Channel, size: int, start: bytes) -> None:
    content = (start + bytes(range(256)) * (size // 256 + 1))[:size]
    assert channel.unary_unary("/t.T/Echo")(content, timeout=20) == content


def test_many_calls_at_once_on_one_connection_keep_their_answers(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/t.T/Echo")
    contents = [
        (b"now" if i % 3 else b"") + str(i).encode() * (1 + i * 37 % 40_000) for i in range(400)
    ]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda content: echo(content, timeout=60), contents)) == contents


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_read(running: Running, compression: grpc.Compression) -> None:
    with open_channel(running) as channel:
        content = b"again " * 10_000
        assert (
            channel.unary_unary("/t.T/Echo")(content, timeout=20, compression=compression)
            == content
        )


def test_metadata_arrives_and_errors_carry_their_message_and_trailers(
    running: Running, channel: grpc.Channel
) -> None:
    channel.unary_unary("/t.T/Echo")(
        b"later", timeout=20, metadata=(("a-key", "value"), ("b-bin", b"\x00\x01\xfe"))
    )
    assert {("a-key", "value"), ("b-bin", b"\x00\x01\xfe")} <= set(running.behaviour.seen[-1])
    message = 'größer 100% – "日本"\n'
    error = fails(channel.unary_unary("/t.T/Fail"), message.encode(), Code.FAILED_PRECONDITION)
    assert error.details() == message
    assert {("retry-after-ms", "7"), ("x-bin", b"\x00\xff")} <= set(error.trailing_metadata())
    assert "secret" not in fails(channel.unary_unary("/t.T/Crash"), b"", Code.INTERNAL).details()
    fails(channel.unary_unary("/t.T/Nothing"), b"", Code.UNIMPLEMENTED)
    fails(channel.unary_unary("/t.T/Echo"), b"x" * (MAX_RECEIVE + 1), Code.RESOURCE_EXHAUSTED)
    assert channel.unary_unary("/t.T/Echo")(b"fine", timeout=20) == b"fine"


def test_a_passed_deadline_and_a_cancelled_call_stop_the_work(
    running: Running, channel: grpc.Channel
) -> None:
    before = running.behaviour.cancelled
    fails(channel.unary_unary("/t.T/Slow"), b"30", Code.DEADLINE_EXCEEDED, timeout=0.2)
    call = channel.unary_unary("/t.T/Slow").future(b"30", timeout=60)
    time.sleep(0.2)
    call.cancel()
    until = time.monotonic() + 10
    while running.behaviour.cancelled < before + 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert running.behaviour.cancelled == before + 2


def test_streams_flow_both_ways(channel: grpc.Channel) -> None:
    assert [int(x) for x in channel.unary_stream("/t.T/Count")(b"500", timeout=20)] == list(
        range(500)
    )
    sent = [b"a", b"", b"c" * 100_000]
    assert list(channel.stream_stream("/t.T/Chat")(iter(sent), timeout=20)) == [x * 2 for x in sent]


def test_a_server_that_leaves_fails_no_call() -> None:
    """Calls under way finish; later ones go to the server that took the port over; none fails."""
    first = Running()
    channel = open_channel(first)
    echo, slow = channel.unary_unary("/t.T/Echo"), channel.unary_unary("/t.T/Slow")
    assert echo(b"x", timeout=20) == b"x"
    under_way = [slow.future(b"0.7", timeout=20) for _ in range(20)]
    time.sleep(0.2)
    stopping = threading.Thread(target=first.stop, args=(10.0,))
    stopping.start()
    while first.server._listeners:  # the port is free once it has stopped listening
        time.sleep(0.01)
    second = Running(first.port)
    for i in range(300):
        assert echo(str(i).encode(), timeout=20, wait_for_ready=True) == str(i).encode()
    assert [call.result() for call in under_way] == [b"late"] * 20
    stopping.join(20)
    channel.close()
    second.stop(1.0)


# --- bytes ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from([b"now", b"later"]))
def test_frames_may_be_cut_anywhere(running: Running, cuts: list[int], content: bytes) -> None:
    encoder = (
        hpack.Encoder()
    )  # the second request's headers are indexes into the table that the first filled
    sent = (
        HELLO + request(1, content, encoder=encoder) + request(3, content + b"!", encoder=encoder)
    )
    with running.connect() as connection:
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(sent)]):
            if sent[start:end]:
                connection.sendall(sent[start:end])
                time.sleep(0.0005)
        found = frames(connection, ended(1, 3))
    assert (body(found, 1), body(found, 3)) == (content, content + b"!")


def test_padding_priority_and_continuation_are_understood(running: Running) -> None:
    block = hpack.Encoder().encode([*FIELDS, ("x-long", "y" * 300)])
    start = b"\x04" + b"\x00\x00\x00\x00\x10" + block[:20] + b"\x00" * 4
    message = b"\x03" + b"\x00\x00\x00\x00\x05" + b"hello" + b"\x00" * 3
    sent = (
        wire.frame(wire.HEADERS, wire.PADDED | wire.PRIORITISED, 1, start)
        + wire.frame(wire.CONTINUATION, 0, 1, block[20:50])
        + wire.frame(wire.CONTINUATION, wire.END_HEADERS, 1, block[50:])
        + wire.frame(wire.DATA, wire.PADDED, 1, message)
        + wire.frame(wire.DATA, wire.END_STREAM, 1, b"")
    )
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        assert body(frames(connection, ended(1)), 1) == b"hello"


@pytest.mark.parametrize("content", [b"now" * 200, b"later" * 200])
def test_an_answer_waits_for_the_clients_window(running: Running, content: bytes) -> None:
    with running.connect() as connection:
        connection.sendall(
            wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: 10}) + request(1, content)
        )
        first = frames(connection, lambda found: any(kind == wire.DATA for kind, *_ in found))
        assert sum(len(payload) for kind, _, _, payload in first if kind == wire.DATA) == 10
        connection.sendall(wire.window_update(1, 90))
        second = frames(connection, lambda found: any(kind == wire.DATA for kind, *_ in found))
        assert sum(
            len(payload) for kind, _, _, payload in second if kind == wire.DATA
        ) == 90 and not ended(1)(second)
        connection.sendall(wire.settings({wire.INITIAL_WINDOW_SIZE: 100_000}))
        found = first + second + frames(connection, ended(1))
    assert body(found, 1) == content


def test_a_smaller_header_table_is_acknowledged_in_the_next_block(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            wire.PREFACE + wire.settings({wire.HEADER_TABLE_SIZE: 0}) + request(1, b"now")
        )
        found = frames(connection, ended(1))
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    for kind, _, _, payload in found:
        if kind == wire.HEADERS:
            decoder.decode(payload)
    assert body(found, 1) == b"now"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + b" " * 20, wire.PROTOCOL_ERROR),
        (HELLO + wire.frame(wire.DATA, 0, 1, b"x"), wire.PROTOCOL_ERROR),
        (HELLO + wire.frame(wire.CONTINUATION, 0, 1, b"x"), wire.PROTOCOL_ERROR),
        (
            HELLO + wire.frame(wire.HEADERS, 0, 1, b"") + wire.frame(wire.PING, 0, 0, b"12345678"),
            wire.PROTOCOL_ERROR,
        ),
        (HELLO + wire.frame(wire.HEADERS, wire.END_HEADERS, 2, b"\x82"), wire.PROTOCOL_ERROR),
        (
            HELLO + wire.frame(wire.HEADERS, wire.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
            wire.COMPRESSION_ERROR,
        ),
        (
            HELLO + wire.frame(wire.HEADERS, wire.END_HEADERS | wire.PADDED, 1, b"\x09"),
            wire.PROTOCOL_ERROR,
        ),
        (HELLO + b"\x01\x00\x00" + bytes(6) + bytes(20), wire.FRAME_SIZE_ERROR),
        (HELLO + wire.frame(wire.SETTINGS, 0, 0, b"12345"), wire.FRAME_SIZE_ERROR),
        (HELLO + wire.settings({wire.INITIAL_WINDOW_SIZE: 2**31}), wire.FLOW_CONTROL_ERROR),
        (HELLO + wire.settings({wire.MAX_FRAME_SIZE: 1}), wire.PROTOCOL_ERROR),
        (HELLO + wire.window_update(0, 0), wire.PROTOCOL_ERROR),
        (HELLO + wire.window_update(0, 2**31 - 1), wire.FLOW_CONTROL_ERROR),
        (HELLO + wire.frame(wire.RST_STREAM, 0, 5, bytes(4)), wire.PROTOCOL_ERROR),
        (HELLO + wire.frame(wire.PUSH_PROMISE, 0, 1, bytes(8)), wire.PROTOCOL_ERROR),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_told_and_let_go(
    running: Running, sent: bytes, code: int
) -> None:
    with running.connect() as connection:
        connection.sendall(sent)
        assert goaway(frames(connection, lambda found: False)) == code


@pytest.fixture
def closed(running: Running) -> Iterator[None]:
    running.behaviour.closed = True
    yield
    running.behaviour.closed = False


@pytest.mark.parametrize(
    ("path", "content"),
    [("/t.T/Guarded", b"x"), ("/t.T/Guarded", b"x" * 3_000_000), ("/t.T/Echo", b"full")],
)
def test_a_refused_call_of_grpcio_has_its_status_and_hint(
    running: Running, channel: grpc.Channel, closed: None, path, content
) -> None:
    running.behaviour.seen.clear()
    for _ in range(3):
        error = fails(channel.unary_unary(path), content, Code.RESOURCE_EXHAUSTED)
        assert (
            error.details() == "100% full" and ("retry-after-ms", "9") in error.trailing_metadata()
        )
    assert not running.behaviour.seen, "its message reached nobody"
    assert channel.unary_unary("/t.T/Echo")(b"others", timeout=20) == b"others"


GUARDED = [(name, "/t.T/Guarded" if name == ":path" else value) for name, value in FIELDS]


def test_a_refusal_does_not_wait_for_the_message_and_forgets_it_when_it_comes(
    running: Running, closed: None
) -> None:
    with running.connect() as connection:
        block = hpack.Encoder().encode(GUARDED)
        connection.sendall(
            HELLO
            + b"".join(
                wire.frame(wire.HEADERS, wire.END_HEADERS, stream, block) for stream in (1, 3, 5)
            )
        )
        found = frames(connection, ended(1, 3, 5))
        fields = dict(
            hpack.Decoder().decode(next(payload for kind, _, s, payload in found if s == 3))
        )
        assert (fields[":status"], fields["grpc-status"], fields["retry-after-ms"]) == (
            "200",
            "8",
            "9",
        )
        connection.sendall(
            wire.frame(wire.DATA, 0, 1, bytes(1000))
            + wire.frame(wire.DATA, wire.END_STREAM, 3, bytes(1000))
        )
        connection.sendall(
            wire.frame(wire.RST_STREAM, 0, 5, bytes(4))
            + wire.frame(wire.DATA, 0, 1, bytes(1000))
            + request(7, b"now")
        )
        late = frames(connection, ended(7))
        assert body(late, 7) == b"now"
        resets = [stream for kind, _, stream, _ in late if kind == wire.RST_STREAM]
        assert resets == [1], "who goes on sending is told to stop, once"
        inside = next(iter(running.server.connections))
        assert not inside._turned_away and not inside.calls


def test_refused_streams_that_stay_open_count_as_open(closed: None) -> None:
    small = Running(max_streams=4)
    small.behaviour.closed = True
    with small.connect() as connection:
        block = hpack.Encoder().encode(GUARDED)
        connection.sendall(
            HELLO
            + b"".join(
                wire.frame(wire.HEADERS, wire.END_HEADERS, stream, block)
                for stream in range(1, 13, 2)
            )
        )
        found = frames(
            connection, lambda found: sum(kind == wire.RST_STREAM for kind, _, _, _ in found) == 2
        )
        assert [stream for kind, _, stream, _ in found if kind == wire.HEADERS] == [1, 3, 5, 7]
        assert [stream for kind, _, stream, _ in found if kind == wire.RST_STREAM] == [9, 11]
    small.stop(0.5)


def test_floods_of_cheap_frames_end_the_connection(running: Running) -> None:
    """Opening and resetting streams, or pinging, without end (the rapid-reset attack) costs the
    attacker the connection.
    """
    encoder = hpack.Encoder()
    opening = [request(1, b"later", encoder=encoder)]
    opening += [
        wire.frame(wire.HEADERS, wire.END_HEADERS, 2 * i + 3, encoder.encode(FIELDS))
        + wire.frame(wire.RST_STREAM, 0, 2 * i + 3, bytes(4))
        for i in range(2 * NOISE_ALLOWANCE)
    ]
    for flood in (
        b"".join(opening),
        wire.frame(wire.PING, 0, 0, b"12345678") * (3 * NOISE_ALLOWANCE),
    ):
        with running.connect() as connection:
            reader = ThreadPoolExecutor(1).submit(
                frames, connection, lambda found: goaway(found) is not None
            )
            with contextlib.suppress(OSError):  # it may be closed while we are still shouting
                connection.sendall(HELLO + flood)
            with contextlib.suppress(OSError):  # or reset, which is as good
                assert goaway(reader.result(30)) == wire.ENHANCE_YOUR_CALM


def test_what_is_no_grpc_call_gets_an_http_status(running: Running) -> None:
    for fields, status in (
        ([(":method", "GET"), *FIELDS[1:]], "405"),
        ([*FIELDS[:3], ("content-type", "text/html")], "415"),
    ):
        with running.connect() as connection:
            connection.sendall(HELLO + request(1, b"", fields))
            headers = [
                payload
                for kind, _, _, payload in frames(connection, ended(1))
                if kind == wire.HEADERS
            ]
        assert (":status", status) in hpack.Decoder().decode(headers[0])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", Code.INVALID_ARGUMENT),
        (b"\x00\x00\x00\x00\x05hell", Code.INVALID_ARGUMENT),
        (b"\x00\x00\x00\x00\x01a" * 2, Code.INVALID_ARGUMENT),
        (b"\x01\x00\x00\x00\x04abcd", Code.UNIMPLEMENTED),
        (b"\x00\x7f\xff\xff\xff", Code.RESOURCE_EXHAUSTED),
    ],
)
def test_bytes_that_are_no_message_get_a_typed_error(
    running: Running, content: bytes, code: grpc.StatusCode
) -> None:
    sent = wire.frame(
        wire.HEADERS, wire.END_HEADERS, 1, hpack.Encoder().encode(FIELDS)
    ) + wire.frame(wire.DATA, wire.END_STREAM, 1, content)
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        headers = [
            payload for kind, _, _, payload in frames(connection, ended(1)) if kind == wire.HEADERS
        ]
    assert ("grpc-status", str(code.value[0])) in hpack.Decoder().decode(headers[-1])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11), st.integers(0, 255), st.integers(0, 9), st.binary(max_size=40)
        ),
        max_size=12,
    ),
    st.binary(),
)
def test_no_bytes_stop_the_server(
    running: Running, sent: list[tuple[int, int, int, bytes]], noise: bytes
) -> None:
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + b"".join(
                wire.frame(kind, flags, stream, payload) for kind, flags, stream, payload in sent
            )
            + noise
        )
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        assert body(frames(connection, ended(1)), 1) == b"now"


def test_nothing_is_left_behind(running: Running) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and any(
        connection.calls for connection in running.server.connections
    ):
        time.sleep(0.05)
    assert not any(
        connection.calls or connection._buffered for connection in running.server.connections
    )
