"""``omni bench serve``: our service beside Milvus and a bare gRPC echo, same vectors and cores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from benchmarks.record import Measurement, out_option, write_record
from benchmarks.serving import milvus_peer
from benchmarks.serving.comparison import BenchFailed, Plan, compare
from benchmarks.serving.frames_load import frame_load
from benchmarks.serving.load import Load, Outcome, client_load, stub_load
from benchmarks.serving.page import PageSize, page_lines, print_page
from benchmarks.serving.peer_servers import (
    Process,
    echo_server,
    milvus_is_installed,
    milvus_server,
    omni_server,
    require_fastapi,
)
from benchmarks.serving.serving_release import ServingRelease, serving_release
from encoders.commands.console import (
    data_option,
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from protos import retrieval_pb2 as pb
from retrieval.client import ClientConfig, RetrievalClient

RETRIEVE = "/omnisearchsage.v1.Retrieval/Retrieve"
BATCH = "/omnisearchsage.v1.Retrieval/RetrieveBatch"
MIN_RECALLS = (None, 0.95, 0.96, 0.97, 0.98, 0.99)
BATCH_SIZE = 64
WORDS = ("red", "blue", "old", "new", "small", "large", "silver", "wooden", "glass", "paper")
THINGS = ("cat", "dog", "lamp", "door", "cake", "train", "tree", "boat", "bird", "horse")
DEFAULT_KIND = "symqg"
TEXTS = [f"{a} {b} {c}" for a in WORDS for b in THINGS for c in THINGS]


def vector_requests(release: ServingRelease, k: int, min_recall: float | None) -> list[bytes]:
    """One ready-embedding ``RetrieveRequest`` per held-out query, serialised."""
    return [
        pb.RetrieveRequest(
            embedding=query.astype("<f4").tobytes(),
            space_id=release.space_id,
            entity_type="pin",
            k=k,
            min_recall=min_recall,
        ).SerializeToString()
        for query in np.asarray(release.vectors.queries)
    ]


def recall_setting(
    address: str, release: ServingRelease, k: int, wanted: float
) -> tuple[float | None, float]:
    """Return the lowest ``min_recall`` whose ANN recall through the service is ``wanted``."""
    queries = np.asarray(release.vectors.queries)[:1000]
    recall = 0.0
    with RetrievalClient(address, ClientConfig(deadline_seconds=60)) as client:
        for setting in MIN_RECALLS:
            found = [
                client.retrieve(
                    embedding=query,
                    space_id=release.space_id,
                    entity_type="pin",
                    k=k,
                    min_recall=setting,
                ).ids
                for query in queries
            ]
            recall = milvus_peer.mean_recall(found, release.truth[: len(queries)])
            say(f"ours, min_recall={setting}: ANN recall@{k} {recall:.4f}")
            if recall >= wanted:
                return setting, recall
    raise BenchFailed(
        f"the service reaches ANN recall@{k} {recall:.3f}, but {wanted} is the target. Build the"
        " index with a higher ef."
    )


def start_our_client(
    address: str, queries_path: Path, space_id: str, k: int, min_recall: float | None
) -> tuple[Callable[[int], Any], Callable[[], None]]:
    """Inside a load process: our own synchronous client, one search per call."""
    client = RetrievalClient(address, ClientConfig(deadline_seconds=60))
    rows = list(np.load(queries_path))

    def ask(i: int) -> Any:
        return client.retrieve(
            embedding=rows[i % len(rows)],
            space_id=space_id,
            entity_type="pin",
            k=k,
            min_recall=min_recall,
        )

    ask(0)
    return ask, client.close


def verdict(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Ratio at each side's best concurrency, and whether p50 and p99 are lower at 1 and 16."""
    best = {
        name: max(side.items(), key=lambda item: item[1]["requests_per_second"])
        for name, side in (("ours", ours), ("theirs", theirs))
    }
    lower = {
        f"{percentile} at {c}": ours[c][percentile] < theirs[c][percentile]
        for c in (1, 16)
        if c in ours and c in theirs
        for percentile in ("p50_ms", "p99_ms")
    }
    return {
        "ratio_at_best": round(
            best["ours"][1]["requests_per_second"] / best["theirs"][1]["requests_per_second"], 2
        ),
        "ratio_per_server_cpu_second": round(
            max(f["per_server_cpu_second"] for f in ours.values())
            / max(f["per_server_cpu_second"] for f in theirs.values()),
            2,
        ),
        "best_concurrency": {name: concurrency for name, (concurrency, _) in best.items()},
        "lower": lower,
    }


