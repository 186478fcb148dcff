"""How the server leaves a connection: without losing a call."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from retrieval.http2 import frames as wire
from retrieval.http2.flow_control import ControlFrames
from retrieval.http2.frames import frame

if TYPE_CHECKING:
    from retrieval.http2.server import Http2Server

LINGER_SECONDS = 2.0
"""How long a leaving server waits for a client to take notice; clients of grpc take a round trip."""


class Leaving(ControlFrames):
    """The part of a connection that says goodbye; ``Connection`` sets the attributes."""

    server: Http2Server
    closed: bool
    pinged: bool

    def _flush(self) -> None:
        """Write what is ready."""
        raise NotImplementedError

    def close(self) -> None:
        """End the connection once what was written has left."""
        raise NotImplementedError

    def drain(self) -> None:
        """Tell the client to go elsewhere, without losing a call: announce, wait for a round trip, name the last stream, finish, close."""
        if self.closed or self.draining or self._farewell is not None:
            return
        self._farewell = self._say_goodbye
        self._out.append(
            frame(wire.GOAWAY, 0, 0, struct.pack(">LL", wire.MAX_WINDOW, wire.NO_ERROR))
        )
        self._out.append(frame(wire.PING, 0, 0, b"goodbye!"))
        self._flush()
        self.server.loop.call_later(LINGER_SECONDS, self._say_goodbye)

    def _say_goodbye(self) -> None:
        if self.draining or self.closed:
            return
        self.draining = True
        self._farewell = None
        self._out.append(
            frame(wire.GOAWAY, 0, 0, struct.pack(">LL", self.last_stream, wire.NO_ERROR))
        )
        self._flush()
        if not self.calls:
            self._leave()

    def _leave(self) -> None:
        """All calls are answered: the client closes.

        Closing first, with frames of it unread, would reset the connection under its eyes.
        """
        self._flush()
        self.server.loop.call_later(LINGER_SECONDS, self.close)

    def ping(self) -> None:
        """Ask whether the peer is still there."""
        self.pinged = True
        self._out.append(frame(wire.PING, 0, 0, b"there??\n"))
        self._flush()
