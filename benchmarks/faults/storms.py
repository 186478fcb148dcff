"""Faults around a server: a full disk, a clock that jumps, a broken Redis, a damaged index.

The Redis is slow, dead or lying.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from benchmarks.faults.servers import ServerProcess, connected, percentiles
from benchmarks.small_releases import entity_texts, small_release
from encoders.errors import OmniError
from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc


async def hostile_redis(kind: str, store: Path) -> dict[str, Any]:
    """Serve with a Redis that never answers (slow), is absent (dead) or answers rubbish (lying)."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            if kind == "lying":
                writer.write(
                    random.choice(
                        [
                            b"$4\r\nlies\r\n",
                            b"$528\r\n" + os.urandom(528) + b"\r\n",
                            b"?!\r\n",
                            b":7\r\n",
                        ]
                    )
                )
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
                await stub.Retrieve(
                    pb.RetrieveRequest(query=f"redis {kind} {i}", entity_type="pin", k=5),
                    timeout=10,
                )
            except grpc.RpcError:
                failed += 1
            latencies.append(time.perf_counter() - started)
    await asyncio.to_thread(server.stop)
    if listener is not None:
        listener.close()
    return {"redis": kind, "requests": 200, "failed": failed, **percentiles(latencies)}


@contextlib.asynccontextmanager
async def steady_reader(address: str, per_second: float = 50.0) -> AsyncIterator[dict[str, Any]]:
    """Send calls while the block runs; yields answers, failures by status, longest wait."""
    seen: dict[str, Any] = {"answers": 0, "failed": {}, "longest_ms": 0.0}
    stop = False
    texts = entity_texts(200, seed=31)

    async def read(stub: rpc.RetrievalStub) -> None:
        number = 0
        while not stop:
            number += 1
            started = time.perf_counter()
            try:
                answer = await stub.Retrieve(
                    pb.RetrieveRequest(query=texts[number % 200], entity_type="pin", k=10),
                    timeout=20,
                )
                seen["answers"] += bool(answer.hits)
            except grpc.RpcError as error:
                seen["failed"][error.code().name] = seen["failed"].get(error.code().name, 0) + 1
            seen["longest_ms"] = max(
                seen["longest_ms"], round((time.perf_counter() - started) * 1e3, 1)
            )
            await asyncio.sleep(1 / per_second)

    async with connected(address) as (stub, _):
        task = asyncio.ensure_future(read(stub))
        try:
            yield seen
        finally:
            stop = True
            await task


async def upsert(admin: rpc.AdminStub, space_id: str, vector: np.ndarray, ids: list[str]) -> str:
    """Write entities; returns the status."""
    entities = [pb.Entity(id=id, embedding=vector.astype("<f4").tobytes()) for id in ids]
    try:
        await admin.Upsert(
            pb.UpsertRequest(entity_type="pin", space_id=space_id, entities=entities), timeout=20
        )
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


async def full_disk(encoder: Any, bundle: Path, space_id: str, mib: int = 24) -> dict[str, Any]:
    """Fill the disk of the store while the server answers: writes are refused, reads go on.

    Publishing is refused as well; nothing is lost.

    The disk is a small tmpfs, which takes the right to mount; without it the part is skipped and
    says so.
    """
    folder = Path(tempfile.mkdtemp(prefix="omni-small-disk-"))
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    ).returncode:
        folder.rmdir()
        return {"skipped": "mounting a small disk needs root"}
    vector = encoder.encode(["red cat"])[0]
    codes: dict[str, list[str]] = {"full": [], "room again": []}
    try:
        store = ReleaseStore(folder / "store")
        small_release(store, bundle, encoder, release_id="d1", counts={"pin": 500}, id_prefix="d1:")
        server = await asyncio.to_thread(ServerProcess, store.root, "--shadow-fraction", "0")
        acknowledged: list[str] = []
        async with (
            connected(server.address) as (stub, admin),
            steady_reader(server.address) as seen,
        ):
            await asyncio.sleep(0.5)
            ballast = folder / "ballast"
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            refused = ""
            try:
                await asyncio.to_thread(
                    small_release,
                    store,
                    bundle,
                    encoder,
                    release_id="d2",
                    counts={"pin": 500},
                    id_prefix="d2:",
                )
            except OmniError as error:
                refused = type(error).__name__
            for i in range(20):
                ids = [f"live-{i}-{j}" for j in range(64)]
                codes["full"].append(await upsert(admin, space_id, vector, ids))
                acknowledged += ids if codes["full"][-1] == "OK" else []
            await asyncio.sleep(1.0)
            during = dict(seen)
            ballast.unlink()
            await asyncio.to_thread(
                small_release,
                store,
                bundle,
                encoder,
                release_id="d3",
                counts={"pin": 500},
                id_prefix="d3:",
            )
            for i in range(5):
                ids = [f"late-{i}-{j}" for j in range(4)]
                codes["room again"].append(await upsert(admin, space_id, vector, ids))
                acknowledged += ids if codes["room again"][-1] == "OK" else []
            for _ in range(100):
                answer = await stub.Retrieve(
                    pb.RetrieveRequest(query="red cat", entity_type="pin", k=5), timeout=20
                )
                if answer.release_id == "d3":
                    break
                await asyncio.sleep(0.1)
            await asyncio.sleep(1.0)
            lost = 0
            for start in range(0, len(acknowledged), 5000):
                chunk = acknowledged[start : start + 5000]
                lost += (
                    await stub.Score(
                        pb.ScoreRequest(query="red cat", entity_type="pin", ids=chunk), timeout=60
                    )
                ).missing
            served = answer.release_id
        await asyncio.to_thread(server.stop)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    counts = {
        phase: {code: found.count(code) for code in sorted(set(found))}
        for phase, found in codes.items()
    }
    return {
        "publish_on_full_disk": refused,
        "writes": counts,
        "acknowledged_writes": len(acknowledged),
        "lost": lost,
        "answers_while_full": during["answers"],
        "failed_reads": seen["failed"],
        "longest_read_ms": seen["longest_ms"],
        "release_after_room": served,
    }


