"""``omni bench update``: recall and latency with live writes, and a sustained rate.

2% and 10% of real vectors are replaced and as many deleted.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.index.build import SPACE, build_once, bundle_folder, rebuild_config
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
from index_builder.building.inputs import QuerySet
from index_builder.building.plan import RebuildConfig
from index_builder.building.sources import from_release
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex, IndexConfig
from retrieval.server.server import SWITCH_INTERVAL_SECONDS


@dataclass(slots=True)
class Truth:
    """What should be searchable: ids and vectors, kept beside the engine."""

    vectors: dict[str, np.ndarray]

    def arrays(self) -> tuple[list[str], np.ndarray]:
        """Ids and their vectors ``(N, D)``."""
        return list(self.vectors), np.stack(list(self.vectors.values()))


def measure(
    index: EntityIndex, truth: Truth, queries: np.ndarray, repeats: int
) -> dict[str, float]:
    """Return ANN recall@10 against an exact scan, and our call's latency in microseconds."""
    ids, vectors = truth.arrays()
    _, exact = exact_top_k(queries, vectors, 10)
    row_of = {identifier: row for row, identifier in enumerate(ids)}
    recalls = []
    for query, scores in zip(queries, exact):
        answer = index.search(query, 10).ids
        assert len(set(answer)) == len(answer), "an id came twice"
        true_scores = (
            vectors[[row_of[i] for i in answer]] @ query
        )  # KeyError: a deleted id was returned
        recalls.append(np.count_nonzero(true_scores >= scores[-1] - 1e-5) / 10)
    times = np.empty((repeats, len(queries)))
    for repeat in range(repeats):
        for i, query in enumerate(queries):
            start = time.perf_counter_ns()
            index.search(query, 10)
            times[repeat, i] = time.perf_counter_ns() - start
    best = times.min(axis=0) / 1000  # a busy machine only adds
    return {
        "recall_at_10": round(float(np.mean(recalls)), 4),
        "p50_us": round(float(np.percentile(best, 50)), 1),
        "p95_us": round(float(np.percentile(best, 95)), 1),
    }


def churn(
    writer: LiveLogWriter, truth: Truth, spare: np.ndarray, share: float, rng: np.random.Generator
) -> int:
    """Replace ``share`` of the ids and delete another ``share``; returns the last sequence."""
    names = list(truth.vectors)
    count = int(share * len(names))
    chosen = rng.choice(len(names), size=2 * count, replace=False)
    entries = []
    for number, row in enumerate(chosen):
        name = names[int(row)]
        if number < count:
            vector = np.ascontiguousarray(spare[int(rng.integers(len(spare)))])
            entries.append(LiveEntry(id=name, vector=vector, space_id=SPACE))
            truth.vectors[name] = vector
        else:
            entries.append(LiveEntry(id=name))
            del truth.vectors[name]
    last = writer.sequence
    for start in range(0, len(entries), 1000):
        last = writer.write(entries[start : start + 1000])
    return last


class _Watch:
    """Times how soon acknowledged writes are visible, without holding up their writer."""

    def __init__(self, follower: LiveFollower) -> None:
        self.lags: list[float] = []
        self._follower = follower
        self._acknowledged: deque[tuple[int, float]] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def acknowledged(self, sequence: int) -> None:
        """Note that writes up to ``sequence`` were acknowledged just now."""
        self._acknowledged.append((sequence, time.perf_counter()))

    def finish(self) -> None:
        """Wait until all of them are visible.

        Raises:
            AssertionError: They were not within 10 s.
        """
        self._ended.set()
        self._thread.join(10.0)
        assert not self._acknowledged, "not visible after 10 s"

    def _run(self) -> None:
        while self._acknowledged or not self._ended.is_set():
            visible = self._follower.view("pin").sequence
            now = time.perf_counter()
            while self._acknowledged and self._acknowledged[0][0] <= visible:
                self.lags.append(now - self._acknowledged.popleft()[1])
            time.sleep(0.002)


