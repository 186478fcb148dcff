"""``omni bench words``: time, size and exactness of the index of words on real texts.

The texts are the distinct query strings, titles and descriptions of the larger data; the queries
are of the dev half of its held-out pairs, which are among no texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl

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
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.datasets.halves import DEV
from index_builder.lexical.lexical_index import LexicalHits, LexicalIndex
from index_builder.lexical.scan import BUDGET, ScanRequest

TOP = 100
FILTER_SHARE = 0.1


def texts_of(dataset: Dataset, limit: int | None) -> list[str]:
    """Return distinct query strings of train pairs, titles and descriptions, at most ``limit``."""
    columns = [dataset.split("train")["query"]]
    columns += [
        dataset.catalogue[name]
        for name in ("title", "description")
        if name in dataset.catalogue.columns
    ]
    texts = pl.concat([column.rename("text") for column in columns]).drop_nulls()
    distinct = texts.unique(maintain_order=True).to_list()
    if limit is None or limit >= len(distinct):
        return distinct
    chosen = np.sort(np.random.default_rng(0).permutation(len(distinct))[:limit])
    return [distinct[number] for number in chosen.tolist()]


def times_of(search: Callable[[str], LexicalHits], queries: Sequence[str]) -> dict[str, Any]:
    """Measure CPU microseconds a query and return the hits, after a warm-up of 50 queries."""
    for query in queries[:50]:
        search(query)
    times, hits = [], []
    for query in queries:
        start = time.process_time_ns()
        hits.append(search(query))
        times.append((time.process_time_ns() - start) / 1e3)
    p50, p99 = np.quantile(times, [0.5, 0.99]).round(1).tolist()
    return {"p50_us": p50, "p99_us": p99, "hits": hits}


def overlap_at_10(hits: Sequence[LexicalHits], exact: Sequence[LexicalHits]) -> float:
    """Return which share of the exact ten best is found; a row that ties with the tenth counts."""
    shared = wanted = 0
    for found, best in zip(hits, exact, strict=True):
        if not len(best.scores):
            continue
        least = best.scores[:10][-1]
        shared += int(np.count_nonzero(found.scores[:10] >= least))
        wanted += len(best.scores[:10])
    return shared / max(1, wanted)


def measure(texts: Sequence[str], queries: Sequence[str]) -> dict[str, Any]:
    """Build the index and ask it."""
    with stage(f"index the words of {len(texts):,} texts"):
        start = time.process_time()
        index = LexicalIndex.build({"title": texts}, len(texts))
        build_seconds = time.process_time() - start
    allowed = np.random.default_rng(3).random(len(texts)) < FILTER_SHARE
    prepared = {query: index.query(query) for query in queries}
    plain, every = ScanRequest(k=TOP), ScanRequest(k=TOP, budget=0)
    masked = ScanRequest(k=TOP, allowed=allowed)
    with stage(f"ask {len(queries):,} queries in four ways"):
        ways = {
            "query to terms": times_of(lambda q: index.search(index.query(q), plain), queries),
            "ready terms": times_of(lambda q: index.search(prepared[q], plain), queries),
            "ready terms, exact": times_of(lambda q: index.search(prepared[q], every), queries),
            "ready terms, filter of 10%": times_of(
                lambda q: index.search(prepared[q], masked), queries
            ),
        }
    hits, exact = ways["ready terms"]["hits"], ways["ready terms, exact"]["hits"]
    postings = index.postings
    size = sum(getattr(postings, name).nbytes for name in postings.lengths())
    return {
        "texts": len(texts),
        "terms": len(postings.keys),
        "postings_per_text": round(len(postings.rows) / len(texts), 1),
        "bytes_per_text": round(size / len(texts), 1),
        "build_cpu_seconds": round(build_seconds, 1),
        "overlap_at_10": round(overlap_at_10(hits, exact), 4),
        "proved_exact": round(float(np.mean([found.is_exact for found in hits])), 4),
        "times": {
            name: {key: value for key, value in way.items() if key != "hits"}
            for name, way in ways.items()
        },
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--texts", "limit", type=click.IntRange(100), help="At most this many. [default: all]"
)
@click.option("--queries", "asked", default=2_000, show_default=True, type=click.IntRange(10))
@click.option("--name", default="words", show_default=True, help="Slug of the record.")
@out_option
@data_option
@json_option
@handle_errors
def command(
    limit: int | None, asked: int, name: str, out: Path, data_dir: Path | None, as_json: bool
) -> None:
    """CPU time a query, bytes a text and overlap with exact BM25 of the index of words.

    Example: omni bench words --data data --texts 75000
    """
    dataset = load_dataset(data_dir, engaged_queries=0)
    texts = texts_of(dataset, limit)
    heldout = dataset.split(DEV)["query"].unique(maintain_order=True)
    queries = heldout.sample(min(asked, len(heldout)), seed=1).to_list()
    found = measure(texts, queries)
    path = write_record(
        name,
        Measurement(
            dataset={"name": dataset.name, "real": True, "texts": len(texts)},
            config={"budget": BUDGET, "top": TOP, "filter": FILTER_SHARE},
            protocol={"clock": "process CPU time, one query at a time", "queries": len(queries)},
            metrics=found,
            libraries=("numpy",),
        ),
        folder=out,
    )
    if as_json:
        print_json(found)
        return
    print_table(
        f"CPU time a query, top {TOP} of {len(texts):,} texts",
        ["", "p50 us", "p99 us"],
        [[way, times["p50_us"], times["p99_us"]] for way, times in found["times"].items()],
    )
    say(
        f"{found['bytes_per_text']} bytes a text, {found['postings_per_text']} postings;"
        f" overlap@10 with exact {found['overlap_at_10']}, proved exact {found['proved_exact']}"
    )
    say(f"record: {path.name}")
