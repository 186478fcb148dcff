"""``omni bench faults --part mixed``: callers at a page beside callers of batches, on one server.

The page asks at random moments (a Poisson process), a quarter of what the server could answer; half
of its questions are new to the server and have to be encoded, half are cached. Batches hold new
texts only, and each answer is followed by the next batch at once. Calm and mixed turns alternate,
so that both see the machine as it is. What counts is the page's slowest 1% beside the batches
against calm, and what the batches get done of what they do alone.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from benchmarks.faults.overload import Asker, Tally, phase, wait_for_answers
from benchmarks.faults.servers import ServerProcess, percentiles
from benchmarks.small_releases import entity_texts
from protos import retrieval_pb2 as pb

CONNECTIONS = 4
"""Of each kind of caller."""
BATCH_CALLERS = 3
BATCH_TEXTS = 64
PAGE_SHARE = 0.25
"""Questions of the page, as a share of the peak."""
CALLERS_AT_PEAK = 16
PEAK_SECONDS = 4.0
CACHED_TEXTS = 50
DEADLINE_SECONDS = 20.0
AnyAsker = TypeVar("AnyAsker", bound=Asker)


class CachedAsker(Asker):
    """One connection; its questions come again and again, so that the server has their vectors."""

    def query(self, number: int) -> str:
        """One of a few texts."""
        return self._texts[number % CACHED_TEXTS]


class BatchAsker(Asker):
    """One connection whose every call is a batch of texts that are new to the server."""

    method = "/omnisearchsage.v1.Retrieval/RetrieveBatch"

    def request(self, number: int) -> pb.RetrieveBatchRequest:
        """A batch."""
        first = number * BATCH_TEXTS
        queries = [self.query(first + text) for text in range(BATCH_TEXTS)]
        return pb.RetrieveBatchRequest(queries=queries, target=pb.Target(entity_type="pin", k=10))


@dataclass(frozen=True, slots=True)
class Callers:
    """Connections of all callers."""

    new: list[Asker]
    cached: list[CachedAsker]
    batches: list[BatchAsker]


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of the calls of one turn, by caller."""

    new: Tally
    cached: Tally
    batches: Tally


