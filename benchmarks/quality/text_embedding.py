"""``omni bench text``: choose the mix of an entity's texts in its text embedding.

By cross-validation on train queries alone.

No training and no held-out pair: the train queries are dealt into folds by their text, an entity's
engaged queries are its train queries of the other folds, and the pairs of a fold are asked against
all entities of the type with the frozen tower on both sides. The tower must not have been trained
on these queries: multilingual USE was not, the shipped 16 MB tower was.
"""

from __future__ import annotations

from itertools import product as combinations
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import polars as pl

from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.datasets.dataset import load_sample
from encoders.text.hashing import text_bucket
from encoders.text.normal_forms import normalize_query
from encoders.towers.text_embedding import TextEmbedding

ENGAGED = 50
"""Engaged queries of an entity, as the recipes read them."""
SALT = 7
_BLOCK = 2000


def engaged_in_other_folds(entities: pl.DataFrame, pairs: pl.DataFrame, fold: int) -> pl.DataFrame:
    """Return the entities with queries of all folds but one as ``engaged_queries``.

    At most ``ENGAGED`` of them each.
    """
    others = (
        pairs.filter(pl.col("fold") != fold)
        .group_by("entity_id", maintain_order=True)
        .agg(engaged_queries=pl.col("query").head(ENGAGED))
    )
    return entities.drop("engaged_queries", strict=False).join(
        others, left_on="id", right_on="entity_id", how="left", maintain_order="left"
    )


def hits_at_10(
    queries: npt.NDArray[np.float32],
    entities: npt.NDArray[np.float32],
    places: npt.NDArray[np.int64],
) -> int:
    """Count the queries (P, D) whose entity, at row ``places``, is in the top ten of (N, D).

    Ties count as found.
    """
    found = 0
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ entities.T  # (B, N)
        own = np.take_along_axis(scores, places[start : start + _BLOCK, None], axis=1)
        found += int(((scores > own).sum(axis=1) < 10).sum())
    return found


def cross_validate(
    embedding: TextEmbedding,
    entities: pl.DataFrame,
    pairs: pl.DataFrame,
    mixes: list[tuple[float, int]],
    folds: int,
    max_pairs: int,
) -> dict[str, Any]:
    """Return labelled Recall@10 of left-out train queries for each mix.

    Args:
        embedding: The frozen tower.
        entities: Catalogue rows of one type.
        pairs: Its train pairs.
        mixes: What is compared.
        folds: Parts of the queries.
        max_pairs: Asked per fold, at most; a fixed random choice.
    """
    row_of = {id: row for row, id in enumerate(entities["id"].to_list())}
    pairs = pairs.with_columns(fold=pl.Series(text_bucket(pairs["query"], SALT, folds)))
    found, asked = dict.fromkeys(mixes, 0), 0
    for fold in range(folds):
        held = pairs.filter(pl.col("fold") == fold)
        held = held.sample(min(max_pairs, held.height), seed=fold)
        queries = embedding.encoder.encode(
            [normalize_query(text) for text in held["query"].to_list()]
        )
        places = np.array([row_of[id] for id in held["entity_id"].to_list()], dtype=np.int64)
        seen = engaged_in_other_folds(entities, pairs, fold)
        for mix in mixes:
            found[mix] += hits_at_10(queries, embedding(seen, *mix), places)
        asked += held.height
    return {
        "pairs": asked,
        "recall_at_10": {
            f"{weight:g} x {count} queries": count_ / asked
            for (weight, count), count_ in found.items()
        },
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--tower",
    default="use_tower",
    show_default=True,
    help="Frozen tower: a folder, a shipped name or a Hugging Face name.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    default=(0.5, 1.0, 2.0, 3.0),
    show_default=True,
    help="Repeat.",
)
@click.option(
    "--queries",
    "counts",
    multiple=True,
    type=int,
    default=(0, 20),
    show_default=True,
    help="Engaged queries in the text; repeat.",
)
@click.option("--folds", default=4, show_default=True, help="Parts of the train queries.")
@click.option(
    "--max-pairs", default=12_000, show_default=True, help="Pairs asked per fold and type."
)
@click.option(
    "--type",
    "types",
    multiple=True,
    default=("pin", "product", "ad"),
    show_default=True,
    help="Entity types; repeat.",
)
@json_option
@handle_errors
def command(
    tower: str,
    weights: tuple[float, ...],
    counts: tuple[int, ...],
    folds: int,
    max_pairs: int,
    types: tuple[str, ...],
    as_json: bool,
) -> None:
    """Weights of the full text in the text embedding, chosen on train queries alone.

    Real annotation pairs of the sample (not clicks); held-out pairs are not read.

    Example: python -m encoders.pretraining.use_query_tower --out use_tower; omni bench text --tower
    use_tower
    """
    dataset = load_sample(engaged_queries=0, images=False)
    train = dataset.split("train")
    embedding = TextEmbedding(tower)
    mixes = [(0.0, 0), *((weight, count) for count, weight in combinations(counts, weights))]
    found: dict[str, Any] = {}
    for name in types:
        entities = dataset.catalogue.filter(pl.col("entity_type") == name)
        pairs = train.filter(pl.col("entity_type") == name)
        with stage(f"{name}: {pairs.height:,} train pairs, {entities.height:,} entities"):
            found[name] = cross_validate(embedding, entities, pairs, mixes, folds, max_pairs)
    path = write_record(
        "text",
        Measurement(
            dataset={
                "name": dataset.name,
                "real": True,
                "note": "annotations, not clicks; train pairs only",
            },
            config={
                "tower": tower,
                "folds": folds,
                "max_pairs": max_pairs,
                "engaged_queries": ENGAGED,
            },
            protocol={
                "metric": "labelled Recall@10 of left-out train queries, frozen tower on both sides"
            },
            metrics=found,
            libraries=("torch", "numpy"),
        ),
    )
    if as_json:
        print_json(found)
        return
    rows = [
        [mix, *(found[name]["recall_at_10"][mix] for name in found)]
        for mix in found[types[0]]["recall_at_10"]
    ]
    title = "Labelled Recall@10 of left-out train queries; real annotation pairs, frozen tower"
    print_table(
        title, ["full text", *(f"{name} ({found[name]['pairs']:,})" for name in found)], rows
    )
    say(f"record: {path.name}")
