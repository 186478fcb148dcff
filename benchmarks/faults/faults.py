"""``omni bench faults``: hurt a real server in many ways and count what callers notice.

The parts run one after the other, or each alone.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.faults.kills import kill_nine
from benchmarks.faults.mixed import mixed
from benchmarks.faults.overload import overload, split_cores
from benchmarks.faults.servers import COUNTS, DIMENSION, ServerProcess, prepare_store
from benchmarks.faults.storms import clock_jump, damaged_index, full_disk, hostile_redis
from benchmarks.faults.swaps import swaps_under_load
from benchmarks.record import Measurement, out_option, write_record
from benchmarks.small_releases import entity_texts, small_release, write_small_bundle
from encoders.commands.console import handle_errors, json_option, print_json, print_table, stage
from encoders.inference.onnx_forms import FEWEST_TEXTS, export_forms
from encoders.towers.query_tower import QueryEncoder
from index_builder.releases.store import ReleaseStore

PARTS = ("swaps", "worker-swaps", "overload", "mixed", "kills", "redis", "disk", "clock", "shadow")
SHADOW_ENTITIES = 20_000


def _overload(root: Path, seconds: float) -> dict[str, Any]:
    server_cores, client_cores = split_cores()
    # The small cache is soon full: what grows then is a leak
    limits = ("--max-encode-queue", "64", "--max-in-flight", "96", "--cache-mib", "4")
    tower = write_small_bundle(root / "h", 3, layers=6, width=256)
    server = _heavy_server(root, tower, *limits, cores=server_cores)
    try:
        return overload(server, seconds, 2.0, client_cores)
    finally:
        server.stop()


def _mixed(root: Path, seconds: float) -> dict[str, Any]:
    server_cores, client_cores = split_cores()
    tower = write_small_bundle(root / "h", 3, DIMENSION, layers=6, width=256)
    texts = entity_texts(FEWEST_TEXTS, seed=13)
    export_forms(tower, root / "h" / "forms", texts, ("onnx-int8",))
    server = _heavy_server(root, tower, cores=server_cores)
    try:
        return mixed(server, seconds, client_cores)
    finally:
        server.stop()


def _heavy_server(root: Path, tower: QueryEncoder, *flags: str, cores: set[int]) -> ServerProcess:
    """Serve a release whose tower is as deep as the paper's, so that encoding is the limit."""
    store = ReleaseStore(root / "heavy")
    small_release(store, root / "h", tower, release_id="h1", counts=COUNTS)
    return ServerProcess(store.root, "--shadow-fraction", "0", *flags, cores=cores)


def run_part(part: str, root: Path, settings: dict[str, Any]) -> Any:
    """Run one part in a fresh folder; returns its figures."""
    if part == "overload":
        return _overload(root, settings["overload_seconds"])
    if part == "mixed":
        return _mixed(root, settings["mixed_seconds"])
    if part == "shadow":
        store = ReleaseStore(root / "shadow")
        tower = write_small_bundle(root / "s", 5)
        small_release(
            store,
            root / "s",
            tower,
            release_id="good",
            counts={"pin": settings["shadow_entities"]},
            kind="hnsw",
        )
        return asyncio.run(damaged_index(store, tower, "good", 100.0, settings["shadow_seconds"]))
    store, encoder = prepare_store(root)
    space_id = json.loads((root / "a" / "space.json").read_text(encoding="utf-8"))["space_id"]
    if part in ("swaps", "worker-swaps"):
        workers = "1" if part == "swaps" else "2"
        server = ServerProcess(store.root, "--keep-releases", "2", "--workers", workers)
        try:
            return asyncio.run(
                swaps_under_load(server.address, settings["swaps"], 8, settings["rate"])
            )
        finally:
            server.stop()
    if part == "kills":
        return asyncio.run(
            kill_nine(store, root / "a", encoder, space_id, settings["kills"], settings["seed"])
        )
    if part == "disk":
        return asyncio.run(full_disk(encoder, root / "a", space_id))
    if part == "clock":
        return asyncio.run(clock_jump(store.root, encoder, space_id))
    assert part == "redis", part
    return [asyncio.run(hostile_redis(kind, store.root)) for kind in ("slow", "dead", "lying")]


