"""``omni bench faults --part overload``: four times the load that a server can answer.

Calls are prepared frames sent from cores of their own; what counts is answers in time.

Each side has its own cores where there are two or more, in the search for the peak as in the flood:
a client that shares the server's cores would take them away just when there is most to refuse, and
the figure would be the client's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from google.protobuf.message import Message

from benchmarks.faults.servers import ServerProcess, percentiles
from benchmarks.serving.frames_load import FrameClient
from benchmarks.small_releases import entity_texts
from protos import retrieval_pb2 as pb
from retrieval.http2 import frames

CONNECTIONS = 8
CALLERS = (16, 48, 64)
"""Callers in flight when the peak is looked for; fewer than the server has places, so that none is
refused."""
PEAK_SECONDS = 4.0
RECOVERY_SECONDS = 3.0
TICK_SECONDS = 0.001
STATUS = {b"0": "OK", b"4": "DEADLINE_EXCEEDED", b"8": "RESOURCE_EXHAUSTED"}


def split_cores() -> tuple[set[int], set[int]]:
    """Split the cores of this process between server and client; one core is shared."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (set(cores[:half]), set(cores[half:])) if half else (set(cores), set(cores))


@dataclass
class Tally:
    """What came of the calls of one phase."""

    deadline: float
    outcomes: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    asked: int = 0
    late: int = 0
    began: float = 0.0
    last: float = 0.0
    last_failure: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, status: bytes, due: float) -> None:
        """A call that was due at ``due`` has ended with this gRPC status."""
        now = time.perf_counter()
        name = STATUS.get(status, f"grpc-status {status.decode()}")
        self.outcomes[name] = self.outcomes.get(name, 0) + 1
        if name == "OK":
            self.last = now
            self.latencies.append(now - due)
            self.late += now - due > self.deadline
        else:
            self.last_failure = max(self.last_failure, due)

    def summary(self) -> dict[str, Any]:
        """Rates are taken over the time from the first call to the last answer."""
        spent = max(1e-9, self.last - self.began)
        return {
            "offered_per_s": round(self.asked / spent, 1),
            "good_per_s": round((len(self.latencies) - self.late) / spent, 1),
            "late": self.late,
            "outcomes": self.outcomes,
            "client_cpu_share": round(self.cpu_seconds / spent, 3),
            **percentiles(self.latencies),
        }


