"""Requests over HTTP/2 that are no gRPC calls, answered by an ASGI application.

So the gRPC port answers JSON and gRPC-Web, too, by the code that answers them on the web port.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

from retrieval.http2.calls import Call, Method
from retrieval.http2.headers import CONNECTION_FIELDS, literal
from retrieval.http2.limits import CONTROL_FRAMES_PER_CALL
from retrieval.web.http_server import REQUEST_SECONDS

NOT_CALLS = frozenset((401, 404, 405, 415, 421, 431))
"""Answers to requests that reach no method: they are charged."""
NOT_CALL_COST = 2 * CONTROL_FRAMES_PER_CALL
"""Control frames; an answer earns half of it back."""


def http_method(app: ASGIApp) -> Method:
    """Make the method by which an application answers requests."""

    async def answer(call: Call) -> None:
        exchange = _Exchange(call)
        await app(exchange.scope(), exchange.receive, exchange.send)

    return Method(stream=answer, client_streaming=True, is_http=True)


class _Exchange:
    """One request and its answer, as ASGI has them.

    An answer is sent when it is whole. A client that goes away cancels the application's task.

    Args:
        call: The stream that the request opened.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._fields = dict(call.head.fields)
        self._has_body = False
        self._body_until = monotonic() + REQUEST_SECONDS
        self._start: Message = {}
        self._content = bytearray()

    def scope(self) -> Scope:
        """Return what the headers say."""
        fields = self._fields
        path, _, query = fields[b":path"].partition(b"?")
        regular = [field for field in self._call.head.fields if not field[0].startswith(b":")]
        if b":authority" in fields:
            regular = [field for field in regular if field[0] != b"host"]
            regular.insert(0, (b"host", fields[b":authority"]))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": fields[b":method"].decode("latin-1"),
            "scheme": fields[b":scheme"].decode("latin-1"),
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": regular,
            "client": _host_and_port(self._call.peer()),
            "server": None,
        }

    async def receive(self) -> Message:
        """Return the next piece of the body; after it nothing comes, as an end cancels the task."""
        call = self._call
        assert call.queue is not None, "a request's body is a stream"
        if self._has_body:
            await asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(max(0.0, self._body_until - monotonic())):
                piece = await call.queue.get()
        except TimeoutError:  # it trickles in, or does not come
            return {"type": "http.disconnect"}
        if piece is None:
            self._has_body = True
            return {"type": "http.request", "body": b"", "more_body": False}
        call.writer.message_taken(call, len(piece))
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(self, message: Message) -> None:
        """Gather the answer; send it with its last piece."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._content += message.get("body", b"")
        if message.get("more_body", False):
            return
        status: int = self._start["status"]
        block = literal(b":status", b"%d" % status) + b"".join(
            literal(name.lower(), value)
            for name, value in self._start.get("headers", ())
            if name.lower() not in CONNECTION_FIELDS
        )
        content = b"" if self._fields[b":method"] == b"HEAD" else bytes(self._content)
        cost = NOT_CALL_COST if status in NOT_CALLS else 0
        self._call.writer.send_http(self._call, block, content, cost)


def _host_and_port(peer: str) -> tuple[str, int] | None:
    """Return the two of an address as gRPC writes it; None where it has no port."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
