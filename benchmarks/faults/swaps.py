"""Load that must not notice release swaps."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc
import grpc.aio

from benchmarks.faults.servers import connected, percentiles
from benchmarks.small_releases import entity_texts
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc

SWAPS_A_BURST = 10
"""Swaps that follow each other; as long a calm follows each burst, so that both see the machine as
it is then."""


async def swaps_under_load(address: str, swaps: int, clients: int, rate: float) -> dict[str, Any]:
    """Activate a1, b1, a2, b1, ... in bursts under load; an answer names one release and its ids.

    "During" are the calls that a swap overlaps, from the order to activate until its answer; "calm"
    are those of the pauses between bursts.

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
    pausing = False
    stop = False

    async def client(stub: rpc.RetrievalStub, seed: int) -> None:
        nonlocal mixed, answers
        rng = random.Random(seed)
        while not stop:
            began_swapping, started = swapping, time.perf_counter()
            try:
                answer = await stub.Retrieve(
                    pb.RetrieveRequest(query=rng.choice(texts), entity_type="pin", k=10), timeout=30
                )
                answers += 1
                mixed += (
                    any(not hit.id.startswith(answer.release_id + ":") for hit in answer.hits)
                    or not answer.hits
                )
            except grpc.RpcError as error:
                failures.append(f"{error.code().name}: {error.details()}")
            took = time.perf_counter() - started
            if began_swapping or swapping:
                during.append(took)
            elif pausing:
                calm.append(took)
            await asyncio.sleep(max(0.0, clients / rate - took))

    async with connected(address) as (stub, admin):
        tasks = [asyncio.ensure_future(client(stub, seed)) for seed in range(clients)]
        await asyncio.sleep(3.0)
        order = ["a2", "b1", "a1", "a2", "b1", "a1"]
        encoder_changes, current = 0, "a1"
        burst = time.perf_counter()
        for number in range(swaps):
            wanted = order[number % len(order)]
            swapping = True
            await admin.Activate(pb.ActivateRequest(release_id=wanted), timeout=120)
            swapping = False
            encoder_changes += wanted[0] != current[0]
            current = wanted
            await asyncio.sleep(0.05)
            if (number + 1) % SWAPS_A_BURST == 0 or number + 1 == swaps:
                await asyncio.sleep(0.25)  # the release that leaves is closed
                pausing = True
                await asyncio.sleep(time.perf_counter() - burst)
                pausing, burst = False, time.perf_counter()
        stop = True
        await asyncio.gather(*tasks)
    return {
        "swaps": swaps,
        "to_another_encoder": encoder_changes,
        "answers": answers,
        "failed": len(failures),
        "failures": sorted(set(failures))[:5],
        "mixed": mixed,
        "calm": {"answers": len(calm), **percentiles(calm)},
        "during": {"answers": len(during), **percentiles(during)},
        "p99_ratio": round(
            percentiles(during)["p99_ms"] / max(1e-9, percentiles(calm)["p99_ms"]), 2
        ),
    }
