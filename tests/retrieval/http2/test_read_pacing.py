"""Paced reads: a full server reads refused peers every few milliseconds, and others as before."""

import time
from collections.abc import Iterator

import pytest

from retrieval.http2.limits import ReadPacer
from tests.helpers.serving.raw_http2 import (
    HELLO,
    Running,
    body,
    ended,
    fields_of,
    opening,
    read_frames,
    request,
    statuses,
)
from tests.helpers.waiting import until

PAUSE = 2.0


@pytest.fixture
def full() -> Iterator[Running]:
    running = Running()
    running.behaviour.full = True
    running.behaviour.pause = PAUSE
    yield running
    running.stop(0.5)


@pytest.mark.slow
def test_pacing_refused_connection_is_read_after_the_pause_with_all_that_came(
    full: Running,
) -> None:
    with full.connect() as refused, full.connect() as other:
        refused.sendall(HELLO + opening(1, fields_of("Guarded")))
        assert statuses(read_frames(refused, ended(1)))[1] == 8
        began = time.monotonic()
        refused.sendall(request(3, b"now a"))
        refused.sendall(request(5, b"now b"))
        other.sendall(HELLO + request(1, b"now"))
        assert body(read_frames(other, ended(1)), 1) == b"now"
        assert time.monotonic() - began < PAUSE, "another connection is read meanwhile"
        found = read_frames(refused, ended(3, 5))
        assert (body(found, 3), body(found, 5)) == (b"now a", b"now b")
        assert time.monotonic() - began > PAUSE / 2
        refused.sendall(request(7, b"now c"))  # it is read as before
        assert body(read_frames(refused, ended(7)), 7) == b"now c"


def test_pacing_peer_that_closes_during_its_pause_is_dropped(full: Running) -> None:
    full.behaviour.pause = 0.1
    with full.connect() as refused:
        refused.sendall(HELLO + opening(1, fields_of("Guarded")))
        read_frames(refused, ended(1))
    with full.connect() as other:
        other.sendall(HELLO + request(1, b"now"))
        assert body(read_frames(other, ended(1)), 1) == b"now"
        until(lambda: len(full.server.connections) == 1)


class Transport:
    """A transport that only knows whether it is read."""

    reading = True

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_pacing_end_of_pause_does_not_read_peer_with_full_write_buffer(full: Running) -> None:
    transport = Transport()
    connection = full.server.make_connection()
    connection.out.transport = transport
    connection.pause_reads()
    connection.pause_writing()
    connection.resume_reads()
    assert not transport.reading
    connection.pause_reads()
    connection.resume_writing()
    assert not transport.reading
    connection.resume_reads()
    assert transport.reading


def test_pacing_connections_resume_together_last_refused_first() -> None:
    class Loop:
        def __init__(self) -> None:
            self.timers: list = []

        def call_later(self, seconds: float, callback) -> None:
            self.timers.append((seconds, callback))

    class Reader:
        def __init__(self, name: str) -> None:
            self.name = name

        def pause_reads(self) -> None:
            events.append(f"{self.name} pauses")

        def resume_reads(self) -> None:
            events.append(f"{self.name} resumes")

    events: list[str] = []
    loop = Loop()
    pacer = ReadPacer(loop)  # type: ignore[arg-type]
    pacer.pause(Reader("a"), 0.01)
    pacer.pause(Reader("b"), 0.01)
    assert [seconds for seconds, _ in loop.timers] == [0.01]
    loop.timers.pop()[1]()
    assert events == ["a pauses", "b pauses", "b resumes", "a resumes"]
    pacer.pause(Reader("c"), 0.005)
    assert [seconds for seconds, _ in loop.timers] == [0.005]
