"""A small HTTP/1.1 server for the metrics port: routes on asyncio, keep-alive, all bounded."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from retrieval.errors import AddressInUse

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 1024 * 1024
IDLE_SECONDS = 75.0
READ_SECONDS = 10.0
MAX_CONNECTIONS = 256


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; ``tail`` is the rest of a path that matched a prefix."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    tail: str = ""

    def json(self) -> Any:
        """Parse the body as JSON; raises ``ValueError``."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> Response:
        """Make a JSON response."""
        return cls(
            json.dumps(value, ensure_ascii=False).encode(),
            "application/json; charset=utf-8",
            status,
        )


Handler = Callable[[Request], Awaitable[Response]]
Routes = Mapping[str, Handler]
"""Path -> handler.

A path that ends in ``/`` (other than ``/`` itself) matches everything below it.
"""

_SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class HttpServer:
    """Serves routes on one port.

    Args:
        routes: The table; exact paths win over prefixes, longer prefixes over shorter.
    """

    def __init__(self, routes: Routes) -> None:
        prefixes = [path for path in routes if path != "/" and path.endswith("/")]
        self._exact = {path: routes[path] for path in routes if path not in prefixes}
        self._prefixes = [(path, routes[path]) for path in sorted(prefixes, key=len, reverse=True)]
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, host: str, port: int, reuse_port: bool = False) -> int:
        """Listen; returns the port. Raises ``AddressInUse``."""
        try:
            self._server = await asyncio.start_server(
                self._accept, host, port, limit=MAX_HEAD_BYTES, reuse_port=reuse_port or None
            )
        except OSError as error:
            raise AddressInUse(f"{host}:{port}", "--metrics-port") from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self.port

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs connections in tasks"
        self._connections.add(task)
        try:
            if len(self._connections) <= MAX_CONNECTIONS:
                while await self._serve_one(reader, writer):
                    pass
        except (
            OSError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
            TimeoutError,
            ValueError,
        ):
            pass  # the peer has gone, sent too much or took too long: nobody reads an answer
        except asyncio.CancelledError:
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; return whether the connection is kept."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_SECONDS)
        except asyncio.LimitOverrunError:
            await self._write(writer, Response(b"headers too large\n", status=431), "GET", False)
            return False
        lines = head.decode("latin-1").split("\r\n")
        parts = lines[0].split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            await self._write(writer, Response(b"not HTTP/1.1\n", status=400), "GET", False)
            return False
        method, target, version = parts
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        default = "keep-alive" if version == "HTTP/1.1" else "close"
        keep = headers.get("connection", default).lower() != "close"
        length = _body_length(headers)
        if length is None:
            refused = Response(b"body too large, or of unknown length\n", status=413)
            await self._write(writer, refused, method, False)
            return False
        body = await asyncio.wait_for(reader.readexactly(length), READ_SECONDS) if length else b""
        response = await self.answer(method, target, headers, body)
        await self._write(writer, response, method, keep)
        return keep

    async def answer(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> Response:
        """Find the route and run it; every failure becomes a response."""
        if method not in ("GET", "HEAD", "POST"):
            return Response(
                b"method not allowed\n", status=405, headers={"Allow": "GET, HEAD, POST"}
            )
        try:
            url = urlsplit(target)
            path = unquote(url.path)
            query = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=100))
        except ValueError:
            return Response(b"bad request target\n", status=400)
        handler, tail = self._route(path)
        if handler is None:
            return Response(b"not found\n", status=404)
        try:
            return await handler(Request(method, path, query, headers, body, tail))
        except Exception:  # of a handler: the connection must not end without an answer
            log.exception("%s failed", path)
            return Response(b"internal error\n", status=500)

    def _route(self, path: str) -> tuple[Handler | None, str]:
        """Return the handler of a path, or None, and what follows the prefix that matched."""
        exact = self._exact.get(path)
        if exact is not None:
            return exact, ""
        for prefix, handler in self._prefixes:
            if path.startswith(prefix):
                return handler, path[len(prefix) :]
        return None, ""

    @staticmethod
    async def _write(
        writer: asyncio.StreamWriter, response: Response, method: str, keep: bool
    ) -> None:
        phrase = HTTPStatus(response.status).phrase
        headers = {
            "Content-Type": response.content_type,
            "Content-Length": str(len(response.body)),
            "Connection": "keep-alive" if keep else "close",
            **_SAFE_HEADERS,
            **response.headers,
        }
        head = (
            f"HTTP/1.1 {response.status} {phrase}\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            + "\r\n"
        )
        writer.write(head.encode("latin-1") + (b"" if method == "HEAD" else response.body))
        await asyncio.wait_for(writer.drain(), READ_SECONDS)


def _body_length(headers: Mapping[str, str]) -> int | None:
    """Return the length of a request's body; None if it is unknown or too much."""
    if "transfer-encoding" in headers:
        return None
    try:
        length = int(headers.get("content-length", "0"))
    except ValueError:
        return None
    return length if 0 <= length <= MAX_BODY_BYTES else None
