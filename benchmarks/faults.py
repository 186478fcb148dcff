"""The service under attack: release swaps under load, overload, kill -9, a full disk and a Redis that is slow, dead or lying."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import grpc.aio
import numpy as np
import psutil

from benchmarks.record import RESULTS, write_record
from benchmarks.small_releases import entity_texts, small_release, write_small_bundle
from encoders.console import handle_errors, json_option, print_json, print_table, say, stage
from index_builder.publishing import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc

COUNTS = {"pin": 2000, "product": 500}


def prepare_store(root: Path) -> tuple[ReleaseStore, Any]:
    """Two releases of one space (a1, a2) and one of another (b1); every id starts with its release's name. Returns the store, encoder a."""
    store = ReleaseStore(root / "store")
    first = None
    for space, seed in (("a", 1), ("b", 2)):
        encoder = write_small_bundle(root / space, seed)
        first = first or encoder
        for number in (1, 2) if space == "a" else (1,):
            name = f"{space}{number}"
            small_release(store, root / space, encoder, release_id=name, counts=COUNTS, id_prefix=f"{name}:", activate=name == "a1")
    return store, first


class ServerProcess:
    """``omni serve`` as a child process."""

    def __init__(self, store: Path, *flags: str) -> None:
        arguments = ["serve", "--store", str(store), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "-1", "--json", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retrieval.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None, "stdout is a pipe"
        line = self.process.stdout.readline()
        self.info: dict[str, Any] = json.loads(line) if line else {}
        self.address = f"127.0.0.1:{self.info.get('port')}"

    def rss_mib(self) -> float:
        """Resident memory, MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 2**20

    def stop(self) -> None:
        """SIGTERM, then wait."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End it with kill -9."""
        self.process.kill()
        self.process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    values = np.asarray(seconds or [0.0]) * 1e3
    return {"p50_ms": round(float(np.percentile(values, 50)), 3), "p99_ms": round(float(np.percentile(values, 99)), 3)}


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[rpc.RetrievalStub, rpc.AdminStub]]:
    """Stubs on one channel."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield rpc.RetrievalStub(channel), rpc.AdminStub(channel)


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


async def hostile_redis(kind: str, store: Path) -> dict[str, Any]:
    """Serve with a Redis that accepts and never answers (slow), is not there (dead), or answers rubbish (lying)."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            if kind == "lying":
                writer.write(random.choice([b"$4\r\nlies\r\n", b"$528\r\n" + os.urandom(528) + b"\r\n", b"?!\r\n", b":7\r\n"]))
                await writer.drain()
        writer.close()

    listener = None
    if kind == "dead":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    else:
        listener = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
    server = await asyncio.to_thread(ServerProcess, store, "--redis", f"redis://127.0.0.1:{port}/0")
    latencies, failed = [], 0
    async with connected(server.address) as (stub, _):
        for i in range(200):
            started = time.perf_counter()
            try:
                await stub.Retrieve(pb.RetrieveRequest(query=f"redis {kind} {i}", entity_type="pin", k=5), timeout=10)
            except grpc.RpcError:
                failed += 1
            latencies.append(time.perf_counter() - started)
    await asyncio.to_thread(server.stop)
    if listener is not None:
        listener.close()
    return {"redis": kind, "requests": 200, "failed": failed, **percentiles(latencies)}


async def kill_nine(store: ReleaseStore, encoder: Any, space_id: str, rounds: int) -> dict[str, Any]:
    """Kill -9 the server at random moments of upserts and swaps; what was acknowledged must be there afterwards, and every answer whole."""
    acknowledged: set[str] = set()
    vectors = encoder.encode(entity_texts(64, seed=21))
    number = restarts = broken = 0
    rng = random.Random(0)
    server = await asyncio.to_thread(ServerProcess, store.root, "--shadow-fraction", "0")
    for round_ in range(rounds):
        until = time.monotonic() + rng.uniform(0.02, 0.6)
        async with connected(server.address) as (stub, admin):

            async def writes(admin: rpc.AdminStub = admin, until: float = until) -> None:
                nonlocal number
                while time.monotonic() < until:
                    ids = [f"live-{number + i}" for i in range(4)]
                    number += 4
                    entities = [pb.Entity(id=id, embedding=vectors[hash_of(id) % 64].tobytes()) for id in ids]
                    try:
                        await admin.Upsert(pb.UpsertRequest(entity_type="pin", space_id=space_id, entities=entities), timeout=5)
                        acknowledged.update(ids)
                    except grpc.RpcError:
                        return

            async def swaps(admin: rpc.AdminStub = admin, until: float = until) -> None:
                step = 0
                while time.monotonic() < until:
                    step += 1
                    try:
                        await admin.Activate(pb.ActivateRequest(release_id="a2" if step % 2 else "a1"), timeout=5)
                    except grpc.RpcError:
                        return

            tasks = [asyncio.ensure_future(writes()), asyncio.ensure_future(swaps())]
            await asyncio.sleep(max(0.0, until - time.monotonic()))
            server.kill()
            await asyncio.gather(*tasks)
        server = await asyncio.to_thread(ServerProcess, store.root, "--shadow-fraction", "0")
        restarts += server.info.get("release_id") in ("a1", "a2")
        async with connected(server.address) as (stub, _):
            wanted = sorted(acknowledged)
            for start in range(0, len(wanted), 5000):
                chunk = wanted[start : start + 5000]
                broken += (await stub.Score(pb.ScoreRequest(query="red cat", entity_type="pin", ids=chunk), timeout=60)).missing
            answer = await stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=20), timeout=60)
            broken += any(not hit.id.startswith((answer.release_id + ":", "live-")) for hit in answer.hits)
        say(f"kill {round_ + 1}/{rounds}: {len(acknowledged)} acknowledged, {broken} lost")
    await asyncio.to_thread(server.stop)
    return {"kills": rounds, "acknowledged_writes": len(acknowledged), "lost_or_mixed": broken, "restarted_ready": restarts}


