"""Window updates are free for peers that read large answers, and spent by those that do not."""

import socket
from collections.abc import Iterator

import pytest

from retrieval.http2 import frames, limits
from retrieval.http2.limits import CONTROL_FRAME_BUDGET
from tests.helpers.serving.raw_http2 import (
    HELLO,
    Running,
    body,
    fields_of,
    goaway_code,
    message,
    opening,
    read_frames,
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
        whole[at : at + frames.DEFAULT_FRAME_BYTES]
        for at in range(0, len(whole), frames.DEFAULT_FRAME_BYTES)
    ]
    flags = [0] * (len(pieces) - 1) + [frames.END_STREAM]
    return opening(stream) + b"".join(
        frames.frame(frames.DATA, flag, stream, piece)
        for flag, piece in zip(flags, pieces, strict=True)
    )


class Reader:
    """A client that updates a window as soon as it has read ``step`` bytes of it."""

    def __init__(self, connection: socket.socket, step: int) -> None:
        self.connection = connection
        self.step = step
        self.rest = b""
        self.unread = {0: 0}

    def read(self, stream: int) -> bytes:
        """The bytes of one answer."""
        found = bytearray()
        self.unread[stream] = 0
        while True:
            kind, flags, place, payload = self._frame()
            assert kind != frames.GOAWAY, payload
            if kind == frames.DATA:
                found += payload
                self._update(place, len(payload))
            if kind == frames.HEADERS and flags & frames.END_STREAM and place == stream:
                return bytes(found)

    def _frame(self) -> tuple[int, int, int, bytes]:
        while len(self.rest) < 9 or len(self.rest) < 9 + int.from_bytes(self.rest[:3], "big"):
            piece = self.connection.recv(65_536)
            assert piece, "the server closed"
            self.rest += piece
        end = 9 + int.from_bytes(self.rest[:3], "big")
        whole = self.rest[:end]
        self.rest = self.rest[end:]
        return whole[3], whole[4], int.from_bytes(whole[5:9], "big"), whole[9:]

    def _update(self, stream: int, size: int) -> None:
        for place in (stream, 0):
            self.unread[place] += size
            if self.unread[place] >= self.step:
                self.connection.sendall(frames.window_update(place, self.unread[place]))
                self.unread[place] = 0


@pytest.mark.parametrize(
    ("window", "step"),
    [(frames.DEFAULT_WINDOW, 32_768), (frames.DEFAULT_WINDOW, 1), (8 * 2**20, 1)],
    ids=[
        "half of 64 KiB, as nghttp2",
        "every frame",
        "every frame, when the stream has long ended",
    ],
)
def test_budget_reader_of_large_answers_spends_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch, window: int, step: int
) -> None:
    """A MiB is 32 updates of nghttp2; Node's clients send as many."""
    monkeypatch.setattr(limits, "CONTROL_FRAME_BUDGET", 50)
    with running.connect() as connection:
        connection.sendall(frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: window}))
        if window > frames.DEFAULT_WINDOW:
            connection.sendall(frames.window_update(0, window - frames.DEFAULT_WINDOW))
        reader = Reader(connection, step)
        for stream in range(1, 2 * CALLS, 2):
            connection.sendall(upload(stream, ANSWER))
            assert reader.read(stream) == message(ANSWER)


def test_budget_reader_that_enlarges_every_stream_reads_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One such update is larger than all that is ever sent on the stream."""
    monkeypatch.setattr(limits, "CONTROL_FRAME_BUDGET", 50)
    with running.connect() as connection:
        connection.sendall(HELLO)
        reader = Reader(connection, 32_768)
        for stream in range(1, 2 * CALLS, 2):
            connection.sendall(
                opening(stream)
                + frames.window_update(stream, 2**28)
                + upload(stream, ANSWER)[len(opening(stream)) :]
            )
            assert reader.read(stream) == message(ANSWER)


@pytest.mark.parametrize("state", ["waits for its method", "has ended", "leaves byte by byte"])
def test_budget_updates_of_stream_that_sends_little_are_spent(running: Running, state: str) -> None:
    begin = {
        "waits for its method": HELLO + request(1, b"30", fields_of("Slow")),
        "has ended": HELLO + request(1, b"now" + bytes(5_000)),
        "leaves byte by byte": (
            frames.PREFACE
            + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})
            + upload(1, b"now" + bytes(30_000))
        ),
    }[state]
    with running.connect() as connection:
        connection.sendall(begin + frames.window_update(1, 1) * (CONTROL_FRAME_BUDGET + 100))
        found = read_frames(connection, lambda found: goaway_code(found) is not None)
    assert goaway_code(found) == frames.ENHANCE_YOUR_CALM
    assert len(body(found, 1)) <= CONTROL_FRAME_BUDGET + 100
