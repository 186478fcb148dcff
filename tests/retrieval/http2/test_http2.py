"""The HTTP/2 transport against clients of grpcio, and against bytes that none of them sends."""

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

from retrieval.http2 import frames
from retrieval.http2.limits import CONTROL_FRAME_BUDGET
from tests.helpers.serving.raw_http2 import (
    FIELDS,
    HELLO,
    MAX_RECEIVE,
    Code,
    Running,
    body,
    ended,
    goaway_code,
    open_channel,
    read_frames,
    request,
)
from tests.helpers.waiting import until


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
def test_unary_call_any_message_size_is_echoed(
    channel: grpc.Channel, size: int, start: bytes
) -> None:
    content = (start + bytes(range(256)) * (size // 256 + 1))[:size]
    assert channel.unary_unary("/t.T/Echo")(content, timeout=20) == content


def test_connection_many_calls_at_once_keep_answers_apart(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/t.T/Echo")
    contents = [
        (b"now" if i % 3 else b"") + str(i).encode() * (1 + i * 37 % 40_000) for i in range(400)
    ]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda content: echo(content, timeout=60), contents)) == contents


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_request_compressed_is_read(running: Running, compression: grpc.Compression) -> None:
    with open_channel(running) as channel:
        content = b"again " * 10_000
        assert (
            channel.unary_unary("/t.T/Echo")(content, timeout=20, compression=compression)
            == content
        )


def test_call_metadata_arrives_and_error_carries_message_and_trailers(
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


def test_call_deadline_passed_or_cancelled_stops_the_work(
    running: Running, channel: grpc.Channel
) -> None:
    behaviour = running.behaviour
    started, cancelled = behaviour.started, behaviour.cancelled
    call = channel.unary_unary("/t.T/Slow").future(b"300", timeout=100)
    until(lambda: behaviour.started == started + 1)
    call.cancel()
    until(lambda: behaviour.cancelled == cancelled + 1)
    seconds = 0.2
    while behaviour.started == started + 1:  # on a busy machine it may end before it has begun
        fails(channel.unary_unary("/t.T/Slow"), b"300", Code.DEADLINE_EXCEEDED, timeout=seconds)
        seconds *= 2
    until(lambda: behaviour.cancelled == cancelled + 2)


def test_streaming_calls_send_and_receive_messages(channel: grpc.Channel) -> None:
    assert [int(x) for x in channel.unary_stream("/t.T/Count")(b"500", timeout=20)] == list(
        range(500)
    )
    sent = [b"a", b"", b"c" * 100_000]
    assert list(channel.stream_stream("/t.T/Chat")(iter(sent), timeout=20)) == [x * 2 for x in sent]


def test_server_stop_drains_without_failing_a_call() -> None:
    """Calls under way finish; later ones go to the server that took the port over; none fails."""
    first = Running()
    channel = open_channel(first)
    echo = channel.unary_unary("/t.T/Echo")
    slow = channel.unary_unary("/t.T/Slow")
    assert echo(b"x", timeout=20) == b"x"
    under_way = [slow.future(b"0.7", timeout=60) for _ in range(20)]
    until(lambda: first.behaviour.started == 20)
    stopping = threading.Thread(target=first.stop, args=(60.0,))
    stopping.start()
    until(lambda: not first.server._listeners)  # the port is free once it does not listen any more
    second = Running(first.port)
    for i in range(300):
        assert echo(str(i).encode(), timeout=20, wait_for_ready=True) == str(i).encode()
    assert [call.result() for call in under_way] == [b"late"] * 20
    stopping.join(60)
    channel.close()
    second.stop(1.0)


# --- bytes ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from([b"now", b"later"]))
def test_connection_frames_cut_anywhere_are_read(
    running: Running, cuts: list[int], content: bytes
) -> None:
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
        found = read_frames(connection, ended(1, 3))
    assert (body(found, 1), body(found, 3)) == (content, content + b"!")


def test_request_with_padding_priority_and_continuation_is_read(running: Running) -> None:
    block = hpack.Encoder().encode([*FIELDS, ("x-long", "y" * 300)])
    start = b"\x04" + b"\x00\x00\x00\x00\x10" + block[:20] + b"\x00" * 4
    message = b"\x03" + b"\x00\x00\x00\x00\x05" + b"hello" + b"\x00" * 3
    sent = (
        frames.frame(frames.HEADERS, frames.PADDED | frames.PRIORITISED, 1, start)
        + frames.frame(frames.CONTINUATION, 0, 1, block[20:50])
        + frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[50:])
        + frames.frame(frames.DATA, frames.PADDED, 1, message)
        + frames.frame(frames.DATA, frames.END_STREAM, 1, b"")
    )
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        assert body(read_frames(connection, ended(1)), 1) == b"hello"


@pytest.mark.parametrize("content", [b"now" * 200, b"later" * 200])
def test_answer_larger_than_stream_window_waits_for_updates(
    running: Running, content: bytes
) -> None:
    with running.connect() as connection:
        connection.sendall(
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 10}) + request(1, content)
        )
        first = read_frames(
            connection, lambda found: any(kind == frames.DATA for kind, *_ in found)
        )
        assert sum(len(payload) for kind, _, _, payload in first if kind == frames.DATA) == 10
        connection.sendall(frames.window_update(1, 90))
        second = read_frames(
            connection, lambda found: any(kind == frames.DATA for kind, *_ in found)
        )
        assert sum(
            len(payload) for kind, _, _, payload in second if kind == frames.DATA
        ) == 90 and not ended(1)(second)
        connection.sendall(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
        found = first + second + read_frames(connection, ended(1))
    assert body(found, 1) == content


def test_settings_smaller_header_table_is_acknowledged_in_next_block(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            frames.PREFACE + frames.settings({frames.HEADER_TABLE_SIZE: 0}) + request(1, b"now")
        )
        found = read_frames(connection, ended(1))
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    for kind, _, _, payload in found:
        if kind == frames.HEADERS:
            decoder.decode(payload)
    assert body(found, 1) == b"now"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"EHLO x\r\n" + b" " * 40, frames.PROTOCOL_ERROR),
        (HELLO + frames.frame(frames.DATA, 0, 1, b"x"), frames.PROTOCOL_ERROR),
        (HELLO + frames.frame(frames.CONTINUATION, 0, 1, b"x"), frames.PROTOCOL_ERROR),
        (
            HELLO
            + frames.frame(frames.HEADERS, 0, 1, b"")
            + frames.frame(frames.PING, 0, 0, b"12345678"),
            frames.PROTOCOL_ERROR,
        ),
        (
            HELLO + frames.frame(frames.HEADERS, frames.END_HEADERS, 2, b"\x82"),
            frames.PROTOCOL_ERROR,
        ),
        (
            HELLO + frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
            frames.COMPRESSION_ERROR,
        ),
        (
            HELLO + frames.frame(frames.HEADERS, frames.END_HEADERS | frames.PADDED, 1, b"\x09"),
            frames.PROTOCOL_ERROR,
        ),
        (HELLO + b"\x01\x00\x00" + bytes(6) + bytes(20), frames.FRAME_SIZE_ERROR),
        (HELLO + frames.frame(frames.SETTINGS, 0, 0, b"12345"), frames.FRAME_SIZE_ERROR),
        (HELLO + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}), frames.FLOW_CONTROL_ERROR),
        (HELLO + frames.settings({frames.MAX_FRAME_SIZE: 1}), frames.PROTOCOL_ERROR),
        (HELLO + frames.window_update(0, 0), frames.PROTOCOL_ERROR),
        (HELLO + frames.window_update(0, 2**31 - 1), frames.FLOW_CONTROL_ERROR),
        (HELLO + frames.frame(frames.RST_STREAM, 0, 5, bytes(4)), frames.PROTOCOL_ERROR),
        (HELLO + frames.frame(frames.PUSH_PROMISE, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    ],
)
def test_connection_protocol_error_ends_with_goaway_code(
    running: Running, sent: bytes, code: int
) -> None:
    with running.connect() as connection:
        connection.sendall(sent)
        assert goaway_code(read_frames(connection, lambda found: False)) == code


