"""``omni bench ann``: queries/s at equal ANN recall@10: ours, the bare libraries, the peers.

Side by side on one core.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.index.engines import ENGINES, Engine, installed, one_blas_thread
from benchmarks.index.plot import draw_costs
from benchmarks.index.prefix import PREFIX_ENGINES
from benchmarks.index.vectors import VectorSet, default_cache, load_vectors
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
from encoders.errors import ConfigError, OmniError
from encoders.exact_search import exact_top_k
from index_builder.search.calibration import recall_per_query

BASELINE = "hnswlib f32"
ALL_ENGINES = ENGINES | PREFIX_ENGINES
LEVELS = (0.95, 0.98)


Curve = list[tuple[int, float, float]]
"""``(ef, recall@10, CPU microseconds a query)``."""


def _memory_mb() -> dict[str, float]:
    """Return private memory of this process and mapped files that processes share."""
    text = Path("/proc/self/smaps_rollup").read_text()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return {"private_mb": kb["Anonymous"] / 1e3, "mapped_mb": (kb["Rss"] - kb["Anonymous"]) / 1e3}


def sweep(engine: Engine, vectors: VectorSet, scores: np.ndarray, queries: int) -> Curve:
    """Return (ef, recall@10, CPU us a query) over the engine's grid until recall passes 0.99."""
    points = []
    sample = vectors.queries[:queries]
    rows = [sample[i : i + 1] for i in range(len(sample))]
    for ef in engine.grid:
        start = time.process_time_ns()
        answers = [engine.search(query, ef) for query in rows]
        microseconds = (time.process_time_ns() - start) / 1000 / len(rows)
        recall = float(
            recall_per_query(
                [engine.rows(a) for a in answers], sample, vectors.corpus, scores[: len(rows)]
            ).mean()
        )
        points.append((ef, recall, microseconds))
        if recall > 0.99:
            break
    return points


def at_recall(points: Curve, level: float) -> float | None:
    """Interpolate CPU microseconds a query at a recall; None if no setting reaches it."""
    for i, (_, recall, microseconds) in enumerate(points):
        if recall >= level:
            if i == 0:
                return microseconds
            _, before, cheaper = points[i - 1]
            share = (level - before) / max(recall - before, 1e-9)
            return cheaper + share * (microseconds - cheaper)
    return None


def built(name: str, vectors: VectorSet, built_folder: Path) -> dict[str, float]:
    """Build an engine in its own process, unless its files exist, and load it in another.

    Returns:
        ``build_cpu_s``, and of the process that loaded it and answered 200 queries: ``private_mb``
        and ``mapped_mb`` more than before.

    Raises:
        ConfigError: A process failed; with the end of what it said.
    """
    folder = _kept(name, vectors, built_folder)
    facts = folder / "build.json"
    known: dict[str, float] = json.loads(facts.read_text()) if facts.is_file() else {}
    if "private_mb" in known:
        return known
    if not known:
        shutil.rmtree(folder, ignore_errors=True)  # left by a build that did not end
        folder.mkdir(parents=True)
    np.save(folder / "corpus.npy", vectors.corpus)
    np.save(folder / "queries.npy", vectors.queries[:200])
    np.save(
        folder / "calibration.npy", vectors.calibration[:1_000]
    )  # disjoint from the queries reported on
    for step in ("build_here", "load_here")[bool(known) :]:
        code = f"import sys; from benchmarks.index.ann import {step}; {step}(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(f"{name}: {step} failed: {done.stderr.strip()[-300:]}")
    (folder / "corpus.npy").unlink()
    known = json.loads(facts.read_text())
    return known


def _kept(name: str, vectors: VectorSet, built_folder: Path) -> Path:
    """Where an engine's files are kept; Bump its version when auto's choice changes."""
    chosen = "-calibrated" if name == "ours auto" else ""
    return built_folder / vectors.name / (name.replace(" ", "-") + chosen)


def build_here(name: str, folder: str) -> None:
    """Build one engine over its folder's ``corpus.npy`` and note CPU seconds."""
    corpus = np.load(Path(folder) / "corpus.npy")
    start = time.process_time()
    ALL_ENGINES[name][0](corpus, Path(folder))
    (Path(folder) / "build.json").write_text(
        json.dumps({"build_cpu_s": round(time.process_time() - start, 1)})
    )


