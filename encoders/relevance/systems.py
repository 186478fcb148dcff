"""Ask the systems that a sample compares: bundles, baselines, and results that were stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from encoders.datasets.dataset import Dataset
from encoders.datasets.halves import rows_of_split
from encoders.errors import ConfigError, DataError
from encoders.evaluation.baselines import Baseline
from encoders.evaluation.ranking import SCORES_AT_ONCE, EvaluationTask
from encoders.exact_search import top_k_of_scores
from encoders.relevance.sample import (
    Sample,
    SampleSettings,
    draw_queries,
    make_items,
)
from encoders.tables.files import read_whole_table

System = Baseline | pl.DataFrame
"""What ranks a catalogue, or stored results ``query, entity_id, rank``."""
NO_PAIRS = {"query_index": pl.Int64, "target": pl.Int64}
NOTHING = np.zeros(0, dtype=np.int64)


def query_population(dataset: Dataset, entity_type: str, split: str) -> pl.DataFrame:
    """Count the queries of a split's pairs; ``query, language, count``.

    Raises:
        ConfigError: There are none.
    """
    pairs = rows_of_split(dataset.pairs, split).filter(pl.col("entity_type") == entity_type)
    if pairs.is_empty():
        raise ConfigError(
            f"data set {dataset.name!r} has no {split!r} pairs of type {entity_type!r} whose"
            " queries could be drawn. Give queries with --queries."
        )
    return pairs.group_by("query").agg(pl.col("language").first(), pl.col("count").sum())


def read_results(path: Path) -> pl.DataFrame:
    """Read stored results; ``query, entity_id, rank``, rank from 1.

    Raises:
        DataError: A column is missing, or a rank is no whole number.
    """
    rows = read_whole_table(path)
    wanted = ["query", "entity_id", "rank"]
    missing = [name for name in wanted if name not in rows.columns]
    if missing:
        raise DataError(
            f"{path}: expected the columns query, entity_id and rank, but {', '.join(missing)}"
            " is missing."
        )
    rank = pl.col("rank").cast(pl.Int64, strict=False)
    rows = rows.select(pl.col("query", "entity_id").cast(pl.String), rank)
    bad = rows.filter(pl.any_horizontal(pl.all().is_null()) | (pl.col("rank") < 1))
    if bad.height:
        raise DataError(
            f"{path}: {bad.height:,} rows lack a query, an entity_id or a rank from 1, e.g."
            f" {bad.row(0)}."
        )
    return rows.sort("query", "rank").unique(["query", "entity_id"], maintain_order=True)


def draw_sample(
    path: Path,
    dataset: Dataset,
    systems: dict[str, System],
    population: pl.DataFrame,
    settings: SampleSettings,
) -> Sample:
    """Draw queries and gather the first results of every system.

    Args:
        path: Folder of the sample, to be written.
        dataset: Catalogue that the systems search.
        systems: At least two, by name.
        population: ``query, language, count`` that queries are drawn from.
        settings: How much is drawn.

    Raises:
        ConfigError: Fewer than two systems.
    """
    if len(systems) < 2:
        raise ConfigError(
            f"a sample compares two systems or more, but got {len(systems)}. Example: omni judge"
            " sample MODEL bm25 --out judged"
        )
    queries = draw_queries(population, settings)
    results = pl.concat(
        [
            first_results(system, dataset, queries["query"].to_list(), settings).with_columns(
                pl.lit(name).alias("system")
            )
            for name, system in systems.items()
        ]
    )
    if results.is_empty():
        raise DataError("no system returned anything for the drawn queries. Draw others (--seed).")
    with_language = results.join(queries.select("query", "language"), on="query")
    about = {
        "entity_type": settings.entity_type,
        "k": settings.k,
        "seed": settings.seed,
        "systems": list(systems),
        "dataset": dataset.name,
        "label": dataset.label,
        "population": population.height,
    }
    items = make_items(with_language, dataset, settings)
    columns = ["system", "query", "entity_id", "rank"]
    return Sample(path, about, queries, items, results.select(columns))


def first_results(
    system: System, dataset: Dataset, queries: Sequence[str], settings: SampleSettings
) -> pl.DataFrame:
    """Return the first ``k`` results of each query; ``query, entity_id, rank``."""
    if isinstance(system, pl.DataFrame):
        stored = system.filter(pl.col("query").is_in(list(queries))).sort("query", "rank")
        place = (pl.int_range(pl.len()) + 1).over("query")
        return stored.with_columns(rank=place).filter(pl.col("rank") <= settings.k)
    candidates = dataset.of_type(settings.entity_type)
    task = EvaluationTask(
        entity_type=settings.entity_type,
        candidates=candidates,
        queries=list(queries),
        pairs=pl.DataFrame(schema=NO_PAIRS),
        targets=pl.DataFrame(schema=NO_PAIRS),
        members=(NOTHING, NOTHING),
        in_corpus=np.ones(candidates.height, dtype=np.bool_),
        corpus_description=f"all {candidates.height:,}",
    )
    score = system(task, dataset)
    ids = candidates["id"].to_list()
    block = max(1, SCORES_AT_ONCE // max(1, len(ids)))
    found: list[tuple[str, str, int]] = []
    for start in range(0, len(queries), block):
        stop = min(start + block, len(queries))
        rows, scores = top_k_of_scores(score(start, stop), min(settings.k, len(ids)))
        for query, row, row_scores in zip(queries[start:stop], rows, scores, strict=True):
            kept = row[(row >= 0) & np.isfinite(row_scores)].tolist()
            found += [(query, ids[r], rank) for rank, r in enumerate(kept, start=1)]
    schema = {"query": pl.String, "entity_id": pl.String, "rank": pl.Int64}
    return pl.DataFrame(found, schema=schema, orient="row")
