"""``omni bench build``: stage times, peak memory, determinism, and loading beside ``sha256sum``."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.index.vectors import VectorSet, load_vectors
from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
)
from encoders.errors import ConfigError
from index_builder.ann import AnnConfig
from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.building.plan import RebuildConfig, estimate_mib, fit_memory
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig

SPACE = "b0" * 32


def bundle_folder(folder: Path, dimension: int) -> Path:
    """Make a folder shaped like a bundle; the vectors come from a public model, so no tower."""
    for part in ("query_encoder", "entity_encoder"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "README.txt").write_text("vectors of this benchmark are WordLlama's\n")
    (folder / "space.json").write_text(json.dumps({"space_id": SPACE, "dimension": dimension}))
    return folder


def rebuild_config(
    kind: str, threads: int, *, deterministic: bool = False, max_memory_mib: int | None = None
) -> RebuildConfig:
    """Settings of one build."""
    return RebuildConfig(
        index=IndexConfig(kind=kind, ann=AnnConfig(threads=threads)),
        deterministic=deterministic,
        min_recall=0.9,
        max_memory_mib=max_memory_mib,
    )


def build_once(
    store: ReleaseStore,
    bundle: Path,
    corpus: np.ndarray,
    calibration: np.ndarray,
    config: RebuildConfig,
) -> str:
    """Build and publish one release of one entity type, calibrated on its held-out queries."""
    inputs = {
        "pin": EntityInput(
            ids=[f"text-{i}" for i in range(len(corpus))], vectors=corpus, space_id=SPACE
        )
    }
    queries = {"*": QuerySet([f"query {i}" for i in range(len(calibration))], calibration)}
    return build_release(inputs, bundle, store, config, queries)


def build_apart(
    root: Path, vectors: VectorSet, kind: str, threads: int, max_memory_mib: int | None
) -> None:
    """Run ``build_once`` in its own process over mapped vectors, so the peak is the build's alone.

    Raises:
        ConfigError: The process failed; with the end of what it said.
    """
    np.save(root / "corpus.npy", vectors.corpus)
    np.save(root / "calibration.npy", vectors.calibration)
    code = "import sys; from benchmarks.index.build import build_here; build_here(*sys.argv[1:])"
    arguments = [str(root), kind, str(threads), str(max_memory_mib or 0)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, check=False
    )
    (root / "corpus.npy").unlink()
    if done.returncode:
        raise ConfigError(f"the build failed: {done.stderr.strip()[-500:]}")


def build_here(root: str, kind: str, threads: str, max_memory_mib: str) -> None:
    """What the process of ``build_apart`` does."""
    folder = Path(root)
    corpus, calibration = (
        np.load(folder / "corpus.npy", mmap_mode="r"),
        np.load(folder / "calibration.npy"),
    )
    limit = int(max_memory_mib) or None
    build_once(
        ReleaseStore(folder / "store"),
        folder / "bundle",
        corpus,
        calibration,
        rebuild_config(kind, int(threads), max_memory_mib=limit),
    )


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """``folder``, made when missing; else a folder that is removed afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def time_sha256sum(folder: Path) -> float:
    """Seconds that ``sha256sum`` takes over all files of a folder."""
    files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    start = time.perf_counter()
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_loading(store: ReleaseStore) -> float:
    """Seconds from the folder to proven: verified, opened, golden queries replayed."""
    start = time.perf_counter()
    with store.open_current() as release:
        release.replay_golden()
    return time.perf_counter() - start