def load_here(name: str, folder: str) -> None:
    """Load one engine, answer some queries and note memory (a process of ``built``)."""
    corpus, queries = (
        np.load(Path(folder) / "corpus.npy", mmap_mode="r"),
        np.load(Path(folder) / "queries.npy"),
    )
    facts = Path(folder) / "build.json"
    before = _memory_mb()
    engine = ALL_ENGINES[name][0](corpus, Path(folder))
    for i in range(len(queries)):
        engine.search(queries[i : i + 1], 64)
    memory = {key: round(value - before[key], 1) for key, value in _memory_mb().items()}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | memory))


def measure(
    names: list[str], vectors: VectorSet, queries: int, repeats: int, built_folder: Path
) -> list[dict[str, Any]]:
    """Build and load every engine, then sweep them in turn ``repeats`` times beside hnswlib."""
    _, scores = exact_top_k(vectors.queries[:queries], vectors.corpus, 10)
    results: list[dict[str, Any]] = []
    baseline: Engine | None = None
    for name in names:
        try:
            with stage(f"{vectors.name}: build {name}"):
                facts = built(name, vectors, built_folder)
            with stage(f"{vectors.name}: load {name}"):
                engine = ALL_ENGINES[name][0](vectors.corpus, _kept(name, vectors, built_folder))
        except (
            OmniError,
            RuntimeError,
            ValueError,
            ImportError,
            TypeError,
            AttributeError,
        ) as error:
            say(f"{name}: {error}")
            results.append({"engine": name, "failed": str(error)[:200]})
            continue
        baseline = baseline or engine
        curves, references = [], []
        for _ in range(repeats):
            with one_blas_thread():
                references.append(sweep(baseline, vectors, scores, queries))
                curves.append(
                    sweep(engine, vectors, scores, queries)
                    if engine is not baseline
                    else references[-1]
                )
        kept = _kept(name, vectors, built_folder) / "index.json"
        chosen = {"kind": json.loads(kept.read_text())["facts"]["kind"]} if kept.is_file() else {}
        results.append(_row(name, curves, references) | chosen | facts)
        say(f"  {name}: {results[-1]['us@0.95']} us at 0.95, {results[-1]['x_hnswlib@0.95']}x")
    return results


def _row(name: str, curves: list[Curve], references: list[Curve]) -> dict[str, Any]:
    """Times at each recall, medians over the sweeps, next to hnswlib's in the same minutes."""
    row: dict[str, Any] = {"engine": name, "points": curves}
    for level in LEVELS:
        mine = [t for t in (at_recall(c, level) for c in curves) if t]
        theirs = [t for t in (at_recall(c, level) for c in references) if t]
        row[f"us@{level}"] = round(float(np.median(mine)), 1) if mine else None
        row[f"qps@{level}"] = round(1e6 / float(np.median(mine))) if mine else None
        row[f"x_hnswlib@{level}"] = (
            round(float(np.median(theirs) / np.median(mine)), 2) if mine and theirs else None
        )
    row["max_recall"] = round(max(p[1] for c in curves for p in c), 4)
    return row


