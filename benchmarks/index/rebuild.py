"""``omni bench rebuild``: CPU time of an incremental rebuild beside a full one, over one parent."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.index.build import SPACE, bundle_folder, working_folder
from benchmarks.index.vectors import load_vectors
from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)
from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.ann import AnnConfig
from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.building.plan import RebuildConfig
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex, IndexConfig

HOWS = ("first", "full", "incremental", "again")
"""The parent, and what is built over it: twice incrementally, whose bytes are compared."""


def changed_corpus(vectors: np.ndarray, rows: int, share: float) -> np.ndarray:
    """Return the first ``rows`` vectors, ``share`` of them replaced in place by later ones."""
    count = min(round(share * rows), len(vectors) - rows)
    corpus = vectors[:rows].copy()
    at = np.random.default_rng(0).choice(rows, count, replace=False)
    corpus[at] = vectors[rows : rows + count]
    return corpus


def build_here(root: str, kind: str, how: str) -> None:
    """Build one release; what the process of ``build_apart`` does."""
    folder = Path(root)
    corpus = np.load(folder / f"{'first' if how == 'first' else 'changed'}.npy", mmap_mode="r")
    calibration = np.load(folder / "calibration.npy")
    ids = [f"text-{i}" for i in range(len(corpus))]
    config = RebuildConfig(
        index=IndexConfig(kind=kind, ann=AnnConfig(threads=1)),
        min_recall=0.9,
        incremental=how != "full",
        activate=how == "first",
        resume=False,
        release_id=how,
    )
    build_release(
        {"pin": EntityInput(ids=ids, vectors=np.asarray(corpus), space_id=SPACE)},
        folder / "bundle",
        ReleaseStore(folder / "store"),
        config,
        {"*": QuerySet([f"query {i}" for i in range(len(calibration))], calibration)},
    )


def build_apart(root: Path, kind: str, how: str) -> dict[str, float]:
    """Run ``build_here`` in its own process; return its CPU and wall seconds.

    Raises:
        ConfigError: The process failed; with the end of what it said.
    """
    code = "import sys; from benchmarks.index.rebuild import build_here; build_here(*sys.argv[1:])"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), kind, how],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise ConfigError(f"the build failed: {done.stderr.strip()[-500:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(used, 2), "wall_seconds": round(wall, 2)}


def searched(folder: Path, queries: np.ndarray, scores: np.ndarray) -> dict[str, float | int]:
    """Search a release's index at its default recall; recall@10, ef and median time.

    Args:
        folder: Of the entity type.
        queries: float32 ``(Q, D)``, held out.
        scores: float32 ``(Q, 10)`` of the exact answers.
    """
    index = EntityIndex.load(folder)
    found, times = [], []
    for query, exact in zip(queries, scores):
        start = time.perf_counter_ns()
        answer = index.search(query, 10)
        times.append((time.perf_counter_ns() - start) / 1000)
        found.append(np.count_nonzero(answer.scores >= exact[-1] - 1e-5) / 10)
    return {
        "recall_at_10": round(float(np.mean(found)), 4),
        "ef": answer.ef,
        "p50_us": round(statistics.median(times), 1),
        "unreachable": int(index.describe()["unreachable"] or 0),
    }


@click.command()
@data_option
@click.option("--size", type=int, default=100_000, show_default=True, help="Vectors (256-d).")
@click.option("--index", "kind", default="int8-graph", show_default=True, help="Kind of index.")
@click.option(
    "--changed",
    type=click.FloatRange(0, 0.2),
    default=0.01,
    show_default=True,
    help="Share of the vectors that are replaced.",
)
@click.option("--no-record", is_flag=True, help="Print only; write no record.")
@json_option
@handle_errors
def command(
    data_dir: Path | None, size: int, kind: str, changed: float, no_record: bool, as_json: bool
) -> None:
    """Replace a share of the vectors; rebuild in full and incrementally, each in its own process.

    Example: omni bench rebuild --data data --size 100000 --changed 0.01
    """
    if data_dir is None:
        raise ConfigError("this benchmark needs --data (or OMNI_DATA): a folder that holds large/")
    vectors = load_vectors(data_dir, size=round(size * (1 + changed)) + 1)
    rows = min(size, int(len(vectors.corpus) / (1 + changed)))
    # Corpus rows are in the order of their texts: shuffled, so that those held back are like others
    corpus = vectors.corpus[np.random.default_rng(1).permutation(len(vectors.corpus))]
    after = changed_corpus(corpus, rows, changed)
    states: dict[str, dict[str, Any]] = {}
    with working_folder(None) as root:
        bundle_folder(root / "bundle", int(corpus.shape[1]))
        np.save(root / "first.npy", corpus[:rows])
        np.save(root / "changed.npy", after)
        np.save(root / "calibration.npy", vectors.calibration)
        del corpus
        _, scores = exact_top_k(vectors.queries, after, 10)
        store, manifests = ReleaseStore(root / "store"), {}
        for how in HOWS:
            states[how] = dict(build_apart(root, kind, how))
            manifests[how] = read_manifest(store.path_of(how))
            measured = manifests[how].measured["entities"]["pin"]
            states[how] |= {"kind": manifests[how].entities["pin"].index["kind"]}
            states[how] |= {"stages": measured["seconds"], "incremental": measured["incremental"]}
            if how != "first":
                states[how] |= searched(store.path_of(how) / "pin", vectors.queries, scores)
            say(f"{how}: {json.dumps(states[how])}")
    one, two = manifests["incremental"].files, manifests["again"].files
    metrics = {
        "vectors": rows,
        "changed": changed,
        "cpu_share_of_full": round(
            states["incremental"]["cpu_seconds"] / states["full"]["cpu_seconds"], 3
        ),
        "files_that_differ": sorted(n for n in {*one, *two} if one.get(n) != two.get(n)),
        "builds": states,
    }
    if not no_record:
        write_record(
            f"rebuild-{rows // 1000}k" + ("" if kind == "int8-graph" else f"-{kind}"),
            Measurement(
                dataset=vectors.describe(),
                config={"index": kind, "changed": changed, "threads": 1},
                protocol={
                    "cpu_seconds": "user and system time of the process, imports included",
                    "again": "the incremental build once more, over the same parent",
                },
                metrics=metrics,
                libraries=("hnswlib", "rabitqlib", "numpy", "polars"),
            ),
        )
    if as_json:
        print_json(metrics)
        return
    columns = ("cpu_seconds", "wall_seconds", "kind", "recall_at_10", "ef", "p50_us", "unreachable")
    print_table(
        f"rebuild of {rows:,} real text vectors, {changed:.1%} replaced: incremental costs"
        f" {metrics['cpu_share_of_full']:.1%} of full (CPU)",
        ("build", *columns),
        [[how, *(state.get(column) for column in columns)] for how, state in states.items()],
    )
