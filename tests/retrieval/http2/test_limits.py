"""Limits on one peer: memory, turns of the event loop, and the connection of other callers."""

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.http2 import frames
from retrieval.http2.connection import Connection
from retrieval.http2.limits import (
    CALLS_PER_CONTROL_FRAME,
    CONTROL_FRAME_BUDGET,
    CONTROL_FRAMES_PER_CALL,
    MAX_BUFFERED_BYTES,
)
from retrieval.http2.responses import ResponseWriter
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
    opening,
    read_frames,
    read_until_pong,
    request,
    statuses,
)
from tests.helpers.waiting import until

MIB = 2**20
LARGE = message(bytes(4 * MIB))
INVALID = Code.INVALID_ARGUMENT.value[0]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(max_streams=1000)
    yield found
    found.stop(1.0)


def inside(running: Running) -> Connection:
    """The server's end of the only connection, once earlier ones are known to be closed."""
    until(lambda: len(running.server.connections) == 1)
    (found,) = running.server.connections
    return found


def held_bytes(running: Running) -> int:
    """Bytes that the server's end of the only connection holds."""
    return inside(running).streams.buffers.held


def budget_left(running: Running) -> int:
    """Control frames that the only peer may still send."""
    return inside(running).streams.budget.left


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return frames.frame(frames.DATA, flags, stream, payload)


def data_bytes(found) -> int:
    return sum(len(payload) for kind, _, _, payload in found if kind == frames.DATA)


def parts(stream: int, whole: bytes, flags: int = 0) -> bytes:
    """DATA frames of any content; the last has the flags."""
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    each = [0] * (len(pieces) - 1) + [flags]
    return b"".join(map(data, [stream] * len(pieces), pieces, each))


def upload(stream: int, content: bytes) -> bytes:
    """A call of Echo with a message of several frames."""
    return opening(stream) + parts(stream, message(content), frames.END_STREAM)


# --- memory ---


@pytest.mark.slow
@pytest.mark.parametrize("flags", [0, frames.END_STREAM])
def test_buffers_messages_of_unanswered_calls_are_counted(running: Running, flags: int) -> None:
    """Whole ones, too: of streams that have not ended, and those that a method is working on."""
    streams = range(1, 81, 2)
    fields = fields_of("Echo" if not flags else "Slow")
    content = LARGE if not flags else message(b"30" + b" " * (4 * MIB - 2))
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + b"".join(
                opening(stream, fields) + parts(stream, content, flags) for stream in streams
            )
        )
        refused = statuses(read_until_pong(connection))
        assert set(refused.values()) == {8} and len(streams) - len(
            refused
        ) <= MAX_BUFFERED_BYTES // (4 * MIB)
        assert 32 * MIB < held_bytes(running) <= MAX_BUFFERED_BYTES
        connection.sendall(
            b"".join(frames.frame(frames.RST_STREAM, 0, stream, bytes(4)) for stream in streams)
        )
        read_until_pong(connection)
        assert held_bytes(running) == 0
        connection.sendall(request(101, b"now"))
        assert body(read_frames(connection, ended(101)), 101) == b"now"


def test_buffers_queued_messages_are_counted(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Hoard")) + parts(1, LARGE) * 3)
        read_until_pong(connection)
        assert held_bytes(running) == 12 * MIB
        connection.sendall(parts(1, LARGE) * 20)
        assert statuses(read_frames(connection, ended(1))) == {1: 8}
        read_until_pong(connection)
        assert held_bytes(running) == 0


def test_buffers_taken_messages_are_released(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Hoard")) + parts(1, LARGE) * 3)
        read_until_pong(connection)
        running.loop.call_soon_threadsafe(running.behaviour.gate.set)
        until(lambda: held_bytes(running) == 0)
        for _ in range(40):
            connection.sendall(parts(1, LARGE))
            read_until_pong(connection)
        connection.sendall(data(1, b"", frames.END_STREAM))
        assert statuses(read_frames(connection, ended(1))) == {1: 0}
        assert held_bytes(running) == 0
    running.behaviour.gate.clear()


def test_buffers_waiting_answer_does_not_count_its_request(running: Running) -> None:
    """A call's message is released when its answer is here: together they may be too much."""
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})
            + upload(1, b"later" + bytes(2 * MIB))
        )
        read_frames(connection, lambda found: any(kind == frames.HEADERS for kind, *_ in found))
        read_until_pong(connection)
        assert 2 * MIB < held_bytes(running) < 3 * MIB


