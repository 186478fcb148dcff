"""Window updates of peers that read large answers are part of reading; those of peers that read
nothing are not.
"""

import socket
from collections.abc import Iterator

import pytest

from retrieval.http2 import connection as connections
from retrieval.http2 import frames as wire
from retrieval.http2.connection import NOISE_ALLOWANCE
from tests.helpers.raw_http2 import (
    HELLO,
    Running,
    body,
    fields_of,
    frames,
    goaway,
    message,
    opening,
    request,
)

CALLS = 8
ANSWER = b"now" + bytes(2**20)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.stop(1.0)


def upload(stream: int, content: bytes) -> bytes:
    """A call of Echo with a message of several frames."""
    whole = message(content)
    pieces = [
        whole[at : at + wire.DEFAULT_FRAME_BYTES]
        for at in range(0, len(whole), wire.DEFAULT_FRAME_BYTES)
    ]
    flags = [0] * (len(pieces) - 1) + [wire.END_STREAM]
    return opening(stream) + b"".join(
        wire.frame(wire.DATA, flag, stream, piece)
        for flag, piece in zip(flags, pieces, strict=True)
    )


class Reader:
    """A client that gives back what it has read of a stream, or of the connection, as soon as
    ``step`` bytes of it have come.
    """

    def __init__(self, connection: socket.socket, step: int) -> None:
        self.connection, self.step = connection, step
        self.rest = b""
        self.unread = {0: 0}

    def read(self, stream: int) -> bytes:
        """The bytes of one answer, to its end or the server's goodbye."""
        found = bytearray()
        self.unread[stream] = 0
        while True:
            kind, flags, place, payload = self._frame()
            assert kind != wire.GOAWAY, payload
            if kind == wire.DATA:
                found += payload
                self._give_back(place, len(payload))
            if kind == wire.HEADERS and flags & wire.END_STREAM and place == stream:
                return bytes(found)

    def _frame(self) -> tuple[int, int, int, bytes]:
        while len(self.rest) < 9 or len(self.rest) < 9 + int.from_bytes(self.rest[:3], "big"):
            piece = self.connection.recv(65_536)
            assert piece, "the server closed"
            self.rest += piece
        end = 9 + int.from_bytes(self.rest[:3], "big")
        whole, self.rest = self.rest[:end], self.rest[end:]
        return whole[3], whole[4], int.from_bytes(whole[5:9], "big"), whole[9:]

    def _give_back(self, stream: int, size: int) -> None:
        for place in (stream, 0):
            self.unread[place] += size
            if self.unread[place] >= self.step:
                self.connection.sendall(wire.window_update(place, self.unread[place]))
                self.unread[place] = 0


@pytest.mark.parametrize(
    ("window", "step"),
    [(wire.DEFAULT_WINDOW, 32_768), (wire.DEFAULT_WINDOW, 1), (8 * 2**20, 1)],
    ids=[
        "half of 64 KiB, as nghttp2",
        "every frame",
        "every frame, when the stream has long ended",
    ],
)
def test_readers_of_large_answers_make_no_noise(
    running: Running, monkeypatch: pytest.MonkeyPatch, window: int, step: int
) -> None:
    """A stream's update counted as noise, and a MiB is 32 of them: Node's clients were sent away
    after some 500 answers.
    """
    monkeypatch.setattr(connections, "NOISE_ALLOWANCE", 50)
    with running.connect() as connection:
        connection.sendall(wire.PREFACE + wire.settings({wire.INITIAL_WINDOW_SIZE: window}))
        if window > wire.DEFAULT_WINDOW:
            connection.sendall(wire.window_update(0, window - wire.DEFAULT_WINDOW))
        reader = Reader(connection, step)
        for stream in range(1, 2 * CALLS, 2):
            connection.sendall(upload(stream, ANSWER))
            assert reader.read(stream) == message(ANSWER)


def test_a_reader_that_enlarges_every_streams_window_reads_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an update is larger than all that is ever sent on the stream; the others stay part of
    reading.
    """
    monkeypatch.setattr(connections, "NOISE_ALLOWANCE", 50)
    with running.connect() as connection:
        connection.sendall(HELLO)
        reader = Reader(connection, 32_768)
        for stream in range(1, 2 * CALLS, 2):
            connection.sendall(
                opening(stream)
                + wire.window_update(stream, 2**28)
                + upload(stream, ANSWER)[len(opening(stream)) :]
            )
            assert reader.read(stream) == message(ANSWER)


@pytest.mark.parametrize("state", ["waits for its method", "has ended", "leaves byte by byte"])
def test_updates_of_a_stream_that_lets_next_to_nothing_out_are_noise(
    running: Running, state: str
) -> None:
    begin = {
        "waits for its method": HELLO + request(1, b"30", fields_of("Slow")),
        "has ended": HELLO + request(1, b"now" + bytes(5_000)),
        "leaves byte by byte": (
            wire.PREFACE
            + wire.settings({wire.INITIAL_WINDOW_SIZE: 0})
            + upload(1, b"now" + bytes(30_000))
        ),
    }[state]
    with running.connect() as connection:
        connection.sendall(begin + wire.window_update(1, 1) * (NOISE_ALLOWANCE + 100))
        found = frames(connection, lambda found: goaway(found) is not None)
    assert goaway(found) == wire.ENHANCE_YOUR_CALM
    assert len(body(found, 1)) <= NOISE_ALLOWANCE + 100