@pytest.fixture
def full(running: Running) -> Iterator[None]:
    running.behaviour.full = True
    yield
    running.behaviour.full = False


@pytest.mark.parametrize(
    ("path", "content"),
    [("/t.T/Guarded", b"x"), ("/t.T/Guarded", b"x" * 3_000_000), ("/t.T/Echo", b"full")],
)
def test_refusal_grpcio_client_gets_status_and_hint(
    running: Running, channel: grpc.Channel, full: None, path, content
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


def test_refusal_before_message_is_sent_at_once_and_message_is_dropped(
    running: Running, full: None
) -> None:
    with running.connect() as connection:
        block = hpack.Encoder().encode(GUARDED)
        connection.sendall(
            HELLO
            + b"".join(
                frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block)
                for stream in (1, 3, 5)
            )
        )
        found = read_frames(connection, ended(1, 3, 5))
        fields = dict(
            hpack.Decoder().decode(next(payload for kind, _, s, payload in found if s == 3))
        )
        assert (fields[":status"], fields["grpc-status"], fields["retry-after-ms"]) == (
            "200",
            "8",
            "9",
        )
        connection.sendall(
            frames.frame(frames.DATA, 0, 1, bytes(1000))
            + frames.frame(frames.DATA, frames.END_STREAM, 3, bytes(1000))
        )
        connection.sendall(
            frames.frame(frames.RST_STREAM, 0, 5, bytes(4))
            + frames.frame(frames.DATA, 0, 1, bytes(1000))
            + request(7, b"now")
        )
        late = read_frames(connection, ended(7))
        assert body(late, 7) == b"now"
        resets = [stream for kind, _, stream, _ in late if kind == frames.RST_STREAM]
        assert resets == [1], "a client that goes on sending is reset, once"
        inside = next(iter(running.server.connections))
        assert not inside.streams.refused and not inside.streams.calls


