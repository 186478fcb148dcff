"""What a peer of the HTTP/2 transport can make it keep or do: memory, turns of the event loop,
connections that others' calls are on.
"""

import gzip
import logging
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.http2 import frames as wire
from retrieval.http2.connection import MAX_BUFFERED_BYTES, NOISE_ALLOWANCE, Connection
from retrieval.http2.flow_control import CALLS_PER_NOISE
from tests.helpers.raw_http2 import (
    HELLO,
    Code,
    Running,
    body,
    ended,
    fields_of,
    frames,
    goaway,
    heard,
    message,
    opening,
    request,
    statuses,
)

MIB = 2**20
BOMB = message(gzip.compress(bytes(4 * MIB)), compressed=True)
"""Four KB that are four MiB once they are unpacked."""
GZIP = ("grpc-encoding", "gzip")
INVALID = Code.INVALID_ARGUMENT.value[0]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(max_streams=1000)
    yield found
    found.stop(1.0)


def wait_until(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def inside(running: Running) -> Connection:
    """The server's end of the only connection, once the server has noticed that earlier ones are
    closed.
    """
    assert wait_until(lambda: len(running.server.connections) == 1)
    (found,) = running.server.connections
    return found


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return wire.frame(wire.DATA, flags, stream, payload)


def data_bytes(found) -> int:
    return sum(len(payload) for kind, _, _, payload in found if kind == wire.DATA)


def upload(stream: int, content: bytes) -> bytes:
    """A call of Echo with a message of several frames."""
    whole = message(content)
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    frames = [
        data(stream, piece, wire.END_STREAM if piece is pieces[-1] else 0) for piece in pieces
    ]
    return opening(stream) + b"".join(frames)


# --- memory ---


@pytest.mark.parametrize("flags", [0, wire.END_STREAM])
def test_messages_of_calls_that_are_not_answered_are_counted(running: Running, flags: int) -> None:
    """Whole ones, too: those that wait for the end of their stream, and those that a method is at
    work on.
    """
    streams = range(1, 81, 2)
    fields = fields_of("Echo" if not flags else "Slow", GZIP)
    content = BOMB if not flags else message(gzip.compress(b"30" + b" " * 4 * MIB), compressed=True)
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + b"".join(opening(stream, fields) + data(stream, content, flags) for stream in streams)
        )
        refused = statuses(heard(connection))
        assert set(refused.values()) == {8} and len(streams) - len(
            refused
        ) <= MAX_BUFFERED_BYTES // (4 * MIB)
        assert 32 * MIB < inside(running)._buffered <= MAX_BUFFERED_BYTES
        connection.sendall(
            b"".join(wire.frame(wire.RST_STREAM, 0, stream, bytes(4)) for stream in streams)
        )
        heard(connection)
        assert inside(running)._buffered == 0
        connection.sendall(request(101, b"now"))
        assert body(frames(connection, ended(101)), 101) == b"now"


