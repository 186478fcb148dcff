"""What a page asks: hits with five attributes, over gRPC, as JSON on both ports, and by FastAPI."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.comparison import Plan, compare
from benchmarks.serving.frames_load import JsonClient, frame_load
from benchmarks.serving.http_load import http_load
from benchmarks.serving.load import Load, Outcome
from benchmarks.serving.peer_servers import Process, fastapi_server, free_port, omni_server
from benchmarks.small_releases import entity_texts, small_release, write_small_bundle
from encoders.commands.console import print_table, say, stage
from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb

RETRIEVE = "/omnisearchsage.v1.Retrieval/Retrieve"
ATTRIBUTES = ("title", "price", "stock", "sale", "tags")
ANSWER_CACHES = {"searched": 0, "cached": 64}
"""How answers come -> MiB of the answer cache."""
COLUMNS = ("requests_per_second", "per_server_cpu_second", "p50_ms", "p99_ms", "errors")
SHARES = {
    "attributes": ("gRPC, attributes", "gRPC"),
    "JSON": ("JSON, gRPC port", "gRPC, attributes"),
    "gRPC beside FastAPI": ("gRPC, attributes", "FastAPI"),
    "JSON beside FastAPI": ("JSON, web port", "FastAPI"),
}
"""Name of a ratio -> the side, and the side that it is a share of."""


class PageSize(NamedTuple):
    """How much is asked of what."""

    pins: int = 5000
    questions: int = 500
    warm_seconds: float = 3.0
    """For each side, before anything is counted: texts are encoded and answers cached."""

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the data."""
        return {
            "name": "small release of a random tower",
            "real": False,
            "pins": self.pins,
            "questions": self.questions,
            "attributes": list(ATTRIBUTES),
        }


class PageRelease(NamedTuple):
    """What all servers answer from."""

    store: Path
    texts: list[str]
    vectors: Path
    """``npz`` of the texts and their vectors, for the server that has no encoder."""


def page_release(folder: Path, size: PageSize) -> PageRelease:
    """Build a release of texts with five attributes, and the questions."""
    encoder = write_small_bundle(folder / "bundle", seed=1)
    store = ReleaseStore(folder / "store")
    small_release(store, folder / "bundle", encoder, counts={"pin": size.pins})
    texts = entity_texts(size.questions, seed=5)
    vectors = folder / "vectors.npz"
    np.savez(vectors, texts=np.array(texts), vectors=encoder.encode(texts))
    return PageRelease(store.root, texts, vectors)


def grpc_questions(texts: list[str], k: int, attributes: tuple[str, ...]) -> list[bytes]:
    """Make one serialised request per text."""
    return [
        pb.RetrieveRequest(
            query=text, entity_type="pin", k=k, attributes=attributes
        ).SerializeToString()
        for text in texts
    ]


def json_questions(texts: list[str], k: int) -> list[bytes]:
    """Make one JSON request per text, with attributes; FastAPI takes the same."""
    common = {"entityType": "pin", "k": k, "attributes": ATTRIBUTES}
    return [json.dumps({"query": text, **common}).encode() for text in texts]


def page_lines(k: int, plan: Plan, size: PageSize) -> dict[str, Any]:
    """Measure every side, with each query searched and with answers cached.

    Args:
        k: Hits per answer.
        plan: The largest of its concurrencies counts.
        size: Of the data.
    """
    concurrency = max(plan.concurrencies)
    found: dict[str, Any] = {"concurrency": concurrency}
    with tempfile.TemporaryDirectory() as folder:
        with stage("build a small release"):
            release = page_release(Path(folder), size)
        for name, cache_mib in ANSWER_CACHES.items():
            with ExitStack() as stack, stage(f"every answer is {name}"):
                web_port = free_port()
                flags = ["--answer-cache-mib", str(cache_mib), "--metrics-port", str(web_port)]
                ours = stack.enter_context(omni_server(release.store, flags))
                peer = stack.enter_context(
                    fastapi_server(release.store, release.vectors, are_cached=cache_mib > 0)
                )
                sides = _sides(ours, f"127.0.0.1:{web_port}", peer, release.texts, k)
                for run in sides.values():
                    run(Load(concurrency=concurrency, seconds=size.warm_seconds))
                servers = dict.fromkeys(sides, ours) | {"FastAPI": peer}
                figures = compare(sides, servers, Plan((concurrency,), plan.rounds, plan.seconds))
            found[name] = {side: rows[concurrency] for side, rows in figures.items()}
            found[name]["shares"] = shares_of(found[name])
    return found


def shares_of(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return ratios of requests per server CPU second, medians over rounds."""
    rates = {side: row["per_server_cpu_second_by_round"] for side, row in figures.items()}
    return {
        share: round(median(a / b for a, b in zip(rates[side], rates[other], strict=True)), 3)
        for share, (side, other) in SHARES.items()
    }


def _sides(
    ours: Process, web: str, peer: Process, texts: list[str], k: int
) -> dict[str, Callable[[Load], Outcome]]:
    """Return how each side is loaded."""
    plain, full = (grpc_questions(texts, k, names) for names in ((), ATTRIBUTES))
    as_json = json_questions(texts, k)
    return {
        "gRPC": partial(frame_load, ours.address, RETRIEVE, plain),
        "gRPC, attributes": partial(frame_load, ours.address, RETRIEVE, full),
        "JSON, gRPC port": partial(frame_load, ours.address, RETRIEVE, as_json, client=JsonClient),
        "JSON, web port": partial(http_load, web, RETRIEVE, as_json),
        "FastAPI": partial(http_load, peer.address, "/retrieve", as_json),
    }


def print_page(metrics: dict[str, Any]) -> None:
    """Print the lines."""
    for name in ANSWER_CACHES:
        rows = [
            [side, *(row[column] for column in COLUMNS)]
            for side, row in metrics[name].items()
            if side != "shares"
        ]
        print_table(
            f"Every answer {name}, {metrics['concurrency']} in flight; the client shares the cores",
            ["side", "requests/s", "per server CPU s", "p50 ms", "p99 ms", "errors"],
            rows,
        )
        for share, (side, other) in SHARES.items():
            ratio = metrics[name]["shares"][share]
            say(f"{side}: {ratio:.2f}x of {other}, per server CPU second")