def against_milvus(
    ours: Process, release: ServingRelease, k: int, wanted: float, plan: Plan
) -> dict[str, Any]:
    """Ready embeddings, thin stubs and own clients, ours and Milvus in turns."""
    setting, our_recall = recall_setting(ours.address, release, k, wanted)
    queries = np.ascontiguousarray(release.vectors.queries, dtype=np.float32)
    with milvus_server() as milvus, tempfile.TemporaryDirectory() as folder:
        with stage(f"fill Milvus with {len(release.vectors.corpus):,} vectors"):
            milvus_peer.fill(milvus.address, np.asarray(release.vectors.corpus))
        ef, their_recall = milvus_peer.cheapest_ef(
            milvus.address, queries[:1000], release.truth[:1000], wanted
        )
        ef = max(ef, k)
        raw = milvus_peer.raw_requests(milvus.address, queries[:500], k, ef)
        path = Path(folder) / "queries.npy"
        np.save(path, queries)
        frames: dict[str, Callable[[Load], Outcome]] = {
            "ours": partial(
                frame_load, ours.address, RETRIEVE, vector_requests(release, k, setting)
            ),
            "milvus": partial(frame_load, milvus.address, milvus_peer.SEARCH_METHOD, raw),
        }
        thin: dict[str, Callable[[Load], Outcome]] = {
            "ours": partial(
                stub_load, ours.address, RETRIEVE, vector_requests(release, k, setting)
            ),
            "milvus": partial(stub_load, milvus.address, milvus_peer.SEARCH_METHOD, raw),
        }
        own: dict[str, Callable[[Load], Outcome]] = {
            "ours": partial(
                client_load,
                partial(start_our_client, ours.address, path, release.space_id, k, setting),
            ),
            "milvus": partial(
                client_load, partial(milvus_peer.start_client, milvus.address, path, k, ef)
            ),
        }
        found: dict[str, Any] = {
            "recall": {"ours": our_recall, "milvus": their_recall},
            "settings": {
                "ours_min_recall": setting,
                "milvus_ef": ef,
                "milvus_index": {"type": "HNSW", **milvus_peer.INDEX},
            },
            "memory_mib": {"ours": round(ours.memory_mib()), "milvus": round(milvus.memory_mib())},
        }
        for name, runs in (("prepared_frames", frames), ("thin_stubs", thin), ("own_clients", own)):
            with stage(f"ours and Milvus in turns, {name}"):
                figures = compare(runs, {"ours": ours, "milvus": milvus}, plan)
            found[name] = {**figures, **verdict(figures["ours"], figures["milvus"])}
        return found


SERVERS = {
    "": ("http2", "0"),
    "grpcio_": ("grpcio", "0"),
    "kept_": ("http2", "64"),
    "grpcio_kept_": ("grpcio", "64"),
}
"""Transport and ``--answer-cache-mib`` of the servers beside the echo: each query searched, or its
answer cached."""