def hash_of(text: str) -> int:
    """A small stable hash."""
    return sum(text.encode())


Step = Callable[[], Any]


@click.command("faults")
@click.option("--swaps", default=100, show_default=True, help="Release swaps under load, two thirds of them to another encoder; 0 skips.")
@click.option("--rate", default=150.0, show_default=True, help="Requests/s during the swaps.")
@click.option("--overload-seconds", default=60.0, show_default=True, help="Length of the 4x overload; 0 skips.")
@click.option("--kills", default=20, show_default=True, help="kill -9 rounds; 0 skips.")
@click.option("--redis/--no-redis", default=True, show_default=True, help="Slow, dead and lying Redis.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Folder of the JSON record.")
@json_option
@handle_errors
def command(swaps: int, rate: float, overload_seconds: float, kills: int, redis: bool, out: Path, as_json: bool) -> None:
    """Hurt a real server and count what callers notice.

    Small releases with a tiny random tower (made here, labelled so): the subject is the service, not the quality of answers.

    \b
    Example:
        omni bench faults --swaps 20 --overload-seconds 10 --kills 5
    """  # noqa: D301
    metrics: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with stage("releases"):
            store, encoder = prepare_store(Path(folder))
        space_id = json.loads((Path(folder) / "a" / "space.json").read_text(encoding="utf-8"))["space_id"]
        if swaps:
            with stage(f"{swaps} swaps"):
                server = ServerProcess(store.root, "--keep-releases", "2")
                metrics["swaps"] = asyncio.run(swaps_under_load(server.address, swaps, 8, rate))
                server.stop()
                store.activate("a1")
        if overload_seconds:
            with stage("overload"):
                heavy = ReleaseStore(Path(folder) / "heavy")
                tower = write_small_bundle(
                    Path(folder) / "h", 3, layers=6, width=256
                )  # as deep as the paper's, so that encoding is the limit
                small_release(heavy, Path(folder) / "h", tower, release_id="h1", counts=COUNTS)
                server = ServerProcess(heavy.root, "--shadow-fraction", "0", "--max-encode-queue", "64", "--max-in-flight", "96")
                metrics["overload"] = asyncio.run(overload(server, overload_seconds, 2.0))
                server.stop()
        if redis:
            with stage("redis"):
                metrics["redis"] = [asyncio.run(hostile_redis(kind, store.root)) for kind in ("slow", "dead", "lying")]
        if kills:
            with stage(f"{kills} kills"):
                metrics["kills"] = asyncio.run(kill_nine(store, encoder, space_id, kills))
    record = write_record(
        "faults",
        dataset={"name": "small releases over made-up texts", "real": False, "counts": COUNTS},
        config={"swaps": swaps, "rate": rate, "overload_seconds": overload_seconds, "kills": kills},
        protocol={"client": "grpc.aio on the same machine, sharing its cores with the server", "clock": "perf_counter"},
        metrics=metrics,
        libraries=("grpcio",),
        folder=out,
    )
    if as_json:
        print_json({"record": str(record), **metrics})
        return
    rows: list[list[object]] = []
    for name, values in metrics.items():
        for item in values if isinstance(values, list) else [values]:
            for key, value in item.items():
                rows.append([name, key, json.dumps(value) if isinstance(value, dict | list) else str(value)])
    print_table("SIMULATED load on small made-up releases", ["fault", "figure", "value"], rows)
