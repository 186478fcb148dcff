"""``omni bench latency``: percentiles with and without the cache, per stage and entity type."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.record import Measurement, write_record
from benchmarks.serving.peer_servers import omni_server
from encoders.commands.console import (
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
    track,
)
from retrieval.client import ClientConfig, RetrievalClient
from retrieval.client.results import RetrieveResult

STAGES = ("queue", "encode", "search", "rerank")


class Sample(NamedTuple):
    """One call: what the client waited, and what the server said."""

    client_ns: int
    result: RetrieveResult


def percentiles_ms(nanoseconds: Sequence[int]) -> dict[str, float]:
    """p50, p95, p99 and the mean, in milliseconds."""
    values = np.asarray(nanoseconds, dtype=np.float64) / 1e6
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {
        "p50": round(p50, 4),
        "p95": round(p95, 4),
        "p99": round(p99, 4),
        "mean": round(float(values.mean()), 4),
    }


def per_stage(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return percentiles of the client's wait, the server's total, its stages and the remainder.

    The remainder is gRPC and the network.
    """
    stages: dict[str, list[int]] = {
        "client": [s.client_ns for s in samples],
        "server": [s.result.timings.total_ns for s in samples],
        "grpc and network": [max(0, s.client_ns - s.result.timings.total_ns) for s in samples],
    }
    for name in STAGES:
        stages[name] = [getattr(s.result.timings, f"{name}_ns") for s in samples]
    return {name: percentiles_ms(values) for name, values in stages.items()}


def ask_all(
    client: RetrievalClient,
    queries: Sequence[str],
    entity_type: str,
    k: int,
    concurrency: int,
    title: str,
) -> list[Sample]:
    """Ask each query once, ``concurrency`` at a time."""

    def ask(query: str) -> Sample:
        started = time.perf_counter_ns()
        result = client.retrieve(query, entity_type, k)
        return Sample(time.perf_counter_ns() - started, result)

    if concurrency == 1:
        return [ask(query) for query in track(queries, title)]
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, queries))


def measure(
    client: RetrievalClient,
    queries: Sequence[str],
    entity_types: Sequence[str],
    k: int,
    concurrency: int,
) -> dict[str, Any]:
    """Ask each entity type its own queries: once (encoded), for one more hit (cached), once more.

    The last is answered from the answer cache.
    """
    found: dict[str, Any] = {}
    share = len(queries) // len(entity_types)
    for number, entity_type in enumerate(entity_types):
        mine = queries[number * share : (number + 1) * share]
        ask_all(client, mine[: share // 10], entity_type, k, concurrency, "warm up")
        mine = mine[share // 10 :]
        samples = ask_all(client, mine, entity_type, k, concurrency, f"{entity_type}: encoded")
        samples += ask_all(client, mine, entity_type, k + 1, concurrency, f"{entity_type}: cached")
        samples += ask_all(
            client, mine, entity_type, k, concurrency, f"{entity_type}: answer cached"
        )
        by_cache: dict[str, list[Sample]] = {"encoded": [], "cached": [], "answer cached": []}
        for sample in samples:
            by_cache[
                (
                    "answer cached"
                    if sample.result.answer_cached
                    else "cached"
                    if sample.result.cache_hit
                    else "encoded"
                )
            ].append(sample)
        found[entity_type] = {
            name: {"queries": len(part), **per_stage(part)}
            for name, part in by_cache.items()
            if part
        }
    return found


def sample_queries(count: int, seed: int = 0) -> list[str]:
    """Return distinct held-out sample queries in random order (annotations, not clicks)."""
    from encoders.datasets.dataset import load_sample

    pairs = load_sample(engaged_queries=0, images=False).pairs
    texts = sorted(set(pairs.filter(pairs["split"] == "heldout")["query"].to_list()))
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[i] for i in order]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--server",
    metavar="HOST:PORT",
    help="A running server with a cold cache for these queries; or give --store.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Start a server on this store's active release.",
)
@click.option(
    "--queries",
    "queries_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text file, one query a line.",
)
@click.option(
    "--count",
    default=4000,
    show_default=True,
    help="Distinct queries, shared out over the entity types.",
)
@click.option("-k", default=10, show_default=True, help="Results per query.")
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=int,
    default=(1,),
    show_default=True,
    help="Calls in flight; repeat.",
)
@click.option(
    "--encoder-form",
    default="auto",
    show_default=True,
    help="With --store: auto, onnx-int8, onnx-fp32 or torch.",
)
@json_option
@handle_errors
def command(
    server: str | None,
    store: Path | None,
    queries_file: Path | None,
    count: int,
    k: int,
    concurrencies: tuple[int, ...],
    encoder_form: str,
    as_json: bool,
) -> None:
    """Latency percentiles with and without the query cache, per stage.

    Every query is asked three times: the first answer needs the encoder, the second (k + 1 results)
    finds its vector in the cache and is searched, the third is a cached answer. The server says
    which it was.

    Example: omni bench latency --store demo/store
    """
    if (server is None) == (store is None):
        fail("give either --server HOST:PORT or --store FOLDER", 2)
    if queries_file is not None:
        texts = [
            line.strip()
            for line in queries_file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        texts, source = list(dict.fromkeys(texts))[:count], queries_file.name
    else:
        texts, source = (
            sample_queries(count),
            (
                "held-out queries of the sample data (real words in 17 languages; annotations, not"
                " clicks)"
            ),
        )
    metrics: dict[str, Any] = {}
    with ExitStack() as stack:
        if store is not None:
            server = stack.enter_context(
                omni_server(store, ["--metrics-port", "-1", "--encoder-form", encoder_form])
            ).address
        assert server is not None
        client = stack.enter_context(RetrievalClient(server, ClientConfig(deadline_seconds=30)))
        release = client.describe_release()
        if len(texts) < 20 * len(release.entities) * len(concurrencies):
            fail(
                f"expected at least {20 * len(release.entities) * len(concurrencies)} distinct"
                f" queries, but got {len(texts)}",
                2,
            )
        part = len(texts) // len(concurrencies)
        for number, concurrency in enumerate(concurrencies):
            with stage(f"concurrency {concurrency}"):
                mine = texts[number * part : (number + 1) * part]
                metrics[str(concurrency)] = measure(
                    client, mine, list(release.entities), k, concurrency
                )
    entities = {
        name: {"count": e.count, "index": e.index_kind} for name, e in release.entities.items()
    }
    path = write_record(
        "latency",
        Measurement(
            dataset={
                "queries": source,
                "distinct": len(texts),
                "entities": entities,
                "release_id": release.release_id,
                "real": True,
            },
            config={
                "k": k,
                "concurrency": list(concurrencies),
                "form_id": release.form_id,
                "dimension": release.dimension,
            },
            protocol={
                "clock": "perf_counter_ns in the client",
                "warmup": "first tenth of the queries",
                "client": "RetrievalClient, same machine",
            },
            metrics=metrics,
            libraries=("grpcio", "onnxruntime", "torch"),
        ),
    )
    if as_json:
        print_json(metrics)
        return
    for width, by_type in metrics.items():
        rows = [
            [entity_type, cache, name, f["p50"], f["p95"], f["p99"]]
            for entity_type, caches in by_type.items()
            for cache, stages in caches.items()
            for name, f in stages.items()
            if name != "queries" and f["p99"] > 0
        ]
        print_table(
            f"Milliseconds at concurrency {width}; {source}; tower {release.form_id}",
            ["type", "vector", "stage", "p50", "p95", "p99"],
            rows,
        )
    say(f"record: {path.name}")