def test_request_second_message_of_unary_request_is_refused(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Count")) + data(1, message(b"1")) * 50)
        assert statuses(read_frames(connection, ended(1))) == {1: INVALID}
        read_until_pong(connection)
        assert not inside(running).streams.calls and held_bytes(running) == 0


@pytest.mark.parametrize("method", ["Echo", "Count"])
@pytest.mark.parametrize("begun", [b"", b"\x00\x00\x00", message(b"later")])
def test_deadline_runs_before_the_message_arrives(
    running: Running, method: str, begun: bytes
) -> None:
    with running.connect() as connection:
        sent = opening(1, fields_of(method, ("grpc-timeout", "100m")))
        connection.sendall(HELLO + sent + (data(1, begun) if begun else b""))
        assert statuses(read_frames(connection, ended(1))) == {1: Code.DEADLINE_EXCEEDED.value[0]}
        read_until_pong(connection)
        assert not inside(running).streams.calls and held_bytes(running) == 0


# --- the loop's time ---


def test_budget_window_updates_that_release_nothing_are_spent(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) + request(1, b"now")
        )
        read_until_pong(connection)
        connection.sendall(frames.window_update(0, 1) * (CONTROL_FRAME_BUDGET + 100))
        assert (
            goaway_code(read_frames(connection, lambda found: goaway_code(found) is not None))
            == frames.ENHANCE_YOUR_CALM
        )


def test_budget_window_updates_after_answers_are_free(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        read_frames(connection, ended(1))
        before = budget_left(running)
        for stream in range(3, 103, 2):
            connection.sendall(request(stream, b"now" + bytes(1000)))
            read_frames(connection, ended(stream))
            connection.sendall(frames.window_update(0, 1008))
        read_until_pong(connection)
        assert budget_left(running) - before == 50 * CONTROL_FRAMES_PER_CALL - 1, "the ping"


def test_budget_streams_reset_for_wrong_updates_are_spent(running: Running) -> None:
    """A client that makes the server reset its streams gets nothing for it."""
    encoder = hpack.Encoder()
    flood = b"".join(
        frames.frame(frames.HEADERS, frames.END_HEADERS, stream, encoder.encode(FIELDS))
        + frames.window_update(stream, 0)
        for stream in range(1, 2 * CONTROL_FRAME_BUDGET + 200, 2)
    )
    with running.connect() as connection:
        reader = ThreadPoolExecutor(1).submit(
            read_frames, connection, lambda found: goaway_code(found) is not None
        )
        with contextlib.suppress(OSError):  # it may be closed while frames are still sent
            connection.sendall(HELLO + flood)
        with contextlib.suppress(OSError):  # or reset, which is as good
            assert goaway_code(reader.result(30)) == frames.ENHANCE_YOUR_CALM
    until(lambda: not running.server.connections)


@pytest.mark.parametrize(
    "last",
    [b"now", b"now" + bytes(70_000)],
    ids=["all wait for their streams", "one waits for the connection"],
)
def test_flow_control_window_update_visits_only_calls_it_helps(
    running: Running, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    resumed: list[int] = []
    resume = ResponseWriter.resume
    monkeypatch.setattr(
        ResponseWriter,
        "resume",
        lambda self, call: (resumed.append(call.stream), resume(self, call)),
    )
    with running.connect() as connection:
        calls = b"".join(request(stream, b"now") for stream in range(1, 1801, 2)) + upload(
            1801, last
        )
        connection.sendall(
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) + calls
        )
        read_until_pong(connection)
        if len(last) > 65_535:
            connection.sendall(frames.window_update(1801, 100_000))
            read_frames(connection, lambda found: data_bytes(found) == 65_535)
        del resumed[:]
        connection.sendall(frames.window_update(0, 1) * 400)
        assert data_bytes(read_until_pong(connection)) == (400 if len(last) > 65_535 else 0)
        assert len(resumed) <= 400


def test_budget_settings_that_resume_many_calls_cost_more(running: Running) -> None:
    """A frame of settings that enlarges nothing looks at no call."""
    with running.connect() as connection:
        calls = b"".join(request(stream, b"now" + bytes(400)) for stream in range(1, 1001, 2))
        connection.sendall(
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) + calls
        )
        read_until_pong(connection)
        before = budget_left(running)
        connection.sendall(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
        read_until_pong(connection)
        assert before - budget_left(running) == 2
        connection.sendall(frames.settings({frames.INITIAL_WINDOW_SIZE: 1}))
        read_until_pong(connection)
        assert before - budget_left(running) == 4 + 500 // CALLS_PER_CONTROL_FRAME


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(0), st.integers(1, 30_000)),
            st.tuples(st.sampled_from([1, 3, 5, 7]), st.integers(1, 30_000)),
            st.tuples(st.just(-1), st.integers(0, 40_000)),
            st.tuples(st.just(-2), st.sampled_from([3, 5])),
        ),
        max_size=20,
    ),
    st.integers(0, 40_000),
)
def test_flow_control_any_order_of_updates_sends_every_answer_whole(
    running: Running, steps: list[tuple[int, int]], first: int
) -> None:
    """Windows of connection and streams grow, the initial one changes, calls are cancelled.

    A step is what (0: the connection, a stream, -1: the initial window, -2: a reset) and a value.
    """
    contents = {stream: b"now" + bytes([stream]) * 40_000 for stream in (1, 3, 5, 7)}
    given_up: set[int] = set()
    with running.connect() as connection:
        calls = b"".join(upload(stream, content) for stream, content in contents.items())
        connection.sendall(
            frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: first}) + calls
        )
        found = read_until_pong(connection)
        for which, value in steps:
            if which == -1:
                connection.sendall(frames.settings({frames.INITIAL_WINDOW_SIZE: value}))
            elif which == -2:
                given_up.add(value)
                connection.sendall(frames.frame(frames.RST_STREAM, 0, value, bytes(4)))
            else:
                connection.sendall(frames.window_update(which, value))
            found += read_until_pong(connection)
        connection.sendall(
            frames.settings({frames.INITIAL_WINDOW_SIZE: 1_000_000})
            + frames.window_update(0, 1_000_000)
        )
        wanted = set(contents) - given_up
        if not ended(*wanted)(found):
            found += read_frames(connection, lambda more: ended(*wanted)(found + more))
        assert not held_bytes(running) and not inside(running).streams.flow.blocked
    assert all(body(found, stream) == contents[stream] for stream in wanted)


