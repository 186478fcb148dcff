"""A gRPC load generator: several client processes, closed loop or open loop."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import grpc
import numpy as np

Ask = Callable[[int], Any]
Start = Callable[[], tuple[Ask, Callable[[], None]]]
"""Runs inside a client process; returns (ask number i, close)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How hard to push and for how long."""

    concurrency: int
    """Calls in flight over all processes (closed loop), or at most that many (open loop)."""
    seconds: float
    warmup_seconds: float = 0.5
    processes: int = 2
    """Client processes; never more than ``concurrency``."""
    rate: float | None = None
    """Open loop: calls per second at fixed times; latency counts from the time a call was due, so a
    stalled server is not flattered."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the clients saw.

    Attributes:
        latencies_ms: ``(N,)`` of every call that began after the warm-up.
        errors: Calls that failed, by message.
        seconds: From the end of the warm-up to the last answer.
    """

    latencies_ms: np.ndarray
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def requests_per_second(self) -> float:
        """Answered calls per second."""
        return len(self.latencies_ms) / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, float | int]:
        """Rate and percentiles (milliseconds)."""
        p50, p95, p99 = (
            np.percentile(self.latencies_ms, [50, 95, 99])
            if len(self.latencies_ms)
            else (np.nan,) * 3
        )
        return {
            "requests_per_second": round(self.requests_per_second, 1),
            "p50_ms": round(float(p50), 3),
            "p95_ms": round(float(p95), 3),
            "p99_ms": round(float(p99), 3),
            "requests": len(self.latencies_ms),
            "errors": sum(self.errors.values()),
        }


def stub_load(
    address: str,
    method: str,
    payloads: Sequence[bytes],
    load: Load,
    metadata: Sequence[tuple[str, str]] = (),
) -> Outcome:
    """Drive one method with ready-made request bytes through bare ``grpc.aio`` calls.

    Args:
        address: ``host:port``.
        method: Full name, e.g. ``/omnisearchsage.v1.Retrieval/Retrieve``.
        payloads: Serialised requests, sent in turn; answers are not parsed.
        load: How hard.
        metadata: Sent with each call.
    """
    return run_processes(
        partial(_stub_process, StubCalls(address, method, list(payloads), tuple(metadata))), load
    )


def client_load(start: Start, load: Load) -> Outcome:
    """Drive a blocking client with ``concurrency`` threads spread over the processes.

    Args:
        start: Picklable; makes the client inside the process.
        load: How hard.
    """
    return run_processes(partial(_thread_process, start), load)


def run_processes(process: Callable[..., None], load: Load) -> Outcome:
    """Run ``process(part, number, ready, queue)`` in several processes and merge their results."""
    processes = min(load.processes, load.concurrency)
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    ready = context.Barrier(processes + 1)
    workers = []
    for i in range(processes):
        share = load.concurrency // processes + (i < load.concurrency % processes)
        rate = None if load.rate is None else load.rate / processes
        part = replace(load, concurrency=share, processes=1, rate=rate)
        worker = context.Process(target=process, args=(part, i, ready, queue), daemon=True)
        worker.start()
        workers.append(worker)
    ready.wait(120)
    outcomes: list[Outcome] = []
    try:
        for _ in workers:
            outcomes.append(queue.get(timeout=load.seconds + load.warmup_seconds + 120))
    finally:
        for worker in workers:
            worker.join(10)
            if worker.is_alive():
                worker.kill()
    errors: dict[str, int] = {}
    for outcome in outcomes:
        for message, count in outcome.errors.items():
            errors[message] = errors.get(message, 0) + count
    return Outcome(
        np.concatenate([o.latencies_ms for o in outcomes]), errors, max(o.seconds for o in outcomes)
    )


@dataclass(slots=True)
class Recorder:
    """What one client process saw, kept cheaply while it runs."""

    begin: float
    latencies: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    last: float = 0.0

    def answered(self, due: float) -> None:
        """A call that was due at ``due`` has its answer."""
        now = time.perf_counter()
        if due >= self.begin:
            self.latencies.append(now - due)
            self.last = max(self.last, now)

    def failed(self, error: BaseException) -> None:
        """A call failed."""
        name = error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1

    def outcome(self) -> Outcome:
        """Everything so far."""
        return Outcome(
            np.array(self.latencies) * 1e3, self.errors, max(0.0, self.last - self.begin)
        )


class StubCalls(NamedTuple):
    """What one client process sends."""

    address: str
    method: str
    payloads: list[bytes]
    metadata: tuple[tuple[str, str], ...]


def _stub_process(calls: StubCalls, load: Load, number: int, ready: Any, queue: Any) -> None:
    import uvloop

    payloads = calls.payloads

    async def main() -> Outcome:
        async with grpc.aio.insecure_channel(
            calls.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            call = channel.unary_unary(calls.method)
            await channel.channel_ready()
            await asyncio.to_thread(ready.wait, 120)
            begin = time.perf_counter()
            recorder = Recorder(begin + load.warmup_seconds)
            end = recorder.begin + load.seconds
            # Primes, so that processes do not send the same payloads at the same time.
            step, first, total = 7919, number * 104729, len(payloads)

            async def one(i: int, due: float) -> None:
                try:
                    await call(
                        payloads[(first + i * step) % total], metadata=calls.metadata or None
                    )
                    recorder.answered(due)
                except grpc.RpcError as error:
                    recorder.failed(error)

            async def closed(lane: int) -> None:
                i = lane
                while (due := time.perf_counter()) < end:
                    await one(i, due)
                    i += load.concurrency

            if load.rate is None:
                await asyncio.gather(*(closed(lane) for lane in range(load.concurrency)))
            else:
                await _paced(one, begin, end, load.rate, load.concurrency)
            return recorder.outcome()

    queue.put(uvloop.run(main()))


async def _paced(
    one: Callable[[int, float], Any], begin: float, end: float, rate: float, limit: int
) -> None:
    places = asyncio.Semaphore(limit)
    tasks: set[asyncio.Task[None]] = set()

    async def later(i: int, due: float) -> None:
        try:
            await one(i, due)
        finally:
            places.release()

    for i in range(int((end - begin) * rate)):
        due = begin + i / rate
        pause = due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        # When all places are taken the call waits, and its latency still counts from `due`.
        await places.acquire()
        task = asyncio.create_task(later(i, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def _thread_process(start: Start, load: Load, number: int, ready: Any, queue: Any) -> None:
    ask, close = start()
    ready.wait(120)
    begin = time.perf_counter()
    recorders = [Recorder(begin + load.warmup_seconds) for _ in range(load.concurrency)]
    end = begin + load.warmup_seconds + load.seconds

    def lane(recorder: Recorder, i: int) -> None:
        while (due := time.perf_counter()) < end:
            try:
                ask(number * 104729 + i)
                recorder.answered(due)
            except Exception as error:
                recorder.failed(error)
            i += load.concurrency

    threads = [
        threading.Thread(target=lane, args=(recorder, i)) for i, recorder in enumerate(recorders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close()
    together = Recorder(begin + load.warmup_seconds)
    for recorder in recorders:
        together.latencies += recorder.latencies
        together.last = max(together.last, recorder.last)
        for name, count in recorder.errors.items():
            together.errors[name] = together.errors.get(name, 0) + count
    queue.put(together.outcome())