def against_echo(
    release: ServingRelease, k: int, rounds: int, seconds: float, workers: int
) -> dict[str, Any]:
    """Measure cached ``Retrieve`` and batches of 64 beside a bare echo, per server CPU second.

    Four servers: our transport and the echo's, each searching for every query, and each keeping
    answers.
    """
    requests = [
        pb.RetrieveRequest(query=text, entity_type="pin", k=k).SerializeToString() for text in TEXTS
    ]
    batches = [
        pb.RetrieveBatchRequest(
            queries=TEXTS[i : i + BATCH_SIZE], target=pb.Target(entity_type="pin", k=k)
        ).SerializeToString()
        for i in range(0, len(TEXTS) - BATCH_SIZE, BATCH_SIZE)
    ]
    sides: dict[str, Callable[[], tuple[float, float]]] = {}
    with ExitStack() as stack:
        processes: dict[str, Process] = {}
        for prefix, (transport, cache_mib) in SERVERS.items():
            flags = [
                "--transport",
                transport,
                "--answer-cache-mib",
                cache_mib,
                "--workers",
                str(workers),
                "--metrics-port",
                "-1",
            ]
            process = processes[prefix] = stack.enter_context(omni_server(release.store, flags))
            with RetrievalClient(process.address, ClientConfig(deadline_seconds=60)) as client:
                # Twice: the second finds its vector cached and lets the server time its searches.
                for text in TEXTS * 2:
                    answer = client.retrieve(text, "pin", k)
                if workers == 1 and answer.answer_cached != (cache_mib != "0"):
                    raise BenchFailed(
                        f"--answer-cache-mib {cache_mib}: the second answer says"
                        f" answer_cached={answer.answer_cached}"
                    )
        response = pb.RetrieveResponse(
            release_id=answer.release_id,
            space_id=answer.space_id,
            cache_hit=True,
            plan=answer.plan,
            ef=answer.ef,
        )
        response.hits.extend(pb.Hit(id=hit.id, score=hit.score) for hit in answer.hits)
        response.timings.total_ns = 300_000
        echo = stack.enter_context(echo_server(response.ByteSize()))

        def measure(
            process: Process, method: str, payloads: list[bytes], concurrency: int, per_call: int
        ) -> tuple[float, float]:
            before = process.cpu_seconds()
            load = Load(concurrency=concurrency, seconds=seconds, warmup_seconds=0.0)
            outcome = stub_load(process.address, method, payloads, load)
            if outcome.errors:
                raise BenchFailed(f"{method}: {outcome.errors}")
            count = len(outcome.latencies_ms) * per_call
            return count / outcome.seconds, count / (process.cpu_seconds() - before)

        sides["echo"] = partial(measure, echo, RETRIEVE, requests, 16, 1)
        for prefix, process in processes.items():
            sides[f"{prefix}cached_retrieve"] = partial(measure, process, RETRIEVE, requests, 16, 1)
            sides[f"{prefix}cached_batch_of_64"] = partial(
                measure, process, BATCH, batches, 2, BATCH_SIZE
            )
        figures: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                figures[side].append(sides[side]())
                say(
                    f"{side}: {figures[side][-1][0]:.0f} queries/s, {figures[side][-1][1]:.0f} per"
                    " server CPU second"
                )
    result: dict[str, Any] = {
        side: {
            "queries_per_second": median(a for a, _ in rows),
            "per_server_cpu_second": median(b for _, b in rows),
            "rounds": rows,
        }
        for side, rows in figures.items()
    }
    result["request_bytes"], result["response_bytes"] = len(requests[0]), response.ByteSize()
    for prefix in SERVERS:
        single, batch = result[f"{prefix}cached_retrieve"], result[f"{prefix}cached_batch_of_64"]
        result[f"{prefix}cached_share_of_echo_per_core"] = (
            single["per_server_cpu_second"] / result["echo"]["per_server_cpu_second"]
        )
        result[f"{prefix}batch_over_single_per_core"] = (
            batch["per_server_cpu_second"] / single["per_server_cpu_second"]
        )
        result[f"{prefix}batch_over_single_wall"] = (
            batch["queries_per_second"] / single["queries_per_second"]
        )
    return result