# --- padding ---


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x00" * 4])
@pytest.mark.parametrize("padding", [4, 5, 100])
def test_padding_is_not_part_of_the_message(running: Running, payload: bytes, padding: int) -> None:
    with running.connect() as connection:
        padded = bytes([padding]) + payload + bytes(padding)
        connection.sendall(
            HELLO
            + opening(1)
            + data(1, padded, frames.END_STREAM | frames.PADDED)
            + request(3, b"now")
        )
        found = read_frames(connection, ended(1, 3))
        assert statuses(found) == {1: INVALID, 3: 0} and body(found, 3) == b"now"


def test_padding_is_credited_to_the_stream_window(running: Running) -> None:
    content = bytes(range(256)) * 16
    whole = message(content)
    padded = [b"\xff" + whole[at : at + 100] + bytes(255) for at in range(0, len(whole), 100)]
    with running.connect() as connection:
        connection.sendall(
            HELLO + opening(1) + b"".join(data(1, piece, frames.PADDED) for piece in padded)
        )
        found = read_until_pong(connection)
        credit = sum(
            int.from_bytes(payload, "big")
            for kind, _, stream, payload in found
            if (kind, stream) == (frames.WINDOW_UPDATE, 1)
        )
        assert credit == sum(map(len, padded))
        connection.sendall(data(1, b"", frames.END_STREAM))
        assert body(read_frames(connection, ended(1)), 1) == content


def test_budget_frames_of_padding_only_are_spent(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            HELLO + opening(1) + data(1, b"\x00", frames.PADDED) * (CONTROL_FRAME_BUDGET + 100)
        )
        assert (
            goaway_code(read_frames(connection, lambda found: goaway_code(found) is not None))
            == frames.ENHANCE_YOUR_CALM
        )


def test_connection_bug_in_handler_ends_with_goaway_and_log(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now") + request(3, b"now boom"))
        found = read_frames(connection, lambda found: goaway_code(found) is not None)
    assert body(found, 1) == b"now" and goaway_code(found) == frames.INTERNAL_ERROR
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        assert body(read_frames(connection, ended(1)), 1) == b"now"


# --- calls without a message ---


@pytest.mark.parametrize("how", ["headers", "data", "cut off"])
@pytest.mark.parametrize("method", ["Echo", "Count"])
def test_request_ended_without_message_is_invalid_argument(
    running: Running, caplog: pytest.LogCaptureFixture, method: str, how: str
) -> None:
    fields = fields_of(method)
    sent = {
        "headers": opening(1, fields, frames.END_STREAM),
        "data": opening(1, fields) + data(1, b"", frames.END_STREAM),
        "cut off": opening(1, fields) + data(1, b"\x00\x00\x00\x00\x02x", frames.END_STREAM),
    }[how]
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        assert statuses(read_frames(connection, ended(1))) == {1: INVALID}
        read_until_pong(connection)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_streaming_answer_grpcio_client_reads_all(running: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        assert [int(x) for x in channel.unary_stream("/t.T/Count")(b"5", timeout=20)] == list(
            range(5)
        )
