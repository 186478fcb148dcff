"""Kill -9 at random moments: a server with writes and swaps, and a rebuild in the same store.

Server and publisher are forked from a process that has done its imports, so that a round takes a
second and not ten; from there on they are what ``omni serve`` and ``omni rebuild`` run.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.faults.servers import connected, hash_of
from benchmarks.small_releases import WORDS, entity_texts
from encoders.commands.console import say
from index_builder.building.build import RebuildConfig, build_release
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.releases.manifest import MANIFEST_NAME
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc

IMPORTED = (
    *(
        "retrieval.cli",
        "retrieval.commands.serve",
        "retrieval.server.server",
        "encoders.towers.query_tower",
        "index_builder.building.build",
    ),
    *("uvloop", "pandas", "pyarrow.compute", "pyarrow.parquet", __name__),
)
ROUNDS_PER_STORE = 15
"""Rounds on one copy of the store: the log grows with every round, and with it what a rebuild folds
in and a check reads."""
SERVER_SECONDS = 1.0
START_SECONDS = 60.0
VISIBLE_SECONDS = 5.0
PUBLISHED_PINS = 600


class ForkedServer:
    """``omni serve`` in a process that is forked after the imports."""

    def __init__(self, context: Any, store: Path) -> None:
        flags = [
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--metrics-port",
            "-1",
            "--shadow-fraction",
            "0",
            "--json",
        ]
        receive, send = context.Pipe(duplex=False)
        self.process: ForkServerProcess = context.Process(
            target=_serve, args=(["serve", "--store", str(store), *flags], send), daemon=True
        )
        self.process.start()
        send.close()
        line = b""
        if receive.poll(START_SECONDS):
            while not line.endswith(b"\n") and (piece := os.read(receive.fileno(), 4096)):
                line += piece
        receive.close()
        self.info: dict[str, Any] = json.loads(line) if line else {}
        self.address = f"127.0.0.1:{self.info.get('port')}"


def kill(process: ForkServerProcess) -> None:
    """SIGKILL, then wait."""
    process.kill()
    process.join(30)


def _serve(arguments: list[str], out: Any) -> None:
    from retrieval.cli import main

    os.dup2(out.fileno(), 1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    main(arguments)


def _publish(root: Path, bundle: Path, vectors: Path, name: str, once: bool = False) -> None:
    """Rebuild with what the live log holds and activate; then publish and activate until killed."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    store, held = ReleaseStore(root), np.load(vectors)
    space_id = json.loads((bundle / "space.json").read_text(encoding="utf-8"))["space_id"]
    pins = EntityInput(
        ids=[f"{name}:pin-{i}" for i in range(len(held["pins"]))],
        vectors=held["pins"],
        space_id=space_id,
    )
    queries = {"*": QuerySet(WORDS[:24], held["golden"])}
    config = RebuildConfig(
        index=IndexConfig(kind="hnsw"),
        min_recall=0.5,
        golden_queries=16,
        release_id=name,
        activate=True,
    )
    build_release({"pin": pins}, bundle, store, config, queries)
    number = 0
    while not once:
        number += 1
        with store.lock("build", 5.0), store.open(name) as release:
            staging = store.staging(f"{name}-{number}")
            shutil.rmtree(staging)
            shutil.copytree(release.path, staging, ignore=shutil.ignore_patterns(MANIFEST_NAME))
            store.publish(
                staging, replace(release.manifest, release_id=f"{name}-{number}", parent=name)
            )
        store.activate(f"{name}-{number}")


def whole(answer: pb.RetrieveResponse) -> bool:
    """Whether every id belongs to the release that the answer names, or was written live."""
    mine = (answer.release_id.split("-")[0] + ":", "live-")
    return bool(answer.hits) and all(hit.id.startswith(mine) for hit in answer.hits)


class Writes:
    """Upserts and swaps against one server, and what it acknowledged."""

    def __init__(self, vectors: np.ndarray, space_id: str) -> None:
        self.vectors, self.space_id = vectors, space_id
        self.acknowledged: set[str] = set()
        self.number = self.swaps = 0
        self.stop = False

    async def upserts(self, admin: rpc.AdminStub) -> None:
        """Four entities a call, until stopped or cut off."""
        while not self.stop:
            ids = [f"live-{self.number + i}" for i in range(4)]
            self.number += 4
            entities = [
                pb.Entity(id=id, embedding=self.vectors[hash_of(id) % len(self.vectors)].tobytes())
                for id in ids
            ]
            try:
                await admin.Upsert(
                    pb.UpsertRequest(entity_type="pin", space_id=self.space_id, entities=entities),
                    timeout=10,
                )
                self.acknowledged.update(ids)
            except grpc.RpcError:
                return

    async def swap(self, admin: rpc.AdminStub) -> None:
        """From a1 to a2 and back; the publisher's releases come in between."""
        while not self.stop:
            self.swaps += 1
            try:
                await admin.Activate(
                    pb.ActivateRequest(release_id="a2" if self.swaps % 2 else "a1"), timeout=10
                )
            except grpc.RpcError:
                return