def merged(earlier: dict[str, Any], part: str, found: Any) -> Any:
    """Merge a part's figures with an earlier run of today: kills of other seeds add up.

    Everything else is replaced.
    """
    before = earlier.get(part)
    if part != "kills" or before is None or found["seeds"][0] in before["seeds"]:
        return found
    if before.keys() != found.keys():  # a record of another form
        return found
    return {
        key: (
            dict(Counter(before[key]) + Counter(found[key]))
            if key == "killed"
            else before[key] + found[key]
        )
        for key in found
    }


@click.command("faults")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Run only this part; repeat. Default: all.",
)
@click.option(
    "--swaps",
    default=100,
    show_default=True,
    help="Release swaps under load, two thirds of them to another encoder.",
)
@click.option("--rate", default=150.0, show_default=True, help="Requests/s during the swaps.")
@click.option(
    "--overload-seconds", default=60.0, show_default=True, help="Length of the 4x overload."
)
@click.option(
    "--mixed-seconds",
    default=6.0,
    show_default=True,
    help="Length of each turn: the page calm, beside batches, and batches alone, six of each.",
)
@click.option(
    "--kills",
    default=200,
    show_default=True,
    help="How many kill -9; runs with different seeds add up in the record.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses the moments of the kills.")
@click.option(
    "--shadow-seconds",
    default=90.0,
    show_default=True,
    help="How long shadow recall watches the healthy index first.",
)
@click.option(
    "--shadow-entities",
    default=SHADOW_ENTITIES,
    show_default=True,
    help="Entities of the index that is damaged.",
)
@out_option
@json_option
@handle_errors
def command(parts: tuple[str, ...], out: Path, as_json: bool, **settings: Any) -> None:
    """Hurt a real server and count what callers notice.

    Small releases with a tiny random tower (made here, labelled so): the subject is the service,
    not the quality of answers. Parts that ran earlier the same day stay in the record.

    \b
    Example:
        omni bench faults --part swaps --part disk
    """  # noqa: D301
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-faults.json"
    metrics: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        metrics, runs = earlier["metrics"], earlier["config"].get("runs", {})
        if not runs:  # a record of the form before parts
            metrics = {}
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as folder, stage(part):
            metrics[part] = merged(metrics, part, run_part(part, Path(folder), settings))
        runs[part] = {"at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **settings}
        record = write_record(
            "faults",
            Measurement(
                dataset={
                    "name": "small releases over made-up texts",
                    "real": False,
                    "counts": COUNTS,
                },
                config={"runs": runs},
                protocol={
                    "client": "grpc.aio on the same machine, sharing its cores with the server",
                    "overload": (
                        "client process sends prepared HTTP/2 frames over 8 connections, open loop;"
                        " server and client pinned to cores of their own, peak (closed loop) and"
                        " flood measured under the same pinning; every query text is new"
                    ),
                    "mixed": (
                        "one client process sends prepared HTTP/2 frames; the page in an open loop,"
                        " half of its texts new, timed from sending; batches in a closed loop, new"
                        " texts; calm, mixed and batches alone in turns, pinned as overload is"
                    ),
                    "clock": "perf_counter",
                },
                metrics=metrics,
                libraries=("grpcio",),
            ),
            folder=out,
        )
    if as_json:
        print_json({"record": str(record), **metrics})
        return
    rows: list[list[object]] = []
    for name, values in metrics.items():
        for item in values if isinstance(values, list) else [values]:
            for key, value in item.items():
                rows.append(
                    [name, key, json.dumps(value) if isinstance(value, dict | list) else str(value)]
                )
    print_table("SIMULATED load on small made-up releases", ["fault", "figure", "value"], rows)