def test_messages_that_nobody_has_taken_yet_are_counted(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Hoard", GZIP)) + data(1, BOMB) * 3)
        heard(connection)
        assert inside(running)._buffered == 12 * MIB
        connection.sendall(data(1, BOMB) * 20)
        assert statuses(frames(connection, ended(1))) == {1: 8}
        heard(connection)
        assert inside(running)._buffered == 0


def test_messages_that_were_taken_are_counted_no_more(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Hoard", GZIP)) + data(1, BOMB) * 3)
        heard(connection)
        running.loop.call_soon_threadsafe(running.behaviour.gate.set)
        assert wait_until(lambda: inside(running)._buffered == 0)
        for _ in range(40):
            connection.sendall(data(1, BOMB))
            heard(connection)
        connection.sendall(data(1, b"", wire.END_STREAM))
        assert statuses(frames(connection, ended(1))) == {1: 0}
        assert inside(running)._buffered == 0
    running.behaviour.gate.clear()


def test_large_answers_of_large_requests_do_not_count_the_request(running: Running) -> None:
    """A call's message is forgotten when its answer is here: both together may be more than one
    alone.
    """
    with running.connect() as connection:
        connection.sendall(
            HELLO
            + wire.settings({wire.INITIAL_WINDOW_SIZE: 0})
            + upload(1, b"later" + bytes(2 * MIB))
        )
        frames(connection, lambda found: any(kind == wire.HEADERS for kind, *_ in found))
        heard(connection)
        assert 2 * MIB < inside(running)._buffered < 3 * MIB


def test_one_answer_stream_takes_one_message(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Count")) + data(1, message(b"1")) * 50)
        assert statuses(frames(connection, ended(1))) == {1: INVALID}
        heard(connection)
        assert not inside(running).calls and inside(running)._buffered == 0


@pytest.mark.parametrize("method", ["Echo", "Count"])
@pytest.mark.parametrize("begun", [b"", b"\x00\x00\x00", message(b"later")])
def test_the_deadline_of_a_call_runs_before_its_message_has_come(
    running: Running, method: str, begun: bytes
) -> None:
    with running.connect() as connection:
        sent = opening(1, fields_of(method, ("grpc-timeout", "100m")))
        connection.sendall(HELLO + sent + (data(1, begun) if begun else b""))
        assert statuses(frames(connection, ended(1))) == {1: Code.DEADLINE_EXCEEDED.value[0]}
        heard(connection)
        assert not inside(running).calls and inside(running)._buffered == 0


# --- the loop's time ---


def test_window_updates_that_let_nothing_out_are_noise(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: 0}) + request(1, b"now")
        )
        heard(connection)
        connection.sendall(wire.window_update(0, 1) * (NOISE_ALLOWANCE + 100))
        assert (
            goaway(frames(connection, lambda found: goaway(found) is not None))
            == wire.ENHANCE_YOUR_CALM
        )


def test_window_updates_after_answers_are_part_of_reading_them(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        frames(connection, ended(1))
        before = inside(running)._noise
        for stream in range(3, 103, 2):
            connection.sendall(request(stream, b"now" + bytes(1000)))
            frames(connection, ended(stream))
            connection.sendall(wire.window_update(0, 1008))
        heard(connection)
        assert inside(running)._noise == before + 1, "the ping"


@pytest.mark.parametrize(
    "last",
    [b"now", b"now" + bytes(70_000)],
    ids=["all wait for their streams", "one waits for the connection"],
)
def test_a_window_update_costs_no_turn_of_calls_that_it_does_not_help(
    running: Running, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    pumped: list[int] = []
    pump = Connection._pump
    monkeypatch.setattr(
        Connection, "_pump", lambda self, call: (pumped.append(call.stream), pump(self, call))
    )
    with running.connect() as connection:
        calls = b"".join(request(stream, b"now") for stream in range(1, 1801, 2)) + upload(
            1801, last
        )
        connection.sendall(wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: 0}) + calls)
        heard(connection)
        if len(last) > 65_535:
            connection.sendall(wire.window_update(1801, 100_000))
            frames(connection, lambda found: data_bytes(found) == 65_535)
        del pumped[:]
        connection.sendall(wire.window_update(0, 1) * 400)
        assert data_bytes(heard(connection)) == (400 if len(last) > 65_535 else 0)
        assert len(pumped) <= 400


def test_a_larger_window_for_many_calls_is_more_noise(running: Running) -> None:
    """One frame of settings sets all of them going; one that enlarges nothing does not look at
    them.
    """
    with running.connect() as connection:
        calls = b"".join(request(stream, b"now" + bytes(400)) for stream in range(1, 1001, 2))
        connection.sendall(wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: 0}) + calls)
        heard(connection)
        before = inside(running)._noise
        connection.sendall(wire.settings({wire.INITIAL_WINDOW_SIZE: 0}))
        heard(connection)
        assert inside(running)._noise - before == 2
        connection.sendall(wire.settings({wire.INITIAL_WINDOW_SIZE: 1}))
        heard(connection)
        assert inside(running)._noise - before == 4 + 500 // CALLS_PER_NOISE


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
def test_whatever_order_windows_open_in_every_answer_leaves_whole(
    running: Running, steps: list[tuple[int, int]], first: int
) -> None:
    """0: the connection's window grows; a stream: its own does; -1: the initial window changes; -2:
    a call is given up.
    """
    contents = {stream: b"now" + bytes([stream]) * 40_000 for stream in (1, 3, 5, 7)}
    given_up: set[int] = set()
    with running.connect() as connection:
        calls = b"".join(upload(stream, content) for stream, content in contents.items())
        connection.sendall(wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: first}) + calls)
        found = heard(connection)
        for which, value in steps:
            if which == -1:
                connection.sendall(wire.settings({wire.INITIAL_WINDOW_SIZE: value}))
            elif which == -2:
                given_up.add(value)
                connection.sendall(wire.frame(wire.RST_STREAM, 0, value, bytes(4)))
            else:
                connection.sendall(wire.window_update(which, value))
            found += heard(connection)
        connection.sendall(
            wire.settings({wire.INITIAL_WINDOW_SIZE: 1_000_000}) + wire.window_update(0, 1_000_000)
        )
        wanted = set(contents) - given_up
        if not ended(*wanted)(found):
            found += frames(connection, lambda more: ended(*wanted)(found + more))
        assert not inside(running)._buffered and not inside(running)._starved
    assert all(body(found, stream) == contents[stream] for stream in wanted)