def _overhead(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the microseconds our call adds to the bare one at equal ef: a median.

    Over settings and repeats.
    """
    by_name = {r["engine"]: r for r in results if "points" in r}
    added = {}
    pairs_of_names = [
        (name, f"bare {row['kind']}") for name, row in by_name.items() if "kind" in row
    ] + [("ours hnsw", BASELINE)]
    for mine, theirs in pairs_of_names:
        if mine in by_name and theirs in by_name:
            both = zip(by_name[mine]["points"], by_name[theirs]["points"])
            pairs = [a[2] - b[2] for c, d in both for a, b in zip(c, d) if a[0] == b[0]]
            added[f"{mine} - {theirs}"] = round(float(np.median(pairs)), 1)
    return added


@click.command()
@data_option
@click.option(
    "--sizes",
    default="100000",
    show_default=True,
    help="Corpus sizes, separated by commas (10000 to 800000).",
)
@click.option(
    "--distributions",
    default="in,out",
    show_default=True,
    help="in: held-out strings. out: languages the corpus lacks.",
)
@click.option(
    "--engines",
    default="",
    help=(
        "Names separated by commas; all installed ones by default. Known:"
        f" {', '.join(ALL_ENGINES)}."
    ),
)
@click.option(
    "--vectors",
    "tower",
    help=(
        "A model bundle, or tiny-multilingual: its query tower makes the vectors instead of"
        " WordLlama."
    ),
)
@click.option("--queries", default=2000, show_default=True, help="Queries reported on.")
@click.option("--repeats", default=3, show_default=True, help="Sweeps of every engine.")
@click.option(
    "--built",
    "built_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help=(
        "Where built engines are kept, so that a second run only loads them; in the cache folder by"
        " default."
    ),
)
@out_option
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    sizes: str,
    distributions: str,
    engines: str,
    tower: str | None,
    queries: int,
    repeats: int,
    built_folder: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Queries/s at ANN recall@10 of 0.95 and 0.98, one query a call, one thread, CPU time.

    Vectors are WordLlama embeddings of the real texts of the `large` data set (pip install
    wordllama==0.4.0.post1). Times are CPU time of the process; hnswlib float32 (M=16,
    ef_construction=200) is swept before each engine. Memory is that of a process of its own which
    loads the engine and answers 200 queries. Records of several sizes in the same folder make the
    picture ann-cost.png.

    Example:
        omni bench ann --data data --sizes 100000,800000 --engines "hnswlib f32,ours auto,bare
        symqg,zvec int8"
    """
    if data_dir is None:
        raise ConfigError(
            "omni bench ann needs the folder that holds large/: give --data or set OMNI_DATA."
        )
    names = [n.strip() for n in engines.split(",") if n.strip()] or [
        n for n in ENGINES if installed(n)
    ]
    unknown = [n for n in names if n not in ALL_ENGINES]
    if unknown:
        raise ConfigError(f"unknown engines {unknown}; known are {', '.join(ALL_ENGINES)}.")
    names = [BASELINE, *[n for n in names if n != BASELINE]]
    everything = {}
    for size in [int(s) for s in sizes.split(",")]:
        for distribution in distributions.split(","):
            vectors = load_vectors(
                data_dir, size=size, distribution=distribution.strip(), tower=tower
            )
            results = measure(
                names, vectors, queries, repeats, built_folder or default_cache() / "ann"
            )
            everything[vectors.name] = {
                "dataset": vectors.describe(),
                "results": results,
                "added_us": _overhead(results),
            }
            libraries = tuple(str(ALL_ENGINES[n][1]) for n in names if ALL_ENGINES[n][1])
            write_record(
                f"ann-{vectors.name}",
                Measurement(
                    dataset=vectors.describe(),
                    config={
                        "engines": names,
                        "m": 16,
                        "ef_construction": 200,
                        "degree": 32,
                        "k": 10,
                    },
                    protocol={
                        "queries": queries,
                        "repeats": repeats,
                        "clock": "process CPU time",
                        "threads": 1,
                        "batch": 1,
                    },
                    metrics={"results": results, "added_us": everything[vectors.name]["added_us"]},
                    libraries=tuple(dict.fromkeys(libraries)),
                ),
                folder=out,
            )
            if not as_json:
                columns = (
                    "qps@0.95",
                    "qps@0.98",
                    "x_hnswlib@0.95",
                    "x_hnswlib@0.98",
                    "max_recall",
                    "build_cpu_s",
                    "private_mb",
                    "mapped_mb",
                )
                print_table(
                    f"{vectors.name}: {len(vectors.corpus):,} real text vectors x"
                    f" {vectors.corpus.shape[1]}, {queries:,} queries",
                    ("engine", *columns),
                    [
                        [
                            r["engine"],
                            *[
                                r.get(c, r.get("failed") if c == "qps@0.95" else None)
                                for c in columns
                            ],
                        ]
                        for r in results
                    ],
                )
                say(f"microseconds our call adds: {everything[vectors.name]['added_us']}")
    picture = draw_costs(out)
    if picture is not None:
        say(f"cost by corpus size: {picture.name}")
    if as_json:
        print_json(everything)