async def _turn(
    callers: Callers, seconds: float, rng: np.random.Generator, *, rate: float, batches: bool
) -> Turn:
    """Ask ``rate`` questions a second at random moments, beside batches or not."""
    turn = Turn(*(Tally(DEADLINE_SECONDS, began=time.perf_counter()) for _ in range(3)))
    groups = ((callers.new, turn.new), (callers.cached, turn.cached))
    for askers, tally in (*groups, (callers.batches, turn.batches)):
        for asker in askers:
            asker.tally, asker.until = tally, 0.0
    now = time.perf_counter()
    end = now + seconds
    if batches:
        for number in range(BATCH_CALLERS):
            asker = callers.batches[number % len(callers.batches)]
            asker.until = end
            asker.ask(now)
            asker.flush()
    due = now if rate else end
    while due < end:
        due += rng.exponential(1 / rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        askers, tally = groups[int(rng.integers(2))]
        asker = askers[tally.asked % len(askers)]
        asker.ask(time.perf_counter())
        asker.flush()
    await asyncio.sleep(max(0.0, end - time.perf_counter()))
    await wait_for_answers([*callers.new, *callers.cached, *callers.batches], DEADLINE_SECONDS)
    return turn


async def _connect(kind: type[AnyAsker], address: str, first: int) -> list[AnyAsker]:
    host, _, port = address.rpartition(":")
    texts = entity_texts(2000, seed=11)
    askers = []
    for number in range(CONNECTIONS):
        make = partial(kind, address, DEADLINE_SECONDS, texts, first + number * 1_000_000)
        _, asker = await asyncio.get_running_loop().create_connection(make, host, int(port))
        await asyncio.wait_for(asker.greeted, 30)
        askers.append(asker)
    return askers


async def _measure(address: str, seconds: float, turns: int) -> dict[str, Any]:
    callers = Callers(
        new=await _connect(Asker, address, 10_000_000),
        cached=await _connect(CachedAsker, address, 0),
        batches=await _connect(BatchAsker, address, 20_000_000),
    )
    rng = np.random.default_rng(0)
    await phase(callers.cached, DEADLINE_SECONDS, 1.0, callers=CALLERS_AT_PEAK)
    await phase(callers.new, DEADLINE_SECONDS, 1.0, callers=CALLERS_AT_PEAK)
    peak = await phase(callers.new, DEADLINE_SECONDS, PEAK_SECONDS, callers=CALLERS_AT_PEAK)
    peak_per_s = float(peak.summary()["good_per_s"])
    rate = PAGE_SHARE * peak_per_s
    await _turn(callers, min(2.0, seconds), rng, rate=rate, batches=True)
    calm, mixed, alone = [], [], []
    for _ in range(turns):
        calm.append(await _turn(callers, seconds, rng, rate=rate, batches=False))
        mixed.append(await _turn(callers, seconds, rng, rate=rate, batches=True))
        alone.append(await _turn(callers, seconds, rng, rate=0.0, batches=True))
    return summary(calm, mixed, alone) | {"peak_per_s": peak_per_s, "page_per_s": round(rate, 1)}


def summary(calm: Sequence[Turn], mixed: Sequence[Turn], alone: Sequence[Turn]) -> dict[str, Any]:
    """Compare the turns: the page's percentiles by kind of question, and the texts of batches."""
    page_calm, page_mixed = page_summary(calm), page_summary(mixed)
    texts_mixed, texts_alone = texts_per_second(mixed), texts_per_second(alone)
    return {
        "page_calm": page_calm,
        "page_mixed": page_mixed,
        "p99_ratio": p99_ratios(page_calm, page_mixed),
        "p99_ratio_by_turn": [
            p99_ratios(page_summary([before]), page_summary([beside]))["all"]
            for before, beside in zip(calm, mixed, strict=True)
        ],
        "failed": sum(
            count
            for turn in (*calm, *mixed, *alone)
            for tally in (turn.new, turn.cached, turn.batches)
            for outcome, count in tally.outcomes.items()
            if outcome != "OK"
        ),
        "batch_texts_per_s": {"alone": texts_alone, "mixed": texts_mixed},
        "batch_share_of_alone": round(texts_mixed / max(1e-9, texts_alone), 3),
    }


def page_summary(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """Percentiles of the page's answers, all turns together."""
    new = [took for turn in turns for took in turn.new.latencies]
    cached = [took for turn in turns for took in turn.cached.latencies]
    kinds = {"all": new + cached, "new": new, "cached": cached}
    return {kind: {"answers": len(took), **percentiles(took)} for kind, took in kinds.items()}


def p99_ratios(
    calm: dict[str, dict[str, float]], mixed: dict[str, dict[str, float]]
) -> dict[str, float]:
    """How many times as long the slowest 1% take beside batches, by kind of question."""
    return {
        kind: round(mixed[kind]["p99_ms"] / max(1e-9, calm[kind]["p99_ms"]), 2) for kind in calm
    }


def texts_per_second(turns: Sequence[Turn]) -> float:
    """Texts of answered batches over the time from the first batch to the last answer."""
    tallies = [turn.batches for turn in turns]
    answered = sum(len(tally.latencies) for tally in tallies) * BATCH_TEXTS
    return round(answered / max(1e-9, sum(tally.last - tally.began for tally in tallies)), 1)


def _client(address: str, seconds: float, turns: int, cores: set[int], result: Any) -> None:
    os.sched_setaffinity(0, cores)
    result.send(asyncio.run(_measure(address, seconds, turns)))


def mixed(
    server: ServerProcess, seconds: float, client_cores: set[int], *, turns: int = 6
) -> dict[str, Any]:
    """Measure the page calm, the page beside batches, and batches alone, in turns.

    Args:
        server: Its encoder is the limit.
        seconds: Length of one turn.
        client_cores: Where the client runs.
        turns: Of each kind.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_client, args=(server.address, seconds, turns, client_cores, send), daemon=True
    )
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    finally:
        process.join(10)
    return {**found, "cores": {"server": sorted(server.cores), "client": sorted(client_cores)}}
