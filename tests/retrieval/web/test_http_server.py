"""The HTTP ports: bounds of connections and requests, allowed names, what leaves as an error."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from retrieval.addresses import AllowedHosts
from retrieval.errors import AddressInUse, CannotListen
from retrieval.web import http_server
from retrieval.web.http_server import HttpServer
from retrieval.web.request_policy import RequestPolicy, with_cors
from tests.helpers.waiting import until_async

CLOSE = "Connection: close\r\n\r\n"


async def hello(request: Request) -> Response:
    return JSONResponse(
        {"path": request.url.path, "q": dict(request.query_params), "method": request.method}
    )


async def broken(request: Request) -> Response:
    raise RuntimeError("secret")


def application(hosts: AllowedHosts | None = None, origins: tuple[str, ...] = ()) -> RequestPolicy:
    routes = [Route("/hello", hello, methods=["GET", "POST"]), Route("/broken", broken)]
    return RequestPolicy(with_cors(Router(routes), origins), hosts)


@asynccontextmanager
async def serving(app: RequestPolicy, max_connections: int = 100) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, max_connections=max_connections)
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.stop()


async def exchange(port: int, content: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content.encode())
    try:
        return await asyncio.wait_for(reader.read(-1), 60)
    finally:
        writer.close()


async def status(port: int, content: str) -> tuple[int, bytes]:
    answer = await exchange(port, content)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def test_http_server_answers_routes_and_hides_errors() -> None:
    async with serving(application()) as server:
        port = server.port
        code, body = await status(port, f"GET /hello?x=1&y= HTTP/1.1\r\nHost: localhost\r\n{CLOSE}")
        assert code == 200
        assert json.loads(body) == {"path": "/hello", "q": {"x": "1", "y": ""}, "method": "GET"}
        for head, wanted in (
            (f"GET /nope HTTP/1.1\r\nHost: x\r\n{CLOSE}", 404),
            (f"DELETE /hello HTTP/1.1\r\nHost: x\r\n{CLOSE}", 405),
            (f"GET /broken HTTP/1.1\r\nHost: x\r\n{CLOSE}", 500),
        ):
            code, body = await status(port, head)
            assert code == wanted and b"secret" not in body
        assert re.fullmatch(rb"internal error, id [0-9a-f]{12}\n", body)
        twice = f"GET /hello HTTP/1.1\r\nHost: x\r\n\r\nGET /hello HTTP/1.1\r\nHost: x\r\n{CLOSE}"
        assert (await exchange(port, twice)).count(b"HTTP/1.1 200") == 2, "kept alive"
        with pytest.raises(AddressInUse, match="--metrics-port"):
            await HttpServer(application(), max_connections=1).start("127.0.0.1", port)


@pytest.mark.parametrize(
    "head",
    [
        "nonsense\r\n\r\n",
        "POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nGET /",
        "POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n12345",
        "POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\n12345",
        "GET /hello HTTP/1.1\r\n\r\n",
        "GET /hello HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        "GET /hello HTTP/1.1\r\nHost: x\r\nBad Name: y\r\n\r\n",
        "GET /hello HTTP/1.1\r\nHost: x\r\nX: " + "a" * 40_000 + "\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_http_server_malformed_request_is_refused_and_ends_its_connection(head: str) -> None:
    async with serving(application()) as server:
        code, _ = await status(server.port, head)
        assert 400 <= code < 500


async def test_idle_connections_make_room_for_new_ones() -> None:
    async with serving(application(), max_connections=8) as server:
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(30)]
        half = await asyncio.open_connection("127.0.0.1", server.port)
        half[1].write(b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12")
        for _ in range(3):
            code, _ = await status(server.port, f"GET /hello HTTP/1.1\r\nHost: x\r\n{CLOSE}")
            assert code == 200
        assert await silent[0][0].read() == b"", "the longest waiting has left"
        for _, writer in [*silent, half]:
            writer.close()


async def test_silent_and_slow_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "FIRST_REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(http_server, "CHECK_SECONDS", 0.05)
    async with serving(application()) as server:
        silent = await asyncio.open_connection("127.0.0.1", server.port)
        slow = await asyncio.open_connection("127.0.0.1", server.port)
        ended = asyncio.gather(silent[0].read(), slow[0].read(), return_exceptions=True)
        for _ in range(1000):
            if ended.done():
                break
            slow[1].write(b"G")  # each byte is progress, the request as a whole is late
            await asyncio.sleep(0.02)
        await asyncio.wait_for(ended, 60)
        await until_async(lambda: len(server._connections) == 0)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("localhost:9464", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("10.1.2.3:9464", 200),
        ("search.example", 200),
        ("SEARCH.example.:443", 200),
        ("page.localhost", 200),
        ("evil.example", 421),
        ("evil.example:9464", 421),
        ("search.example.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
async def test_host_header_must_name_this_server(host: str, wanted: int) -> None:
    async with serving(application(AllowedHosts(["search.example"]))) as server:
        code, _ = await status(server.port, f"GET /hello HTTP/1.1\r\nHost: {host}\r\n{CLOSE}")
        assert code == wanted


async def test_cors_is_off_until_an_origin_is_allowed() -> None:
    ask = (
        "OPTIONS /hello HTTP/1.1\r\nHost: x\r\nOrigin: https://shop.example\r\n"
        "Access-Control-Request-Method: POST\r\n"
        f"Access-Control-Request-Headers: content-type\r\n{CLOSE}"
    )
    for origins, allowed in (
        ((), False),
        (("https://shop.example",), True),
        (("https://x",), False),
    ):
        async with serving(application(origins=origins)) as server:
            answer = (await exchange(server.port, ask)).lower()
            assert (b"access-control-allow-origin: https://shop.example" in answer) == allowed


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("nosuch.invalid", "does not resolve"),
        ("10.9.9.9", "no such address"),
        ("256.1.1.1", "does not resolve"),
    ],
)
async def test_address_that_cannot_be_had_says_why(host: str, words: str) -> None:
    with pytest.raises(CannotListen, match=words) as refused:
        await HttpServer(application(), max_connections=1).start(host, 0)
    assert "another process" not in str(refused.value)
