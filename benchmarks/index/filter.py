"""``omni bench filter``: recall and queries/s at every selectivity, beside qdrant-edge.

Random filters, filters with the query and against it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl

from benchmarks.index.engines import one_blas_thread, qdrant_shard
from benchmarks.index.vectors import VectorSet, load_vectors
from benchmarks.record import Measurement, out_option, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.filters.expression import forget_parsed
from index_builder.search.calibration import TIE
from index_builder.search.entity_index import EntityIndex, IndexConfig

SHARES = (0.5, 0.1, 0.01, 0.001)
KINDS = ("random", "correlated", "anti-correlated")
QDRANT_EFS = (64, 96, 128, 192, 256, 384, 512)
K = 10
Ranges = list[tuple[str, int, int]]
"""Per query: attribute, lowest and highest value that passes."""


def attributes_of(corpus: np.ndarray, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Make two integer attributes: a random permutation, and the rank along the main direction.

    Returns:
        The columns, and the direction, float32 ``(D,)``.
    """
    some = corpus[:: max(1, len(corpus) // 5_000)]
    direction = np.linalg.svd(some - some.mean(axis=0), full_matrices=False)[2][0]
    rank = np.empty(len(corpus), dtype=np.int64)
    rank[np.argsort(corpus @ direction)] = np.arange(len(corpus))
    return {"number": np.random.default_rng(seed).permutation(len(corpus)), "rank": rank}, direction


def ranges_of(
    kind: str,
    share: float,
    corpus: np.ndarray,
    queries: np.ndarray,
    direction: np.ndarray,
    seed: int = 1,
) -> Ranges:
    """Make a filter per query: a random window of ``number``, or one end of ``rank``."""
    count, size = len(corpus), max(K, int(share * len(corpus)))
    rng = np.random.default_rng(seed)
    if kind == "random":
        starts = rng.integers(0, count - size + 1, size=len(queries))
        return [("number", int(s), int(s) + size - 1) for s in starts]
    high = queries @ direction > np.median(corpus @ direction)
    if kind == "anti-correlated":
        high = ~high
    shift = rng.permutation(max(2 * len(queries), size // 50))[
        : len(queries)
    ]  # so that no two filters are alike
    return [
        (
            ("rank", count - size - int(s), count - 1 - int(s))
            if h
            else ("rank", int(s), size - 1 + int(s))
        )
        for h, s in zip(high, shift)
    ]


def truth(
    corpus: np.ndarray, queries: np.ndarray, columns: dict[str, np.ndarray], ranges: Ranges
) -> np.ndarray:
    """The k-th exact score under each query's filter, float32 ``(Q,)``."""
    order = {
        name: np.argsort(column) for name, column in columns.items()
    }  # columns are permutations: value -> row
    kth = np.empty(len(queries), dtype=np.float32)
    for i, (name, low, high) in enumerate(ranges):
        subset = np.ascontiguousarray(corpus[order[name][low : high + 1]])
        kth[i] = exact_top_k(queries[i : i + 1], subset, K)[1][0, -1]
    return kth


def timed(search: Callable[[int], np.ndarray], kth: np.ndarray) -> tuple[float, float]:
    """Recall@10 and CPU microseconds a query of ``search(i) -> scores``."""
    start = time.process_time_ns()
    answers = [search(i) for i in range(len(kth))]
    microseconds = (time.process_time_ns() - start) / 1000 / len(kth)
    return (
        float(
            np.mean([np.count_nonzero(np.asarray(a) >= t - TIE) / K for a, t in zip(answers, kth)])
        ),
        microseconds,
    )


def _ours(
    index: EntityIndex, queries: np.ndarray, ranges: Ranges, kth: np.ndarray, repeats: int
) -> dict[str, Any]:
    expressions = [f"{name} >= {low} and {name} <= {high}" for name, low, high in ranges]
    plans: dict[str, int] = {}
    runs = []
    for _ in range(repeats):
        index.forget_filters()
        forget_parsed()
        runs.append(timed(lambda i: index.search(queries[i], K, filter=expressions[i]).scores, kth))
    warm = [
        timed(lambda i: index.search(queries[i], K, filter=expressions[0]).scores, kth)[1]
        for _ in range(repeats)
    ]
    for i in range(len(queries)):
        plan = index.search(queries[i], K, filter=expressions[i]).plan
        plans[plan] = plans.get(plan, 0) + 1
    microseconds = float(np.median([r[1] for r in runs]))
    return {
        "recall": round(runs[0][0], 4),
        "us": round(microseconds, 1),
        "qps": round(1e6 / microseconds),
        "qps_repeated_filter": round(1e6 / float(np.median(warm))),
        "plans": plans,
    }


def _qdrant(
    shard: Any, queries: np.ndarray, ranges: Ranges, kth: np.ndarray, repeats: int
) -> dict[str, Any]:
    """qdrant-edge at the smallest ef whose recall reaches 0.95; its fastest honest setting."""
    import qdrant_edge as qdrant

    filters = [
        qdrant.Filter(
            must=[
                qdrant.FieldCondition(
                    name, range=qdrant.RangeFloat(gte=float(low), lte=float(high))
                )
            ]
        )
        for name, low, high in ranges
    ]
    result: dict[str, Any] = {}
    for ef in QDRANT_EFS:
        parameters = qdrant.SearchParams(
            hnsw_ef=ef, quantization=qdrant.QuantizationSearchParams(rescore=True, oversampling=2.0)
        )

        def search(i: int, parameters: Any = parameters) -> np.ndarray:
            request = qdrant.SearchRequest(
                qdrant.Query.Nearest(queries[i].tolist()), K, filter=filters[i], params=parameters
            )
            return np.array([p.score for p in shard.search(request)])

        runs = [timed(search, kth) for _ in range(repeats)]
        microseconds = float(np.median([r[1] for r in runs]))
        result = {
            "recall": round(runs[0][0], 4),
            "us": round(microseconds, 1),
            "qps": round(1e6 / microseconds),
            "ef": ef,
        }
        if runs[0][0] >= 0.95:
            break
    return result


def measure(vectors: VectorSet, queries: int, repeats: int, peer: bool) -> list[dict[str, Any]]:
    """Every selectivity and kind of filter, ours and the peer's in turn."""
    corpus, sample = vectors.corpus, vectors.queries[:queries]
    columns, direction = attributes_of(corpus)
    results = []
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder:
        with stage("build our index (auto)"):
            frame = pl.DataFrame({name: pl.Series(column) for name, column in columns.items()})
            ids = [str(i) for i in range(len(corpus))]
            built = EntityIndex.build(
                "pin",
                ids,
                corpus,
                frame,
                IndexConfig(),
                calibration_queries=vectors.calibration[:2_000],
            )
            built.save(Path(folder) / "pin")
            index = EntityIndex.load(Path(folder) / "pin")
            index.attribute_table.warm()
        shard = None
        if peer:
            with stage("build qdrant-edge (int8, indexed payload)"):
                shard = qdrant_shard(corpus, Path(folder) / "peer", columns)
        for share in SHARES:
            for kind in KINDS:
                ranges = ranges_of(kind, share, corpus, sample, direction)
                kth = truth(corpus, sample, columns, ranges)
                row: dict[str, Any] = {
                    "selectivity": share,
                    "kind": kind,
                    "ours": _ours(index, sample, ranges, kth, repeats),
                }
                if shard is not None:
                    row["qdrant-edge"] = _qdrant(shard, sample, ranges, kth, repeats)
                    row["x_qdrant"] = round(row["ours"]["qps"] / row["qdrant-edge"]["qps"], 2)
                results.append(row)
                say(f"  {share:6.1%} {kind}: {row}")
    return results


@click.command()
@data_option
@click.option("--size", default=100_000, show_default=True, help="Corpus size (10000 to 800000).")
@click.option(
    "--queries", default=500, show_default=True, help="Queries, each with a filter of its own."
)
@click.option(
    "--repeats", default=3, show_default=True, help="Repetitions; the median time counts."
)
@click.option(
    "--peer/--no-peer",
    default=True,
    show_default=True,
    help="Measure qdrant-edge (pip install qdrant-edge-py) on the same filters.",
)
@out_option
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    size: int,
    queries: int,
    repeats: int,
    peer: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Recall@10 and queries/s under filters that pass 50%, 10%, 1% and 0.1% of the rows.

    Each query has a range filter of its own, parsed and evaluated afresh (qdrant-edge gets ready
    filter objects): over a random attribute, or over one that agrees with the query (its nearest
    rows pass) or disagrees (they are what is filtered out). Vectors are real text embeddings; the
    attributes are made up.

    Example:
        omni bench filter --data data --size 100000
    """
    if data_dir is None:
        raise ConfigError(
            "omni bench filter needs the folder that holds large/: give --data or set OMNI_DATA."
        )
    vectors = load_vectors(data_dir, size=size)
    with one_blas_thread():
        results = measure(vectors, queries, repeats, peer)
    write_record(
        f"filter-{vectors.name}",
        Measurement(
            dataset=vectors.describe()
            | {
                "attributes": (
                    "simulated: a random number, and the rank along the first principal direction"
                )
            },
            config={"k": K, "selectivities": SHARES, "kinds": KINDS, "index": "auto"},
            protocol={
                "queries": queries,
                "repeats": repeats,
                "clock": "process CPU time",
                "threads": 1,
                "batch": 1,
                "filters": (
                    "one per query, no two alike; ours from their text (parsed in the timed call),"
                    " qdrant-edge's as objects made before"
                ),
            },
            metrics={"results": results},
            libraries=("qdrant-edge-py",) if peer else (),
        ),
        folder=out,
    )
    if as_json:
        print_json(results)
        return
    rows = [
        [
            f"{r['selectivity']:.1%}",
            r["kind"],
            r["ours"]["recall"],
            r["ours"]["qps"],
            max(r["ours"]["plans"], key=r["ours"]["plans"].get),
            *([r["qdrant-edge"]["recall"], r["qdrant-edge"]["qps"], r["x_qdrant"]] if peer else []),
        ]
        for r in results
    ]
    head = [
        "passes",
        "filter",
        "recall@10",
        "queries/s",
        "plan",
        *(["qdrant recall", "qdrant q/s", "ours / qdrant"] if peer else []),
    ]
    print_table(
        f"{vectors.name}: {len(vectors.corpus):,} real text vectors, simulated attributes,"
        f" {queries} queries",
        head,
        rows,
    )
