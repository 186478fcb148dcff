"""Load that must not notice: release swaps, and four times more of it than the server can take."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc
import grpc.aio

from benchmarks.fault_servers import ServerProcess, connected, percentiles
from benchmarks.small_releases import entity_texts
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc


async def swaps_under_load(address: str, swaps: int, clients: int, rate: float) -> dict[str, Any]:
    """Activate a1, b1, a2, b1, ... while clients ask; every answer must name one release and hold only its ids.

    Args:
        address: Of the server.
        swaps: How many; every one changes the encoder or the release of the same space in turn.
        clients: Concurrent callers.
        rate: Requests/s of all clients together.
    """
    texts = entity_texts(400, seed=5)
    calm: list[float] = []
    during: list[float] = []
    failures: list[str] = []
    mixed = answers = 0
    swapping = False
    stop = False

    async def client(stub: rpc.RetrievalStub, seed: int) -> None:
        nonlocal mixed, answers
        rng = random.Random(seed)
        while not stop:
            began_swapping, started = swapping, time.perf_counter()
            try:
                answer = await stub.Retrieve(pb.RetrieveRequest(query=rng.choice(texts), entity_type="pin", k=10), timeout=30)
                answers += 1
                mixed += any(not hit.id.startswith(answer.release_id + ":") for hit in answer.hits) or not answer.hits
            except grpc.RpcError as error:
                failures.append(f"{error.code().name}: {error.details()}")
            took = time.perf_counter() - started
            (during if began_swapping or swapping else calm).append(took)
            await asyncio.sleep(max(0.0, clients / rate - took))

    async with connected(address) as (stub, admin):
        tasks = [asyncio.ensure_future(client(stub, seed)) for seed in range(clients)]
        await asyncio.sleep(5.0)
        order = ["a2", "b1", "a1", "a2", "b1", "a1"]
        encoder_changes, current = 0, "a1"
        for number in range(swaps):
            wanted = order[number % len(order)]
            swapping = True
            await admin.Activate(pb.ActivateRequest(release_id=wanted), timeout=120)
            swapping = False
            encoder_changes += wanted[0] != current[0]
            current = wanted
            await asyncio.sleep(0.05)
        await asyncio.sleep(2.0)
        stop = True
        await asyncio.gather(*tasks)
    return {
        "swaps": swaps,
        "to_another_encoder": encoder_changes,
        "answers": answers,
        "failed": len(failures),
        "failures": sorted(set(failures))[:5],
        "mixed": mixed,
        "calm": percentiles(calm),
        "during": percentiles(during),
        "p99_ratio": round(percentiles(during)["p99_ms"] / max(1e-9, percentiles(calm)["p99_ms"]), 2),
    }


async def drive(address: str, rate: float, seconds: float, deadline: float) -> dict[str, Any]:
    """Open-loop uncached traffic at ``rate``/s; a call counts as good when it is answered within its deadline."""
    outcomes: dict[str, int] = {}
    reasons: set[str] = set()
    latencies: list[float] = []
    late = 0
    texts = entity_texts(2000, seed=11)
    tasks: set[asyncio.Task[None]] = set()

    async def one(stub: rpc.RetrievalStub, number: int) -> None:
        nonlocal late
        started = time.perf_counter()
        try:
            query = f"{texts[number % len(texts)]} {number} {started}"
            await stub.Retrieve(pb.RetrieveRequest(query=query, entity_type="pin", k=10), timeout=deadline)
            code = "OK"
            took = time.perf_counter() - started
            latencies.append(took)
            late += took > deadline
        except grpc.RpcError as error:
            code = error.code().name
            if code not in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
                reasons.add(f"{code}: {(error.details() or '')[:200]}")
        outcomes[code] = outcomes.get(code, 0) + 1

    async with connected(address) as (stub, _):
        await asyncio.gather(*(one(stub, i) for i in range(8)))
        outcomes.clear()
        latencies.clear()
        began = time.perf_counter()
        number = 0
        while (elapsed := time.perf_counter() - began) < seconds:
            while number < elapsed * rate:
                task = asyncio.ensure_future(one(stub, number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks, return_exceptions=True)
        spent = time.perf_counter() - began
    good = outcomes.get("OK", 0) - late
    return {
        "offered_per_s": round(number / spent, 1),
        "good_per_s": round(good / spent, 1),
        "late": late,
        "outcomes": outcomes,
        "reasons": sorted(reasons)[:3],
        **percentiles(latencies),
    }


async def find_peak(address: str, deadline: float) -> float:
    """Highest good throughput: closed loop with more and more callers."""
    best = 0.0
    for callers in (4, 16, 48):
        done = 0
        until = time.perf_counter() + 4.0

        async def caller(stub: rpc.RetrievalStub, number: int, until: float = until) -> None:
            nonlocal done
            step = 0
            while time.perf_counter() < until:
                step += 1
                try:
                    query = f"peak {number} {step} {until}"
                    await stub.Retrieve(pb.RetrieveRequest(query=query, entity_type="pin", k=10), timeout=deadline)
                    done += 1
                except grpc.RpcError:
                    await asyncio.sleep(0.01)

        async with connected(address) as (stub, _):
            await asyncio.gather(*(caller(stub, i) for i in range(callers)))
        best = max(best, done / 4.0)
    return best


async def overload(server: ServerProcess, seconds: float, deadline: float) -> dict[str, Any]:
    """Peak, then four times the peak, then half of it: goodput, deadlines, memory, recovery."""
    peak = await find_peak(server.address, deadline)
    before = server.rss_mib()
    flooded = await drive(server.address, 4 * peak, seconds, deadline)
    after = server.rss_mib()
    recovered = await drive(server.address, 0.5 * peak, 3.0, deadline)
    return {
        "peak_per_s": round(peak, 1),
        "overload": flooded,
        "goodput_share_of_peak": round(flooded["good_per_s"] / max(1e-9, peak), 3),
        "recovered": recovered,
        "rss_mib_before": round(before, 1),
        "rss_mib_after": round(after, 1),
    }
