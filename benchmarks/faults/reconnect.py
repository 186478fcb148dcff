"""Thousands of clients that connect again at once, as after a restart or a broken network."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import struct
import time
from typing import Any

import numpy as np

from benchmarks.faults.attacks import END_STREAM, HEADERS, PREFACE, QUESTION, call, settings
from benchmarks.faults.servers import ServerProcess
from encoders.errors import OmniError

PATIENCE_SECONDS = 60.0
FIRST = PREFACE + settings({}) + call(1, "Retrieve", QUESTION)
"""All that a client sends: greeting and one call in one write."""
SPARE_DESCRIPTORS = 200


class TooFewDescriptors(OmniError):
    """The process may not open so many sockets."""


class Client(asyncio.Protocol):
    """Connects, asks once and waits for the end of the answer."""

    def __init__(self) -> None:
        self._received = b""
        self.answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet and ask."""
        transport.write(FIRST)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Look for the frame that ends the call."""
        data = self._received + data
        at = 0
        while len(data) - at >= 9:
            high, low, kind, flags, _ = struct.unpack_from(">BHBBL", data, at)
            at += 9 + (high << 16) + low
            if kind == HEADERS and flags & END_STREAM and at <= len(data):
                if not self.answered.done():
                    self.answered.set_result(time.perf_counter())
                return
        self._received = data

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail if there was no answer."""
        if not self.answered.done():
            self.answered.set_exception(ConnectionError(f"no answer: {exc}"))


def reconnect(server: ServerProcess, clients: int, rounds: int = 3) -> dict[str, Any]:
    """Have all clients connect at once, and again at once, so many times.

    Args:
        server: On a release; its question may be cached.
        clients: How many.
        rounds: The first warms up; the slowest of the others counts.

    Returns:
        Seconds until the last had its answer, milliseconds of the median client, and failures.

    Raises:
        TooFewDescriptors: The limit of open files is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < clients + SPARE_DESCRIPTORS:
        raise TooFewDescriptors(
            f"reconnect: expected room for {clients + SPARE_DESCRIPTORS} open files, but got {soft}"
            f" (at most {hard}). Raise it with ulimit -n, or give --clients."
        )
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_clients, args=(int(server.info["port"]), clients, rounds, send), daemon=True
    )
    process.start()
    send.close()
    try:
        found: list[dict[str, Any]] = receive.recv()  # EOFError if the process fails
    finally:
        process.join(10)
    slowest: dict[str, Any] = {"served_s": 0.0, "p50_ms": 0.0}
    failed = 0
    for row in found[1:]:
        failed += row["failed"]
        if row["seconds"] and max(row["seconds"]) >= slowest["served_s"]:
            slowest = {
                "served_s": round(max(row["seconds"]), 3),
                "p50_ms": round(float(np.median(row["seconds"])) * 1e3, 1),
            }
    return {"clients": clients, **slowest, "failed": failed}


def _clients(port: int, count: int, rounds: int, send: Any) -> None:
    """Body of the client process."""
    import uvloop

    async def run() -> list[dict[str, Any]]:
        return [await _round(port, count) for _ in range(rounds)]

    send.send(uvloop.run(run()))


async def _round(port: int, count: int) -> dict[str, Any]:
    """All connect and ask; returns the seconds that each waited since the beginning."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    connecting = [loop.create_connection(Client, "127.0.0.1", port) for _ in range(count)]
    made = await asyncio.gather(*connecting, return_exceptions=True)
    pairs = [pair for pair in made if isinstance(pair, tuple)]
    waiting = asyncio.gather(*(client.answered for _, client in pairs), return_exceptions=True)
    answered = await asyncio.wait_for(waiting, PATIENCE_SECONDS)
    for transport, _ in pairs:
        transport.abort()
    seconds = [at - began for at in answered if isinstance(at, float)]
    return {"seconds": seconds, "failed": count - len(seconds)}
