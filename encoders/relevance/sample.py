"""Draw what is judged: queries by stratum, and the results of several systems without their names.

A sample is a folder. ``items.jsonl`` is all that judges need; ``results.jsonl`` says which system
returned what, and only the report reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from encoders.datasets.dataset import Dataset
from encoders.errors import ConfigError, DataError
from encoders.evaluation.slices import POPULARITY_SHARES
from encoders.file_modes import follow_umask
from encoders.tables.files import write_table
from encoders.text.entity_texts import entity_texts

POPULARITIES = ("head", "torso", "tail")
GRADES = ("not relevant", "partly relevant", "relevant", "exactly right")
"""What a grade means, by its number."""
MAX_GRADE = len(GRADES) - 1
SHOWN_FIELDS = ("description", "category", "brand", "board_titles")
"""Fields that judges see beside the title; engaged queries would tell what is annotated."""
_SAMPLE = "sample.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How much is drawn."""

    entity_type: str
    queries: int = 100
    """Queries to draw; all, if there are no more."""
    k: int = 10
    """First results of each system that are judged."""
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """A drawn sample, read from its folder."""

    path: Path
    about: dict[str, Any]
    """``entity_type``, ``k``, ``seed``, ``systems``, ``dataset``, ``label`` and ``strata``."""
    queries: pl.DataFrame
    """``query, language, popularity, weight``: a query stands for ``weight`` of its stratum."""
    items: pl.DataFrame
    """``item, query, language, entity_type, entity_id, title, text, image``, in judging order."""
    results: pl.DataFrame
    """``system, query, entity_id, rank``, rank from 1."""


def draw_queries(population: pl.DataFrame, settings: SampleSettings) -> pl.DataFrame:
    """Draw queries by popularity and language, as evenly as the strata allow.

    Head is the tenth of queries with the highest counts, torso the next four tenths, tail the rest.
    Each gets a third of the places; within it languages take turns.

    Args:
        population: Distinct ``query`` with ``language`` and ``count``.
        settings: How many, and the seed.

    Returns:
        ``query, language, popularity, weight`` (queries of its stratum per drawn one).
    """
    rng = np.random.default_rng(settings.seed)
    head, torso = POPULARITY_SHARES
    place = pl.int_range(pl.len()) / pl.len()
    popularity = (
        pl.when(place < head)
        .then(pl.lit("head"))
        .when(place < torso)
        .then(pl.lit("torso"))
        .otherwise(pl.lit("tail"))
    )
    rows = (
        population.sort(["count", "query"], descending=[True, False])
        .with_columns(popularity=popularity)
        .with_columns(lot=pl.Series(rng.permutation(population.height)))
        .sort("lot")
        .with_columns(turn=pl.int_range(pl.len()).over("popularity", "language"))
        .sort("popularity", "turn", "lot")
    )
    places = _places({p: rows.filter(popularity=p).height for p in POPULARITIES}, settings.queries)
    stratum = ["popularity", "language"]
    sizes = rows.group_by(stratum).agg(size=pl.len())
    drawn = pl.concat([rows.filter(popularity=p).head(n) for p, n in places.items()])
    taken = drawn.group_by(stratum).agg(taken=pl.len())
    return (
        drawn.join(sizes, on=stratum, maintain_order="left")
        .join(taken, on=stratum, maintain_order="left")
        .select("query", *reversed(stratum), weight=pl.col("size") / pl.col("taken"))
    )


def _places(sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Share places out evenly; what a small stratum cannot fill goes to the others."""
    places = dict.fromkeys(sizes, 0)
    left = min(wanted, sum(sizes.values()))
    while left:
        for name in [name for name, size in sizes.items() if places[name] < size][:left]:
            places[name] += 1
            left -= 1
    return places


def make_items(results: pl.DataFrame, dataset: Dataset, settings: SampleSettings) -> pl.DataFrame:
    """Join what systems returned to one list without their names, in an order that tells nothing.

    Results of one query stand together, so that a judge reads it once.

    Raises:
        DataError: A result is not in the catalogue.
    """
    rng = np.random.default_rng([settings.seed, 1])
    pooled = results.select("query", "language", "entity_id").unique(["query", "entity_id"])
    pooled = pooled.sort("query", "entity_id")
    queries = pooled["query"].unique(maintain_order=True)
    order = pl.DataFrame({"query": queries, "turn": rng.permutation(len(queries))})
    catalogue = dataset.of_type(settings.entity_type)
    absent = [n for n in ("title", "image") if n not in catalogue.columns]
    shown = catalogue.with_columns(pl.lit("").alias(n) for n in absent).select(
        pl.col("id").alias("entity_id"),
        pl.col("title").fill_null(""),
        pl.col("image").fill_null(""),
        text=pl.Series(entity_texts(catalogue, SHOWN_FIELDS), dtype=pl.String),
    )
    joined = (
        pooled.with_columns(lot=pl.Series(rng.permutation(pooled.height)))
        .join(order, on="query")
        .join(shown, on="entity_id", how="left")
        .sort("turn", "lot")
    )
    unknown = joined.filter(pl.col("title").is_null())
    if unknown.height:
        raise DataError(
            f"{unknown.height:,} results are no {settings.entity_type} of the catalogue, e.g."
            f" {unknown['entity_id'][0]!r}. Give the catalogue that the systems searched with"
            " --data."
        )
    return joined.select(
        pl.int_range(1, pl.len() + 1).alias("item"),
        "query",
        "language",
        pl.lit(settings.entity_type).alias("entity_type"),
        "entity_id",
        "title",
        "text",
        "image",
    )


def write_sample(sample: Sample, pictures: Mapping[str, str]) -> None:
    """Write a sample into its folder, which appears when it is whole.

    Args:
        sample: What was drawn; ``path`` must not hold one already.
        pictures: Entity id -> SVG, where there are any.

    Raises:
        ConfigError: The folder exists.
    """
    refuse_existing(sample.path)
    sample.path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{sample.path.name}-", dir=sample.path.parent))
    try:
        for name in ("queries", "items", "results"):
            write_table(getattr(sample, name), staging / f"{name}.jsonl")
        (staging / "grades").mkdir()
        (staging / "pictures").mkdir()
        for item, entity_id in sample.items.select("item", "entity_id").iter_rows():
            if entity_id in pictures:
                picture = staging / "pictures" / f"{item}.svg"
                picture.write_text(pictures[entity_id], encoding="utf-8")
        about = {"format": _FORMAT, **sample.about}
        text = json.dumps(about, ensure_ascii=False, indent=1)
        (staging / _SAMPLE).write_text(text, encoding="utf-8")
        follow_umask(staging)
        os.rename(staging, sample.path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Refuse to draw into a folder that is there: grades belong to one sample.

    Raises:
        ConfigError: It is there.
    """
    if path.exists():
        raise ConfigError(f"{path}: exists already. A sample is drawn once: name a new folder.")


def load_sample_folder(path: Path) -> Sample:
    """Read a sample.

    Raises:
        DataError: The folder holds none, or one of another version.
    """
    try:
        about = json.loads((path / _SAMPLE).read_text(encoding="utf-8"))
        tables = [
            pl.read_ndjson(path / f"{name}.jsonl") for name in ("queries", "items", "results")
        ]
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: expected a sample that `omni judge sample` wrote, but it cannot be read"
            f" ({error})."
        ) from error
    if about.get("format") != _FORMAT:
        raise DataError(
            f"{path}: expected a sample of format {_FORMAT}, got {about.get('format')!r}. Draw it"
            " again with this version."
        )
    queries, items, results = tables
    return Sample(path, about, queries, items, results)