@click.command()
@data_option
@click.option(
    "--size", type=int, default=100_000, show_default=True, help="Vectors of the corpus (256-d)."
)
@click.option("--index", "kind", default="auto", show_default=True, help="Kind of index.")
@click.option("--threads", type=int, default=0, help="Build threads; 0: all cores.")
@click.option(
    "--max-memory",
    "max_memory_mib",
    type=int,
    help="Limit of the build's private memory, MiB; auto picks a kind that fits.",
)
@click.option(
    "--deterministic-size",
    type=int,
    default=20_000,
    show_default=True,
    help="Vectors of the two deterministic builds; 0: skip.",
)
@click.option(
    "--repeats", type=int, default=3, show_default=True, help="Loading and sha256sum, in turn."
)
@click.option(
    "--store",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help=(
        "Keep the release in this folder; if one of this size is there already, only loading is"
        " measured again."
    ),
)
@click.option("--no-record", is_flag=True, help="Print only; write no record.")
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    size: int,
    kind: str,
    threads: int,
    max_memory_mib: int | None,
    deterministic_size: int,
    repeats: int,
    folder: Path | None,
    no_record: bool,
    as_json: bool,
) -> None:
    """Build a release of real vectors; load it; build a smaller one twice and compare every byte.

    Example: omni bench build --data data --size 100000
    """
    if data_dir is None:
        raise ConfigError("this benchmark needs --data (or OMNI_DATA): a folder that holds large/")
    vectors = load_vectors(data_dir, size=size)
    threads = threads or os.cpu_count() or 1
    asked = RebuildConfig(index=IndexConfig(kind=kind), max_memory_mib=max_memory_mib)
    dimension = int(vectors.corpus.shape[1])
    expected_mib = estimate_mib(
        fit_memory("pin", len(vectors.corpus), dimension, asked),
        len(vectors.corpus),
        dimension,
    )
    with working_folder(folder) as root:
        bundle = bundle_folder(root / "bundle", dimension)
        store = ReleaseStore(root / "store")
        release_id = store.current()
        if release_id is None or read_manifest(store.path_of(release_id)).entities[
            "pin"
        ].count != len(vectors.corpus):
            build_apart(root, vectors, kind, threads, max_memory_mib)
            release_id = store.current()
            assert release_id is not None, "the build activates its release"
        manifest = read_manifest(store.path_of(release_id))
        shas, loads = [], []
        for _ in range(repeats):
            shas.append(time_sha256sum(store.path_of(release_id)))
            loads.append(time_loading(store))
        metrics: dict[str, Any] = {
            "vectors": len(vectors.corpus),
            "kind": manifest.entities["pin"].index["kind"],
            "built": manifest.measured["created"],
            "build_seconds": round(manifest.measured["seconds"]["total"], 2),
            "stages": manifest.measured["entities"]["pin"]["seconds"],
            "max_memory_mib": max_memory_mib,
            "peak_private_mib": manifest.measured["peak_private_mib"],
            "peak_private_mib_estimate": round(expected_mib),
            "disk_mib": round(manifest.total_bytes() / 2**20, 1),
            "golden_recall_at_10": manifest.entities["pin"].golden["recall"],
            "sha256sum_seconds": round(statistics.median(shas), 3),
            "loading_seconds": round(statistics.median(loads), 3),
            "loading_limit_seconds": round(1.5 * statistics.median(shas) + 2.0, 3),
        }
        if deterministic_size:
            metrics["deterministic"] = build_twice(
                root, bundle, vectors, min(deterministic_size, len(vectors.corpus))
            )
    if not no_record:
        write_record(
            f"build-{len(vectors.corpus) // 1000}k" + ("-limited" if max_memory_mib else ""),
            Measurement(
                dataset=vectors.describe(),
                config={
                    "index": kind,
                    "threads": threads,
                    "max_memory_mib": max_memory_mib,
                    "deterministic_size": deterministic_size,
                },
                protocol={
                    "loading": (
                        "sizes, SHA-256 of every file, open, replay 64 golden queries;"
                        " page cache warm"
                    ),
                    "repeats": repeats,
                },
                metrics=metrics,
                libraries=("hnswlib", "rabitqlib", "numpy", "polars"),
            ),
        )
    if as_json:
        print_json(metrics)
        return
    print_table(
        "release build (real texts, WordLlama vectors)",
        ("what", "value"),
        [(name, str(value)) for name, value in metrics.items()],
    )


def build_twice(root: Path, bundle: Path, vectors: VectorSet, rows: int) -> dict[str, Any]:
    """Two deterministic builds of the same input in two stores: which files differ."""
    manifests = []
    for name in ("first", "second"):
        store = ReleaseStore(root / name)
        manifests.append(
            read_manifest(
                store.path_of(
                    build_once(
                        store,
                        bundle,
                        vectors.corpus[:rows],
                        vectors.calibration,
                        rebuild_config("auto", 1, deterministic=True),
                    )
                )
            )
        )
    one, two = manifests
    differ = sorted(
        name for name in {*one.files, *two.files} if one.files.get(name) != two.files.get(name)
    )
    return {
        "vectors": rows,
        "kind": one.entities["pin"].index["kind"],
        "files": len(one.files),
        "files_that_differ": differ,
        "manifests_equal_but_for_measured": replace(one, measured={}) == replace(two, measured={}),
        "same_release_id": one.release_id == two.release_id,
        "seconds": [
            round(float(np.sum(list(m.measured["entities"]["pin"]["seconds"].values()))), 2)
            for m in manifests
        ],
    }