def more_workers(
    release: ServingRelease,
    k: int,
    workers: int,
    concurrencies: Sequence[int],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Compare one worker with several, in turns: ready embeddings and cached texts.

    Prepared frames, one connection per client process.

    Args:
        release: What is asked.
        k: Results per query.
        workers: Of the second server; at least as many connections are opened, so that every worker
            can have one.
        concurrencies: Calls in flight.
        rounds: Rounds per figure.
        seconds: Length of one measurement.
    """
    texts = [
        pb.RetrieveRequest(query=text, entity_type="pin", k=k).SerializeToString() for text in TEXTS
    ]
    found: dict[str, Any] = {"workers": workers, "client_processes": max(2, workers)}
    searching = ["--answer-cache-mib", "0", "--metrics-port", "-1"]
    with (
        omni_server(release.store, ["--workers", "1", *searching]) as one,
        omni_server(release.store, ["--workers", str(workers), *searching]) as several,
    ):
        servers = {"one": one, "several": several}
        for name, payloads in (
            ("ready_embeddings", vector_requests(release, k, None)),
            ("cached_texts", texts),
        ):

            def run(process: Process, load: Load, payloads: list[bytes] = payloads) -> Outcome:
                return frame_load(
                    process.address,
                    RETRIEVE,
                    payloads,
                    replace(load, processes=found["client_processes"]),
                )

            for process in (
                servers.values()
            ):  # each worker fills its cache and learns how short its searches are
                run(process, Load(concurrency=8 * workers, seconds=2.0))
            with stage(f"1 and {workers} workers in turns, {name}"):
                figures = compare(
                    {side: partial(run, process) for side, process in servers.items()},
                    servers,
                    Plan(concurrencies, rounds, seconds),
                )
            best = {
                side: max(float(f["requests_per_second"]) for f in by.values())
                for side, by in figures.items()
            }
            found[name] = {**figures, "ratio_at_best": round(best["several"] / best["one"], 2)}
        found["memory_mib"] = {
            side: round(process.memory_mib()) for side, process in servers.items()
        }
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@data_option
@click.option("--size", default=100_000, show_default=True, help="Vectors in the index.")
@click.option("--kind", default=DEFAULT_KIND, show_default=True, help="Our index kind.")
@click.option("-k", default=10, show_default=True, help="Results per query.")
@click.option(
    "--recall",
    "wanted",
    default=0.95,
    show_default=True,
    help="ANN recall@k that each side must reach, at its cheapest setting.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=int,
    default=(1, 4, 16, 32),
    show_default=True,
    help="Calls in flight; repeat.",
)
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    help="Rounds per figure; sides take turns; the median counts.",
)
@click.option("--seconds", default=4.0, show_default=True, help="Length of one measurement.")
@click.option("--workers", default=1, show_default=True, help="Processes of our server.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(["milvus", "echo", "workers", "page"]),
    default=("milvus", "echo"),
    show_default=True,
    help="Repeat. workers: our own server with one worker beside one with --more-workers. page:"
    " hits with five attributes, over gRPC, as JSON, and by FastAPI, at the largest --concurrency;"
    " needs no --data.",
)
@click.option(
    "--more-workers",
    "more_workers_count",
    default=2,
    show_default=True,
    help="Workers of the second server of --peer workers.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, exists=True),
    help="Model bundle for text queries; default: a tiny random tower.",
)
@out_option
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    size: int,
    kind: str,
    k: int,
    wanted: float,
    concurrencies: tuple[int, ...],
    rounds: int,
    seconds: float,
    workers: int,
    peers: tuple[str, ...],
    more_workers_count: int,
    bundle: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Requests per second and latency of our service beside Milvus and a bare gRPC echo.

    Same vectors, k, recall, cores and run; clients share the cores with the servers. The Milvus
    part needs the packages milvus and pymilvus.

    Example: omni bench serve --data data --rounds 3; omni bench serve --data data --peer workers;
    omni bench serve --peer page
    """
    if "page" in peers:
        require_fastapi()
        _bench_page(k, Plan(concurrencies, rounds, seconds), out, as_json)
        peers = tuple(peer for peer in peers if peer != "page")
        if not peers:
            return
    if data_dir is None:
        fail("omni bench serve needs --data (or OMNI_DATA): the folder that holds large/.", 2)
    if "milvus" in peers and not milvus_is_installed():
        fail("the Milvus part needs: pip install milvus pymilvus (or choose --peer echo)", 2)
    release = serving_release(data_dir, size=size, kind=kind, k=k, bundle=bundle)
    metrics: dict[str, Any] = {}
    if "workers" in peers:
        metrics["workers"] = more_workers(
            release, k, more_workers_count, concurrencies, rounds, seconds
        )
    if "echo" in peers:
        metrics["echo"] = against_echo(release, k, rounds, seconds, workers)
    if "milvus" in peers:
        with omni_server(
            release.store, ["--workers", str(workers), "--metrics-port", "-1"]
        ) as ours:
            plan = Plan(concurrencies, rounds, seconds)
            metrics["milvus"] = against_milvus(ours, release, k, wanted, plan)
    path = write_record(
        ("serve-workers" if peers == ("workers",) else "serve")
        + ("" if kind == DEFAULT_KIND else f"-{kind}"),
        Measurement(
            dataset=release.vectors.describe(),
            config={
                "kind": kind,
                "k": k,
                "workers": workers,
                "ann_recall": wanted,
                "build": release.build,
            },
            protocol={
                "rounds": rounds,
                "seconds": seconds,
                "clock": "perf_counter",
                "turns": "sides alternate within a round; medians over rounds",
                "cores": "servers and client processes share all cores of the machine",
            },
            metrics=metrics,
            libraries=(
                "grpcio",
                "hnswlib",
                "numpy",
                *(("milvus", "pymilvus") if "milvus" in peers else ()),
            ),
        ),
        folder=out,
    )
    if as_json:
        print_json(metrics)
        return
    _print(metrics, release)
    say(f"record: {path.name}")


def _bench_page(k: int, plan: Plan, out: Path, as_json: bool) -> None:
    """Measure, record and print what a page asks."""
    size = PageSize()
    metrics = page_lines(k, plan, size)
    path = write_record(
        "serve-page",
        Measurement(
            dataset=size.describe(),
            config={"k": k, "concurrency": metrics["concurrency"]},
            protocol={
                "warm_up_seconds": size.warm_seconds,
                "rounds": plan.rounds,
                "seconds": plan.seconds,
                "clock": "CPU time of the server's process; perf_counter",
                "turns": "sides alternate within a round; medians over rounds",
                "shares": "of requests per server CPU second, within a round; medians over rounds",
                "cores": "servers and client processes share all cores of the machine",
            },
            metrics=metrics,
            libraries=("grpcio", "fastapi", "httptools", "orjson", "starlette", "uvicorn"),
        ),
        folder=out,
    )
    if as_json:
        print_json(metrics)
    else:
        print_page(metrics)
        say(f"record: {path.name}")


def _print(metrics: dict[str, Any], release: ServingRelease) -> None:
    real = f"{len(release.vectors.corpus):,} real text vectors"
    if "workers" in metrics:
        found = metrics["workers"]
        for name in ("ready_embeddings", "cached_texts"):
            rows = [
                [
                    1 if side == "one" else found["workers"],
                    c,
                    f["requests_per_second"],
                    f["per_server_cpu_second"],
                    f["p50_ms"],
                    f["p99_ms"],
                ]
                for side in ("one", "several")
                for c, f in found[name][side].items()
            ]
            title = f"{name.replace('_', ' ').capitalize()}, {real}; the client shares the cores"
            print_table(
                title,
                ["workers", "concurrency", "requests/s", "per server CPU s", "p50 ms", "p99 ms"],
                rows,
            )
            say(f"{found['workers']} workers answer {found[name]['ratio_at_best']:.2f}x as many")
        say(f"memory (PSS, MiB): {found['memory_mib']}")
    if "milvus" in metrics:
        found = metrics["milvus"]
        for name in ("prepared_frames", "thin_stubs", "own_clients"):
            rows = [
                [
                    side,
                    c,
                    f["requests_per_second"],
                    f["per_server_cpu_second"],
                    f["p50_ms"],
                    f["p95_ms"],
                    f["p99_ms"],
                    f["errors"],
                ]
                for side in ("ours", "milvus")
                for c, f in found[name][side].items()
            ]
            recall = (
                f"ANN recall ours {found['recall']['ours']:.3f}, Milvus"
                f" {found['recall']['milvus']:.3f}"
            )
            title = f"Ready embeddings, {name.replace('_', ' ')}; {real}; {recall}"
            print_table(
                title,
                [
                    "side",
                    "concurrency",
                    "requests/s",
                    "per server CPU s",
                    "p50 ms",
                    "p95 ms",
                    "p99 ms",
                    "errors",
                ],
                rows,
            )
            ratios = (
                f"{found[name]['ratio_at_best']:.2f}x by the clock,"
                f" {found[name]['ratio_per_server_cpu_second']:.2f}x per server CPU second"
            )
            say(f"best against best: {ratios}; lower: {found[name]['lower']}")
    if "echo" in metrics:
        found = metrics["echo"]
        rows = [
            [side, found[side]["queries_per_second"], found[side]["per_server_cpu_second"]]
            for side in found
            if isinstance(found[side], dict)
        ]
        print_table(
            f"Cached text over {real}, beside a bare gRPC echo",
            ["side", "queries/s", "queries per server CPU second"],
            rows,
        )
        for prefix, (transport, cache_mib) in SERVERS.items():
            share, batch = (
                found[f"{prefix}cached_share_of_echo_per_core"],
                found[f"{prefix}batch_over_single_per_core"],
            )
            searched = "every query searched" if cache_mib == "0" else "answers cached"
            say(
                f"{transport}, {searched}: Retrieve {share:.0%} of the echo per core; a batch of 64"
                f" answers {batch:.1f}x as many queries"
            )
