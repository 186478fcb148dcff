"""What a server counts of its connections for its metrics."""

from collections.abc import Iterator

import pytest

from retrieval.http2 import frames
from retrieval.observability.metric_catalogue import CATALOGUE
from tests.helpers.serving.raw_http2 import (
    FIELDS,
    HELLO,
    Running,
    ended,
    fields_of,
    opening,
    read_frames,
    read_until_pong,
    request,
)
from tests.helpers.waiting import until

PREFIX = "omni_transport_"


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running(max_streams=2)
    yield found
    found.stop(1.0)


def counted(running: Running) -> dict[tuple[str, ...], float]:
    return {
        (name.removeprefix(PREFIX), *labels): value
        for name, labels, value in running.server.measurements()
    }


def test_measurements_are_those_of_the_catalogue(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n\r\n")
        assert connection.recv(9) == b"HTTP/1.1 "
    found = {name for name, _, _ in running.server.measurements()}
    assert found <= set(CATALOGUE)
    labelled = {name for name in CATALOGUE if name.startswith(PREFIX) and CATALOGUE[name].labels}
    assert {name for name in CATALOGUE if name.startswith(PREFIX)} - found <= labelled


def test_streams_and_bytes_of_open_and_ended_connections_are_counted(running: Running) -> None:
    sent = HELLO + request(1, b"first") + request(7, b"second, streams 3 and 5 are skipped")
    with running.connect() as connection:
        connection.sendall(sent)
        read_frames(connection, ended(1, 7))
        found = counted(running)
        assert found["connections",] == found["connections_opened",] == 1
        assert found["streams_opened",] == 2 and found["streams",] == 0
        assert found["received_bytes",] == len(sent)
        assert found["sent_bytes",] > len(b"first") and found["control_frames",] == 1
    until(lambda: counted(running)["connections",] == 0)
    assert counted(running)["streams_opened",] == 2


def test_what_the_server_ends_is_counted_by_its_reason(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, fields_of("Nothing"), frames.END_STREAM))
        connection.sendall(b"".join(opening(stream, fields_of("Chat")) for stream in (3, 5, 7)))
        connection.sendall(frames.reset_stream(3, frames.CANCEL))
        read_until_pong(connection)
        found = counted(running)
        assert found["ended_calls", "UNIMPLEMENTED"] == 1
        assert found["resets", "REFUSED_STREAM"] == 1 and found["client_resets",] == 1
        assert found["streams",] == 1, "stream 5"
        connection.sendall(frames.frame(frames.PING, 0, 9, bytes(8)))
        read_frames(connection, lambda found: False)
    assert counted(running)["goaways", "PROTOCOL_ERROR"] == 1
    with running.connect() as connection:
        connection.sendall(HELLO + opening(1, FIELDS))
        read_until_pong(connection)
        running.loop.call_soon_threadsafe(running.server._end_largest)
        read_frames(connection, lambda found: False)
    assert counted(running)["aborted_connections", "memory"] == 1