CLOCK_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long long *offset;
static void find(void) {
    if (offset) return;
    const char *path = getenv("OMNI_CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    static long long none = 0;
    offset = page == MAP_FAILED ? &none : (long long *)page;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    find();
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += *offset;
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
"""
"""Preloaded into the server: adds the seconds that stand in a file to the wall clock, and leaves
the monotonic clock alone, as a real jump does."""

DAY = 86_400


async def clock_jump(store: Path, encoder: Any, space_id: str) -> dict[str, Any]:
    """Move the server's wall clock a year forward, ten years back and to 1970 while it serves.

    It takes writes and swaps releases meanwhile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shim.c").write_text(CLOCK_SHIM, encoding="utf-8")
        compiler = shutil.which("cc")
        if compiler is None:
            return {"skipped": "moving one process's clock needs a C compiler"}
        subprocess.run(
            [
                compiler,
                "-shared",
                "-fPIC",
                "-O1",
                "-o",
                folder / "shim.so",
                folder / "shim.c",
                "-ldl",
            ],
            check=True,
        )
        offset = folder / "offset"
        offset.write_bytes(struct.pack("<q", 0))
        environment = {"LD_PRELOAD": str(folder / "shim.so"), "OMNI_CLOCK_OFFSET": str(offset)}
        server = await asyncio.to_thread(
            lambda: ServerProcess(store, "--shadow-fraction", "0", environment=environment)
        )
        vector = encoder.encode(["blue fish"])[0]
        jumps: dict[str, Any] = {}
        async with (
            connected(server.address) as (stub, admin),
            steady_reader(server.address) as seen,
        ):
            for title, seconds in (
                ("a year on", 365 * DAY),
                ("ten years back", -3650 * DAY),
                ("1970", -int(time.time()) + DAY),
                ("back again", 0),
            ):
                with open(offset, "r+b") as file:
                    file.write(struct.pack("<q", seconds))
                await asyncio.sleep(1.0)
                before = await stub.Retrieve(
                    pb.RetrieveRequest(query="red cat", entity_type="pin", k=5), timeout=20
                )
                written = await upsert(admin, space_id, vector, [f"jump-{len(jumps)}"])
                wanted = "a2" if before.release_id == "a1" else "a1"
                await admin.Activate(pb.ActivateRequest(release_id=wanted), timeout=60)
                after = await stub.Retrieve(
                    pb.RetrieveRequest(query="red cat", entity_type="pin", k=5), timeout=20
                )
                jumps[title] = {
                    "write": written,
                    "swapped": after.release_id == wanted,
                    "cached_before_and_after": before.cache_hit and after.cache_hit,
                }
            await asyncio.sleep(1.0)
            missing = (
                await stub.Score(
                    pb.ScoreRequest(
                        query="blue fish", entity_type="pin", ids=[f"jump-{i}" for i in range(4)]
                    )
                )
            ).missing
        await asyncio.to_thread(server.stop)
    return {
        "jumps": jumps,
        "answers": seen["answers"],
        "failed_reads": seen["failed"],
        "longest_read_ms": seen["longest_ms"],
        "lost": missing,
    }


def damaged_copy(store: ReleaseStore, source: str, name: str, share: float = 0.3) -> str:
    """Publish a release whose graph of pins is broken where the golden queries do not look.

    Every checksum is right.

    A share of the rows, none of them in a golden answer, stands in the graph at a random place:
    what a builder's bug leaves behind.
    """
    from dataclasses import replace

    from index_builder.ann.choice import build_index
    from index_builder.releases.manifest import FileRecord, Manifest

    folder = store.path_of(name)
    with store.open(source) as release:
        index = release.entities["pin"]
        rng = np.random.default_rng(0)
        golden = release.golden("pin")
        shown = {
            row
            for vector in np.asarray(golden.vectors)
            for row in map(index.row_of, index.search(vector, 50, exact=True).ids)
        }
        vectors = np.array(index.corpus.vectors)
        hidden = np.array(
            [row for row in rng.permutation(len(vectors)) if row not in shown][
                : int(share * len(vectors))
            ]
        )
        noise = rng.normal(size=(len(hidden), vectors.shape[1])).astype(np.float32)
        vectors[hidden] = noise / np.linalg.norm(noise, axis=1, keepdims=True)
        broken = build_index(index.kind, vectors, index.ann.config)
        kind = index.kind
    shutil.copytree(store.path_of(source), folder)
    broken.save(folder / "pin" / "index")
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), source)
    files = dict(manifest.files)
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if relative in files:
            content = path.read_bytes()
            files[relative] = FileRecord(
                size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
            )
    (folder / "manifest.json").write_bytes(
        replace(manifest, release_id=name, files=files).to_bytes()
    )
    return kind


