"""While a full server refuses, it reads each connection every few milliseconds; nobody else waits,
and nothing is forgotten.
"""

import time
from collections.abc import Iterator

import pytest

from retrieval.http2.connection import Connection
from retrieval.http2.read_pacing import Pacer
from tests.helpers.raw_http2 import (
    HELLO,
    Running,
    body,
    ended,
    fields_of,
    frames,
    opening,
    request,
    statuses,
)

PAUSE = 0.5


@pytest.fixture
def full() -> Iterator[Running]:
    running = Running()
    running.behaviour.closed, running.behaviour.pause = True, PAUSE
    yield running
    running.stop(0.5)


def test_who_was_refused_is_read_again_after_the_pause_and_all_that_came_is_there(
    full: Running,
) -> None:
    with full.connect() as refused, full.connect() as other:
        refused.sendall(HELLO + opening(1, fields_of("Guarded")))
        assert statuses(frames(refused, ended(1)))[1] == 8
        began = time.monotonic()
        refused.sendall(request(3, b"now a"))
        refused.sendall(request(5, b"now b"))
        other.sendall(HELLO + request(1, b"now"))
        assert body(frames(other, ended(1)), 1) == b"now"
        assert time.monotonic() - began < PAUSE, "another connection is read meanwhile"
        found = frames(refused, ended(3, 5))
        assert (body(found, 3), body(found, 5)) == (b"now a", b"now b")
        assert time.monotonic() - began > PAUSE / 2
        refused.sendall(request(7, b"now c"))  # it is read as before
        assert body(frames(refused, ended(7)), 7) == b"now c"


def test_a_peer_that_leaves_during_its_pause_is_let_go(full: Running) -> None:
    with full.connect() as refused:
        refused.sendall(HELLO + opening(1, fields_of("Guarded")))
        frames(refused, ended(1))
    with full.connect() as other:
        time.sleep(PAUSE * 1.2)
        other.sendall(HELLO + request(1, b"now"))
        assert body(frames(other, ended(1)), 1) == b"now"
        assert len(full.server.connections) == 1


class Wire:
    """A transport that only knows whether it is read."""

    reading = True

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_a_peer_that_does_not_read_is_not_heard_because_a_pause_ends(full: Running) -> None:
    transport = Wire()
    connection = Connection(full.server)
    connection._transport = transport
    connection.rest()
    connection.pause_writing()
    connection.listen_again()
    assert not transport.reading
    connection.rest()
    connection.resume_writing()
    assert not transport.reading
    connection.listen_again()
    assert transport.reading


def test_those_who_pause_together_wake_together_and_the_last_is_read_first() -> None:
    class Loop:
        def __init__(self) -> None:
            self.timers: list = []

        def call_later(self, seconds: float, callback) -> None:
            self.timers.append((seconds, callback))

    class Listener:
        def __init__(self, name: str) -> None:
            self.name = name

        def rest(self) -> None:
            heard.append(f"{self.name} rests")

        def listen_again(self) -> None:
            heard.append(f"{self.name} listens")

    heard: list[str] = []
    loop = Loop()
    pacer = Pacer(loop)  # type: ignore[arg-type]
    pacer.rest(Listener("a"), 0.01)
    pacer.rest(Listener("b"), 0.01)
    assert [seconds for seconds, _ in loop.timers] == [0.01]
    loop.timers.pop()[1]()
    assert heard == ["a rests", "b rests", "b listens", "a listens"]
    pacer.rest(Listener("c"), 0.005)
    assert [seconds for seconds, _ in loop.timers] == [0.005]