class Asker(FrameClient):
    """One connection; every question is new to the server and carries a deadline."""

    method = "/omnisearchsage.v1.Retrieval/Retrieve"

    def __init__(self, authority: str, deadline: float, texts: list[str], first: int) -> None:
        self._deadline = deadline
        super().__init__(self.method, authority, [], first, 0)
        self._texts = texts
        self._due: dict[int, float] = {}
        self.tally = Tally(deadline)
        self.until = 0.0

    def fields(self, method: str, authority: str) -> list[tuple[str, str]]:
        """With a deadline."""
        return [
            *super().fields(method, authority),
            ("grpc-timeout", f"{int(self._deadline * 1e3)}m"),
        ]

    def body(self, number: int) -> bytes:
        """The message of one call, with its prefix."""
        payload = self.request(number).SerializeToString()
        return b"".join((b"\x00", len(payload).to_bytes(4, "big"), payload))

    def request(self, number: int) -> Message:
        """One question."""
        return pb.RetrieveRequest(query=self.query(number), entity_type="pin", k=10)

    def query(self, number: int) -> str:
        """A text nobody has asked before."""
        return f"{self._texts[number % len(self._texts)]} {number}"

    def ask(self, due: float) -> None:
        """Write one question; ``flush`` sends it."""
        stream = self._stream
        self._ask()
        self._due[stream] = due
        self.tally.asked += 1

    def flush(self) -> None:
        """Send what was written."""
        self._flush()

    @property
    def waiting(self) -> int:
        """Questions without an answer."""
        return len(self._sent)

    def _answered(self, stream: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self._sent.pop(stream)
        self.tally.add(
            next((value for name, value in headers if name == b"grpc-status"), b"none"),
            self._due.pop(stream),
        )
        now = time.perf_counter()
        if now < self.until:  # a caller asks again
            self.ask(now)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.RST_STREAM and stream in self._sent:
            self._answered(stream, ((b"grpc-status", b"reset"),))
        else:
            super()._control(kind, flags, stream, payload)


async def wait_for_answers(askers: Sequence[Asker], seconds: float) -> None:
    """Wait until no call is in flight, so long at most."""
    until = time.perf_counter() + seconds
    while any(asker.waiting for asker in askers) and time.perf_counter() < until:
        await asyncio.sleep(0.002)


async def phase(
    askers: Sequence[Asker], deadline: float, seconds: float, *, callers: int = 0, rate: float = 0.0
) -> Tally:
    """Send calls in a closed loop (``callers``) or an open loop (``rate``), then await the rest."""
    cpu, began = time.process_time(), time.perf_counter()
    tally = Tally(deadline, began=began, last=began)
    for asker in askers:
        asker.tally, asker.until = tally, began + seconds if callers else 0.0
    for number in range(callers):
        askers[number % len(askers)].ask(time.perf_counter())
    for asker in askers:
        asker.flush()
    while (elapsed := time.perf_counter() - began) < seconds:
        while tally.asked < elapsed * rate:
            askers[tally.asked % len(askers)].ask(began + tally.asked / rate)
        for asker in askers:
            asker.flush()
        await asyncio.sleep(TICK_SECONDS if rate else 0.05)
    tally.cpu_seconds = time.process_time() - cpu
    await wait_for_answers(askers, deadline + 5.0)
    return tally


def _client(address: str, seconds: float, deadline: float, cores: set[int], result: Any) -> None:
    """The client process: peak, flood, recovery, peak again."""
    import uvloop

    os.sched_setaffinity(0, cores)

    async def main() -> dict[str, Any]:
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        texts = entity_texts(2000, seed=11)
        askers = []
        for number in range(CONNECTIONS):
            make_asker = partial(Asker, address, deadline, texts, number * 10_000_000)
            _, asker = await loop.create_connection(make_asker, host, int(port))
            await asyncio.wait_for(asker.greeted, 30)
            askers.append(asker)
        await phase(askers, deadline, 1.0, callers=16)  # the server learns how long a text takes
        peaks = {
            callers: (await phase(askers, deadline, PEAK_SECONDS, callers=callers)).summary()
            for callers in CALLERS
        }
        best = max(peaks, key=lambda callers: float(peaks[callers]["good_per_s"]))
        peak = float(peaks[best]["good_per_s"])
        result.send("flood")
        flood = await phase(askers, deadline, seconds, rate=4 * peak)
        result.send("over")
        after = await phase(askers, deadline, RECOVERY_SECONDS, rate=0.5 * peak)
        again = await phase(askers, deadline, PEAK_SECONDS, callers=best)
        return {
            "peaks": peaks,
            "peak_per_s": peak,
            "overload": flood.summary(),
            "goodput_share_of_peak": round(flood.summary()["good_per_s"] / max(1e-9, peak), 3),
            "recovered": after.summary(),
            "recovered_after_s": round(max(0.0, after.last_failure - after.began), 3),
            "peak_afterwards_per_s": again.summary()["good_per_s"],
        }

    result.send(uvloop.run(main()))


def overload(
    server: ServerProcess, seconds: float, deadline: float, client_cores: set[int]
) -> dict[str, Any]:
    """Measure goodput at the peak, at four times the peak, at half of it and at the peak again.

    Also deadlines, memory and recovery.

    Args:
        server: Its encoder is the limit.
        seconds: Length of the flood.
        deadline: Seconds that every call may take.
        client_cores: Where the client runs.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_client, args=(server.address, seconds, deadline, client_cores, send), daemon=True
    )
    process.start()
    send.close()
    memory: list[float] = []
    over = threading.Event()
    cpu: list[float] = []

    def watch() -> None:
        while not over.is_set():
            memory.append(round(server.rss_mib(), 1))
            over.wait(max(0.5, seconds / 6))

    watcher = threading.Thread(target=watch)
    try:
        while not isinstance(message := receive.recv(), dict):
            cpu.append(server.cpu_seconds())
            if message == "flood":
                watcher.start()
            else:
                over.set()
    finally:
        over.set()
        process.join(10)
    watcher.join()
    return {
        **message,
        "server_cpu_share": round((cpu[1] - cpu[0]) / seconds, 3),
        "rss_mib_during": memory,
        "cores": {"server": sorted(server.cores), "client": sorted(client_cores)},
    }