def gauge(text: str, name: str) -> float | None:
    """The first sample of a gauge for pins without a filter."""
    for line in text.splitlines():
        if (
            line.startswith(name + "{")
            and 'entity_type="pin"' in line
            and 'selectivity="none"' in line
        ):
            return float(line.rsplit(" ", 1)[1])
    return None


async def damaged_index(
    store: ReleaseStore,
    encoder: Any,
    good: str,
    rate: float,
    healthy_seconds: float,
    flags: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Compare shadow recall with the offline figure, then damage an index and time the alarm.

    The traffic is normal and the sampling is the default.

    Args:
        store: Holds the release ``good``.
        encoder: The release's query tower, for the offline figure.
        good: A healthy release.
        rate: Requests/s.
        healthy_seconds: How long the healthy index is watched.
        flags: Further flags of ``omni serve``; none: the default sampling.
    """
    kind = damaged_copy(store, good, "damaged")
    store.activate(good)
    texts = entity_texts(1500, seed=77)
    vectors = encoder.encode(texts)
    with store.open(good) as release:
        index = release.entities["pin"]
        each = []
        for vector in vectors:
            found, exact = index.search(vector, 10), index.search(vector, 10, exact=True)
            each.append(np.mean([score >= exact.scores[-1] - 1e-5 for score in found.scores]))
        offline = float(np.mean(each))
    server = await asyncio.to_thread(ServerProcess, store.root, *flags)
    stop = False
    failed = 0

    async def traffic(stub: rpc.RetrievalStub) -> None:
        nonlocal failed
        rng = random.Random(1)
        while not stop:
            try:
                await stub.Retrieve(
                    pb.RetrieveRequest(
                        query=rng.choice(texts), entity_type="pin", k=10, language="en"
                    ),
                    timeout=20,
                )
            except grpc.RpcError:
                failed += 1
            await asyncio.sleep(1 / rate)

    result: dict[str, Any] = {
        "index": kind,
        "requests_per_s": rate,
        "offline_recall": round(offline, 4),
    }
    async with connected(server.address) as (stub, admin):
        task = asyncio.ensure_future(traffic(stub))
        await asyncio.sleep(healthy_seconds)
        text = await asyncio.to_thread(server.metrics)
        low, high = gauge(text, "omni_shadow_recall_low"), gauge(text, "omni_shadow_recall_high")
        result["shadow_recall"] = {
            "recall": gauge(text, "omni_shadow_recall"),
            "low": low,
            "high": high,
        }
        result["offline_within_interval"] = (
            low is not None and high is not None and low <= offline <= high
        )
        threshold = offline - 0.02
        began = time.monotonic()
        await admin.Activate(pb.ActivateRequest(release_id="damaged"), timeout=60)
        result["proved_itself"] = (
            True  # its checksums and golden queries are in order, else Activate would have failed
        )
        noticed = None
        while noticed is None and time.monotonic() - began < 180:
            await asyncio.sleep(1.0)
            text = await asyncio.to_thread(server.metrics)
            upper = gauge(text, "omni_shadow_recall_minute_high")
            if upper is not None and upper < threshold:
                noticed = time.monotonic() - began
        result["noticed_after_seconds"] = None if noticed is None else round(noticed, 1)
        result["recall_when_noticed"] = gauge(text, "omni_shadow_recall_minute")
        result["alert_below"] = round(threshold, 4)
        stop = True
        await task
    result["failed"] = failed
    await asyncio.to_thread(server.stop)
    return result