def sustained(
    store: ReleaseStore,
    index: EntityIndex,
    follower: LiveFollower,
    spare: np.ndarray,
    rate: int,
    seconds: float,
) -> dict[str, Any]:
    """Upsert at ``rate`` a second while another thread searches; time how soon writes are visible.

    One writer sends 25 requests a second, each acknowledged on disk.
    """
    writer = LiveLogWriter(store.live_root, "pin", int(spare.shape[1]))
    searches, stop = [0], threading.Event()

    def search() -> None:
        number = 0
        while not stop.is_set():
            index.search(spare[number % len(spare)], 10)
            number += 1
        searches[0] = number

    thread = threading.Thread(target=search)
    thread.start()
    watch = _Watch(follower)
    group = max(1, rate // 25)
    started, written, late = time.perf_counter(), 0, 0
    acknowledge = []
    while (now := time.perf_counter() - started) < seconds:
        due = written / rate
        if now < due:
            time.sleep(due - now)
        elif now > due + 1.0:
            late += 1
        entries = [
            LiveEntry(
                id=f"live-{written + i}",
                vector=np.ascontiguousarray(spare[(written + i) % len(spare)]),
                space_id=SPACE,
            )
            for i in range(group)
        ]
        before = time.perf_counter()
        last = writer.write(entries)
        acknowledge.append(time.perf_counter() - before)
        watch.acknowledged(last)
        written += group
    elapsed = time.perf_counter() - started
    stop.set()
    thread.join()
    watch.finish()
    writer.close()
    return {
        "wanted_per_second": rate,
        "entries_per_write": group,
        "upserts_per_second": round(written / elapsed, 1),
        "seconds": round(elapsed, 1),
        "groups_more_than_1s_late": late,
        "searches_per_second_meanwhile": round(searches[0] / elapsed, 1),
        "acknowledge_p50_ms": round(float(np.percentile(acknowledge, 50)) * 1000, 2),
        "acknowledge_p99_ms": round(float(np.percentile(acknowledge, 99)) * 1000, 2),
        "visible_after_p50_ms": round(float(np.percentile(watch.lags, 50)) * 1000, 1),
        "visible_after_p99_ms": round(float(np.percentile(watch.lags, 99)) * 1000, 1),
        "visible_after_max_ms": round(float(np.max(watch.lags)) * 1000, 1),
    }


def _row(
    name: str,
    follower: LiveFollower,
    index: EntityIndex,
    truth: Truth,
    queries: np.ndarray,
    repeats: int,
) -> dict[str, Any]:
    follower.catch_up()
    follower.settle()
    view = follower.view("pin")
    row = {
        "state": name,
        "live": view.live_count,
        "hidden": view.hidden_count,
        "segments": len(view.segments),
    }
    row |= measure(index, truth, queries, repeats)
    say(f"{row}")
    return row


@click.command()
@data_option
@click.option(
    "--size", type=int, default=100_000, show_default=True, help="Vectors of the base (256-d)."
)
@click.option("--index", "kind", default="auto", show_default=True, help="Kind of the base index.")
@click.option(
    "--queries",
    "query_count",
    type=int,
    default=1000,
    show_default=True,
    help="Held-out queries reported on.",
)
@click.option(
    "--repeats",
    type=int,
    default=3,
    show_default=True,
    help="Times each query is timed; the fastest counts.",
)
@click.option(
    "--rate", type=int, default=10_000, show_default=True, help="Upserts a second wanted."
)
@click.option(
    "--seconds", type=float, default=20.0, show_default=True, help="How long the rate is sustained."
)
@click.option("--no-record", is_flag=True, help="Print only; write no record.")
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    size: int,
    kind: str,
    query_count: int,
    repeats: int,
    rate: int,
    seconds: float,
    no_record: bool,
    as_json: bool,
) -> None:
    """Replace and delete 2%, then 10% of the entities live; measure recall@10 and p50; rebuild.

    Then sustain 10,000 upserts a second.

    Example: omni bench update --data data --size 100000
    """
    if data_dir is None:
        raise ConfigError("this benchmark needs --data (or OMNI_DATA): a folder that holds large/")
    vectors = load_vectors(data_dir, size=int(size * 1.2))
    base_rows = min(size, int(len(vectors.corpus) / 1.15))
    base = replace(vectors, corpus=vectors.corpus[:base_rows], rows=vectors.rows[:base_rows])
    spare, queries = vectors.corpus[base_rows:], np.ascontiguousarray(vectors.queries[:query_count])
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = bundle_folder(root / "bundle", int(base.corpus.shape[1]))
        store = ReleaseStore(root / "store")
        build_once(store, bundle, base.corpus, base.calibration, rebuild_config(kind, 2))
        for share in (0.02, 0.10):
            truth = Truth({f"text-{i}": base.corpus[i] for i in range(base_rows)})
            release = store.open(store.ids()[0])
            follower = LiveFollower(store, release)
            index = release.entity("pin")
            before = _row(f"release ({index.kind})", follower, index, truth, queries, repeats)
            with LiveLogWriter(store.live_root, "pin", int(base.corpus.shape[1])) as writer:
                churn(writer, truth, spare, share, rng)
            after = _row(
                f"{share:.0%} replaced, {share:.0%} deleted",
                follower,
                index,
                truth,
                queries,
                repeats,
            )
            store.activate(release.release_id, verify=False)
            inputs, path = from_release(store, ())
            calibration = {"*": QuerySet([""] * len(base.calibration), base.calibration)}
            config = RebuildConfig(
                index=IndexConfig(kind=kind, ann=AnnConfig(threads=2)), min_recall=0.9
            )
            rebuilt_id = build_release(inputs, path, store, config, calibration)
            rebuilt = store.open(rebuilt_id)
            fresh = LiveFollower(store, rebuilt)
            again = _row("rebuilt", fresh, rebuilt.entity("pin"), truth, queries, repeats)
            for row in (before, after, again):
                row["recall_change"] = round(row["recall_at_10"] - before["recall_at_10"], 4)
                row["p50_ratio"] = round(row["p50_us"] / before["p50_us"], 3)
            rows += [before, after, again]
            for one, other in ((follower, release), (fresh, rebuilt)):
                one.stop()
                other.close()
            for path in (store.live_root / "pin").iterdir():
                path.unlink()
        release = store.open(store.ids()[0])
        follower = LiveFollower(store, release).start()
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)  # as a server does
        rate_result = sustained(store, release.entity("pin"), follower, spare, rate, seconds)
        follower.stop()
        release.close()
    metrics = {"states": rows, "sustained": rate_result}
    if not no_record:
        write_record(
            f"update-{base_rows // 1000}k" + ("" if kind == "auto" else f"-{kind}"),
            Measurement(
                dataset={
                    **base.describe(),
                    "replacements": "vectors of other real texts, not in the base",
                },
                config={"index": kind, "queries": query_count, "rate": rate, "seconds": seconds},
                protocol={
                    "latency": (
                        "our own call, one thread, fastest of the repeats per query, median over"
                        " queries"
                    ),
                    "repeats": repeats,
                    "recall": "against an exact scan of the state as it should be",
                },
                metrics=metrics,
                libraries=("hnswlib", "rabitqlib", "numpy"),
            ),
        )
    if as_json:
        print_json(metrics)
        return
    columns = (
        "state",
        "live",
        "hidden",
        "segments",
        "recall_at_10",
        "recall_change",
        "p50_us",
        "p50_ratio",
    )
    print_table(
        f"live writes over {base_rows:,} real text vectors (WordLlama)",
        columns,
        [[row[c] for c in columns] for row in rows],
    )
    print_table(
        "sustained upserts while searching",
        ("what", "value"),
        [(name, str(value)) for name, value in rate_result.items()],
    )