async def lost_or_mixed(address: str, acknowledged: set[str]) -> int:
    """Acknowledged ids that are not found, and answers that are not whole.

    A server that was not killed shows a write with its next look at the log, so what is missing is
    asked for again for a while.
    """
    missing = sorted(acknowledged)
    async with connected(address) as (stub, _):
        until = time.monotonic() + VISIBLE_SECONDS
        while missing:
            still: list[str] = []
            for start in range(0, len(missing), 5000):
                chunk = missing[start : start + 5000]
                scores = (
                    await stub.Score(
                        pb.ScoreRequest(query="red cat", entity_type="pin", ids=chunk), timeout=60
                    )
                ).scores
                still += [
                    id for id, score in zip(chunk, scores, strict=True) if score != score
                ]  # NaN: not there
            missing = still
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.05 if missing else 0)
        return len(missing) + (
            not whole(
                await stub.Retrieve(
                    pb.RetrieveRequest(query="red cat", entity_type="pin", k=20), timeout=60
                )
            )
        )


async def kill_nine(
    prepared: ReleaseStore, bundle: Path, encoder: Any, space_id: str, kills: int, seed: int = 0
) -> dict[str, Any]:
    """Kill -9 at random moments; acknowledged writes must survive, answers and release stay whole.

    In every round a server takes writes and swaps while another process rebuilds, publishes and
    activates in the same store. The publisher is killed in every round, the server in two of three,
    each at a moment of its own.

    Args:
        prepared: Holds the releases a1 and a2; copied, not touched.
        bundle: Of space a.
        encoder: Its query tower.
        space_id: Of space a.
        kills: How many; processes killed, not rounds.
        seed: Chooses the moments.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    warm = context.Process(target=time.monotonic)  # the first process waits for the imports
    warm.start()
    warm.join()
    vectors = encoder.encode(entity_texts(64, seed=21))
    held = bundle / "published.npz"
    np.savez(
        held,
        pins=encoder.encode(entity_texts(PUBLISHED_PINS, seed=22)),
        golden=encoder.encode(WORDS[:24]),
    )
    rng = random.Random(seed)
    killed: Counter[str] = Counter()
    acknowledged = wrong = ready = swaps = published = number = 0
    build_seconds = 1.0
    store, server, writes = prepared, None, Writes(vectors, space_id)
    while killed.total() < kills:
        if number % ROUNDS_PER_STORE == 0:
            if server is not None:
                kill(server.process)
                acknowledged, swaps = acknowledged + len(writes.acknowledged), swaps + writes.swaps
            store = ReleaseStore(prepared.root.parent / f"kills-{number}")
            shutil.copytree(prepared.root, store.root, dirs_exist_ok=True)
            began = time.monotonic()
            await asyncio.to_thread(_run_once, context, store.root, bundle, held)
            build_seconds = time.monotonic() - began
            server, writes = (
                await asyncio.to_thread(ForkedServer, context, store.root),
                Writes(vectors, space_id),
            )
        assert server is not None, "made in the first round"
        number += 1
        name = f"p{number}"
        publisher = context.Process(
            target=_publish, args=(store.root, bundle, held, name), daemon=True
        )
        moments = [(rng.uniform(0.0, 2.0 * build_seconds), "publisher", publisher)]
        if number % 3:
            moments.append((rng.uniform(0.02, SERVER_SECONDS), "server", server.process))
        before = set(store.ids())
        async with connected(server.address) as (_, admin):
            writes.stop = False
            tasks = [
                asyncio.ensure_future(writes.upserts(admin)),
                asyncio.ensure_future(writes.swap(admin)),
            ]
            publisher.start()
            began = time.monotonic()
            for after, what, process in sorted(moments, key=lambda moment: moment[0]):
                await asyncio.sleep(max(0.0, after - (time.monotonic() - began)))
                if what == "server":
                    killed["server, during upserts and swaps"] += 1
                else:
                    killed[
                        "publisher, during "
                        + ("publishing and activating" if name in store.ids() else "the rebuild")
                    ] += 1
                await asyncio.to_thread(kill, process)
            writes.stop = True
            await asyncio.gather(*tasks)
        if number % 3:
            server = await asyncio.to_thread(ForkedServer, context, store.root)
        ready += bool(server.info.get("release_id"))
        with await asyncio.to_thread(
            store.open_current
        ) as current:  # checks size and sha256 of every file
            wrong += not current.entities
        wrong += await lost_or_mixed(server.address, writes.acknowledged)
        published += len(set(store.ids()) - before)
        say(
            f"{killed.total()} of {kills} kills: {acknowledged + len(writes.acknowledged)} writes"
            f" acknowledged, {wrong} lost or mixed"
        )
    assert server is not None, "at least one round"
    kill(server.process)
    return {
        "seeds": [seed],
        "kills": killed.total(),
        "killed": dict(killed),
        "rounds": number,
        "acknowledged_writes": acknowledged + len(writes.acknowledged),
        "swaps_asked_for": swaps + writes.swaps,
        "releases_published": published,
        "lost_or_mixed": wrong,
        "ready_after_the_kill": ready,
    }


def _run_once(context: Any, root: Path, bundle: Path, held: Path) -> None:
    """A publish that nobody disturbs: how long it takes here."""
    process = context.Process(target=_publish, args=(root, bundle, held, "p0", True))
    process.start()
    process.join(120)
    assert process.exitcode == 0, "an undisturbed rebuild must succeed"
