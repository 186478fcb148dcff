"""What every request of a web port meets first: allowed names, safe headers, errors, CORS."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval.addresses import AllowedHosts

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
CORS_HEADERS = (
    "authorization",
    "content-type",
    "connect-protocol-version",
    "connect-timeout-ms",
    "grpc-timeout",
    "x-grpc-web",
    "x-user-agent",
    "traceparent",
    "tracestate",
)
"""What a page of an allowed origin may send."""
EXPOSED_HEADERS = ("grpc-status", "grpc-message", "trailer-retry-after-ms", "retry-after")


class RequestPolicy:
    """Wraps an application.

    Args:
        app: What answers.
        hosts: Under which names it may be asked; None: under all.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; no error leaves it without an answer."""
        if scope["type"] != "http":
            return
        size = len(scope["query_string"]) + len(scope["path"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEAD_BYTES:  # uvicorn bounds only heads that come in several reads
            answer = PlainTextResponse("headers too large\n", 431, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        host = Headers(scope=scope).get("host")
        if self._hosts is not None and not self._hosts.allows(host):
            answer = PlainTextResponse(
                f"host: {(host or '')[:200]!r} is not a name of this server. Start it with"
                " --allowed-host NAME if it is.\n",
                421,
            )
            await answer(scope, receive, send)
            return
        started = False

        async def send_safely(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_safely)
        except asyncio.CancelledError:
            raise
        except Exception:
            error_id = uuid.uuid4().hex[:12]
            log.exception("%s failed, id %s", scope["path"], error_id)
            if started:
                raise  # uvicorn ends the connection: the rest of the answer cannot be had
            answer = PlainTextResponse(f"internal error, id {error_id}\n", 500)
            await answer(scope, receive, send_safely)


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins call; without any, no page of another origin may."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=list(CORS_HEADERS),
        expose_headers=list(EXPOSED_HEADERS),
        max_age=7200,
    )
