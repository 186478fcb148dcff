"""Draining: a server ends a connection without losing a call (RFC 9113, section 6.8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retrieval.http2 import frames
from retrieval.http2.frames import frame, goaway
from retrieval.http2.streams import FrameWriter, Streams

LINGER_SECONDS = 2.0
"""How long a draining server waits for a client to notice; clients of grpc take a round trip."""


class Drain:
    """Ends one connection in four steps.

    A GOAWAY that names no stream asks the client to go elsewhere; a PING finds out when it has
    heard; a second GOAWAY names the last stream that is served; when its calls are answered the
    client closes.

    Args:
        out: Where frames go.
        streams: Of the connection.
        loop: Keeps the time.
        close: Closes the connection.
    """

    __slots__ = ("_announced", "_close", "_closed", "_loop", "_out", "_streams")

    def __init__(
        self,
        out: FrameWriter,
        streams: Streams,
        loop: asyncio.AbstractEventLoop,
        close: Callable[[], None],
    ) -> None:
        self._out = out
        self._streams = streams
        self._loop = loop
        self._close = close
        self._announced = False  # the first GOAWAY is out, the second is not
        self._closed = False
        streams.on_drained = self._linger

    def begin(self) -> None:
        """Announce that the connection will end; does nothing the second time."""
        if self._closed or self._announced or self._streams.draining:
            return
        self._announced = True
        self._out.counts.goaways[frames.NO_ERROR] += 1
        self._out.frames.append(goaway(frames.MAX_WINDOW, frames.NO_ERROR))
        self._out.frames.append(frame(frames.PING, 0, 0, b"draining"))
        self._out.flush()
        self._loop.call_later(LINGER_SECONDS, self._name_last_stream)

    def acknowledged(self) -> None:
        """The client has answered a PING: it has read what was sent before it."""
        if self._announced:
            self._name_last_stream()

    def stop(self) -> None:
        """Do nothing any more: the connection has ended."""
        self._closed = True

    def _name_last_stream(self) -> None:
        if self._streams.draining or self._closed:
            return
        self._streams.draining = True
        self._announced = False
        self._out.frames.append(goaway(self._streams.last, frames.NO_ERROR))
        self._out.flush()
        if not self._streams.calls:
            self._linger()

    def _linger(self) -> None:
        """Leave it to the client to close, as all calls are answered.

        Closing first, with frames of it unread, would reset the connection before it has read the
        last answer.
        """
        self._out.flush()
        self._loop.call_later(LINGER_SECONDS, self._close)
