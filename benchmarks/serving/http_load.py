"""A minimal HTTP/1.1 caller: requests made once and sent over and over, one at a time each."""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from typing import Any, NamedTuple

from benchmarks.serving.load import Load, Outcome, Recorder, run_processes

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class HttpCalls(NamedTuple):
    """What one client process sends."""

    address: str
    path: str
    bodies: list[bytes]


class HttpClient(asyncio.Protocol):
    """One connection; each answer starts the next request.

    Args:
        requests: Heads and bodies, sent in turn.
        first: Index of the first.
    """

    def __init__(self, requests: list[bytes], first: int) -> None:
        self._requests = requests
        self._next = first
        self._received = b""
        self._sent = 0.0
        self._transport: Any = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.recorder: Recorder | None = None
        self.end = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail loudly if a request was under way."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def start(self, recorder: Recorder, end: float) -> None:
        """Begin; ``done`` is set when the last answer after ``end`` has come."""
        self.recorder, self.end = recorder, end
        self._ask()

    def _ask(self) -> None:
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1
        self._sent = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        """Take the answer; send the next request."""
        assert self.recorder is not None, "started"
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        length = LENGTH.search(self._received, 0, head) if head >= 0 else None
        if length is None or len(self._received) < head + 4 + int(length[1]):
            return
        status = self._received[9:12].decode("latin-1")
        self._received = b""
        if status == "200":
            self.recorder.answered(self._sent)
        else:
            self.recorder.errors[status] = self.recorder.errors.get(status, 0) + 1
        if time.perf_counter() < self.end:
            self._ask()
        elif not self.done.done():
            self.done.set_result(None)


def http_load(address: str, path: str, bodies: list[bytes], load: Load) -> Outcome:
    """POST JSON in a closed loop, on as many connections as there are requests in flight."""
    return run_processes(partial(_http_process, HttpCalls(address, path, bodies)), load)


def _http_process(calls: HttpCalls, load: Load, number: int, ready: Any, queue: Any) -> None:
    import uvloop

    address, path, bodies = calls
    head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]

    async def main() -> Outcome:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        clients = [
            (
                await loop.create_connection(
                    partial(HttpClient, requests, (number + lane) * 104_729), host, int(port)
                )
            )[1]
            for lane in range(load.concurrency)
        ]
        await asyncio.to_thread(ready.wait, 120)
        recorder = Recorder(time.perf_counter() + load.warmup_seconds)
        for client in clients:
            client.start(recorder, recorder.begin + load.seconds)
        patience = load.seconds + load.warmup_seconds + 60
        await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), patience)
        return recorder.outcome()

    queue.put(uvloop.run(main()))