def test_refusal_stream_without_message_counts_as_open_stream(full: None) -> None:
    small = Running(max_streams=4)
    small.behaviour.full = True
    with small.connect() as connection:
        block = hpack.Encoder().encode(GUARDED)
        connection.sendall(
            HELLO
            + b"".join(
                frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block)
                for stream in range(1, 13, 2)
            )
        )
        found = read_frames(
            connection, lambda found: sum(kind == frames.RST_STREAM for kind, _, _, _ in found) == 2
        )
        assert [stream for kind, _, stream, _ in found if kind == frames.HEADERS] == [1, 3, 5, 7]
        assert [stream for kind, _, stream, _ in found if kind == frames.RST_STREAM] == [9, 11]
    small.stop(0.5)


def test_control_frame_flood_ends_connection(running: Running) -> None:
    """Of resets (the rapid-reset attack) and of pings, without end."""
    encoder = hpack.Encoder()
    opening = [request(1, b"later", encoder=encoder)]
    opening += [
        frames.frame(frames.HEADERS, frames.END_HEADERS, 2 * i + 3, encoder.encode(FIELDS))
        + frames.frame(frames.RST_STREAM, 0, 2 * i + 3, bytes(4))
        for i in range(2 * CONTROL_FRAME_BUDGET)
    ]
    for flood in (
        b"".join(opening),
        frames.frame(frames.PING, 0, 0, b"12345678") * (3 * CONTROL_FRAME_BUDGET),
    ):
        with running.connect() as connection:
            reader = ThreadPoolExecutor(1).submit(
                read_frames, connection, lambda found: goaway_code(found) is not None
            )
            with contextlib.suppress(OSError):  # it may be closed while frames are still sent
                connection.sendall(HELLO + flood)
            with contextlib.suppress(OSError):  # or reset, which is as good
                assert goaway_code(reader.result(30)) == frames.ENHANCE_YOUR_CALM


def test_request_not_grpc_gets_http_status(running: Running) -> None:
    for fields, status in (
        ([(":method", "GET"), *FIELDS[1:]], "405"),
        ([*FIELDS[:3], ("content-type", "text/html")], "415"),
    ):
        with running.connect() as connection:
            connection.sendall(HELLO + request(1, b"", fields))
            headers = [
                payload
                for kind, _, _, payload in read_frames(connection, ended(1))
                if kind == frames.HEADERS
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
def test_request_malformed_message_gets_typed_error(
    running: Running, content: bytes, code: grpc.StatusCode
) -> None:
    sent = frames.frame(
        frames.HEADERS, frames.END_HEADERS, 1, hpack.Encoder().encode(FIELDS)
    ) + frames.frame(frames.DATA, frames.END_STREAM, 1, content)
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        headers = [
            payload
            for kind, _, _, payload in read_frames(connection, ended(1))
            if kind == frames.HEADERS
        ]
    assert ("grpc-status", str(code.value[0])) in hpack.Decoder().decode(headers[-1])


@pytest.mark.slow
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
def test_server_random_frames_do_not_stop_it(
    running: Running, sent: list[tuple[int, int, int, bytes]], garbage: bytes
) -> None:
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + b"".join(
                frames.frame(kind, flags, stream, payload) for kind, flags, stream, payload in sent
            )
            + garbage
        )
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        assert body(read_frames(connection, ended(1)), 1) == b"now"


def test_server_after_all_tests_holds_no_call_and_no_byte(running: Running) -> None:
    until(
        lambda: (
            not any(
                connection.streams.calls or connection.streams.buffers.held
                for connection in list(running.server.connections)
            )
        )
    )