# --- padding ---


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x00" * 4])
@pytest.mark.parametrize("padding", [4, 5, 100])
def test_padding_is_no_part_of_a_message(running: Running, payload: bytes, padding: int) -> None:
    with running.connect() as connection:
        padded = bytes([padding]) + payload + bytes(padding)
        connection.sendall(
            HELLO + opening(1) + data(1, padded, wire.END_STREAM | wire.PADDED) + request(3, b"now")
        )
        found = frames(connection, ended(1, 3))
        assert statuses(found) == {1: INVALID, 3: 0} and body(found, 3) == b"now"


def test_padding_is_credited_with_the_rest_of_its_frame(running: Running) -> None:
    content = bytes(range(256)) * 16
    whole = message(content)
    padded = [b"\xff" + whole[at : at + 100] + bytes(255) for at in range(0, len(whole), 100)]
    with running.connect() as connection:
        connection.sendall(
            HELLO + opening(1) + b"".join(data(1, piece, wire.PADDED) for piece in padded)
        )
        found = heard(connection)
        credit = sum(
            int.from_bytes(payload, "big")
            for kind, _, stream, payload in found
            if (kind, stream) == (wire.WINDOW_UPDATE, 1)
        )
        assert credit == sum(map(len, padded))
        connection.sendall(data(1, b"", wire.END_STREAM))
        assert body(frames(connection, ended(1)), 1) == content


def test_frames_of_nothing_but_padding_are_noise(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(
            HELLO + opening(1) + data(1, b"\x00", wire.PADDED) * (NOISE_ALLOWANCE + 100)
        )
        assert (
            goaway(frames(connection, lambda found: goaway(found) is not None))
            == wire.ENHANCE_YOUR_CALM
        )


def test_a_bug_ends_the_connection_in_good_order_and_is_logged(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now") + request(3, b"now boom"))
        found = frames(connection, lambda found: goaway(found) is not None)
    assert body(found, 1) == b"now" and goaway(found) == wire.INTERNAL_ERROR
    assert any(record.levelno == logging.ERROR and record.exc_info for record in caplog.records)
    with running.connect() as connection:
        connection.sendall(HELLO + request(1, b"now"))
        assert body(frames(connection, ended(1)), 1) == b"now"


# --- calls without a message ---


@pytest.mark.parametrize("how", ["headers", "data", "cut off"])
@pytest.mark.parametrize("method", ["Echo", "Count"])
def test_a_call_that_ends_without_its_message_is_the_callers_mistake(
    running: Running, caplog: pytest.LogCaptureFixture, method: str, how: str
) -> None:
    fields = fields_of(method)
    sent = {
        "headers": opening(1, fields, wire.END_STREAM),
        "data": opening(1, fields) + data(1, b"", wire.END_STREAM),
        "cut off": opening(1, fields) + data(1, b"\x00\x00\x00\x00\x02x", wire.END_STREAM),
    }[how]
    with running.connect() as connection:
        connection.sendall(HELLO + sent)
        assert statuses(frames(connection, ended(1))) == {1: INVALID}
        heard(connection)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_grpcio_streams_answers_to_one_message(running: Running) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        assert [int(x) for x in channel.unary_stream("/t.T/Count")(b"5", timeout=20)] == list(
            range(5)
        )
