"""Turn a pairs table into numbers: check it, hold validation queries back, replace names by rows.

Texts become integers once, here; everything after works on numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import numpy as np
import polars as pl

from encoders.config.train_config import TrainConfig
from encoders.errors import DataError, SchemaError
from encoders.text.hashing import text_bucket
from encoders.text.normal_forms import fold_query, normalized_query
from encoders.training.data.balancing import balance_column, require_plain
from encoders.training.data.source_tables import TrainingData

log = logging.getLogger(__name__)

VALIDATION_BUCKETS = 1_000_000


def usable_pairs(data: TrainingData, config: TrainConfig) -> pl.DataFrame:
    """Select the train and validation pairs, with every column that training reads.

    Validation queries are held back where the pairs bring no validation split.

    Raises:
        SchemaError: A column is missing.
        DataError: A table is empty, a query is blank, or there are no train pairs.
    """
    _require(data.catalogue, ("id", "entity_type"), "catalogue")
    _require(data.pairs, ("query", "entity_type", "entity_id"), "pairs")
    balances = sorted({d.balance_by for d in config.datasets if d.balance_by in data.pairs.columns})
    require_plain(data.pairs, balances, "pairs")
    pairs = _with_defaults(data.pairs, config.validation.split, balances)
    blank = pairs.with_row_index("row").filter(pl.col("query") == "")
    if blank.height:
        raise DataError(
            f"{blank.height} pairs have a query of only white space (first: row {blank['row'][0]})."
            " Drop these rows."
        )
    pairs = _hold_back(pairs, config)
    _require_train_pairs(data.pairs, pairs, config)
    return pairs


def _require(frame: pl.DataFrame, columns: Sequence[str], table: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"table {table}: missing column(s) {', '.join(missing)}; it has"
            f" {', '.join(frame.columns)}. Rename or add them."
        )
    if frame.is_empty():
        raise DataError(f"table {table} has no rows; there is nothing to train on.")


def _with_defaults(
    pairs: pl.DataFrame, validation_split: str, balances: Sequence[str]
) -> pl.DataFrame:
    """Complete the columns, keep train and validation pairs, collapse white space in queries."""
    defaults = {"count": pl.lit(1), "action": pl.lit(""), "split": pl.lit("train")}
    pairs = pairs.with_columns(
        expr.alias(name) for name, expr in defaults.items() if name not in pairs.columns
    )
    is_validation = pl.col("split") == validation_split
    other_query = normalized_query(pl.col("entity_id"))
    related = pl.when(pl.col("entity_type") == "query").then(other_query)
    return (
        pairs.select(
            "query",
            "entity_type",
            "entity_id",
            "action",
            pl.col("count").cast(pl.Float64),
            "split",
            *(pl.col(name).cast(pl.String).alias(balance_column(name)) for name in balances),
        )
        .filter(pl.col("split").is_in(["train", validation_split]))
        .with_columns(
            query=normalized_query(pl.col("query").fill_null("")),
            split=pl.when(is_validation).then(pl.lit("validation")).otherwise(pl.lit("train")),
            entity_id=related.otherwise(pl.col("entity_id")),
        )
    )


def _hold_back(pairs: pl.DataFrame, config: TrainConfig) -> pl.DataFrame:
    """Move ``fraction`` of the train queries to the validation split when no pair is in it.

    Both sides of a related-query pair are read by the query tower: train pairs whose related query
    is a validation query are left out.
    """
    if config.validation.fraction and not (pairs["split"] == "validation").any():
        queries = pairs["query"].unique(maintain_order=True)
        buckets = text_bucket(queries, config.seed + 101, VALIDATION_BUCKETS)
        held = queries.filter(pl.Series(buckets < config.validation.fraction * VALIDATION_BUCKETS))
        is_held = pl.col("query").is_in(held.implode())
        pairs = pairs.with_columns(
            pl.when(is_held).then(pl.lit("validation")).otherwise(pl.col("split")).alias("split")
        )
    validation = pairs.filter(pl.col("split") == "validation")["query"].unique()
    shown = (
        (pl.col("split") == "train")
        & (pl.col("entity_type") == "query")
        & fold_query(pl.col("entity_id")).is_in(
            validation.to_frame("query").select(fold_query(pl.col("query")))["query"].implode()
        )
    )
    return pairs.filter(~shown)


def _require_train_pairs(given: pl.DataFrame, pairs: pl.DataFrame, config: TrainConfig) -> None:
    if (pairs["split"] == "train").any():
        return
    if "split" not in given.columns or (given["split"] == "train").any():
        raise DataError(
            f"no train pairs: validation.fraction = {config.validation.fraction} holds back every"
            " query. Lower it, or add pairs."
        )
    splits = given["split"].value_counts(sort=True)
    found = ", ".join(f"{count:,} {split}" for split, count in splits.iter_rows())
    raise DataError(
        f"no train pairs: all {given.height:,} are held out (by split: {found}). Make the pairs"
        " again with a smaller --heldout-days or --gap-days, or a later --train-end, of `omni"
        " pairs`, or from more days of logs."
    )


def query_texts(pairs: pl.DataFrame) -> pl.Series:
    """List the distinct texts that the query tower reads: queries and related queries.

    A text's position is its query number.
    """
    related = pairs.filter(pl.col("entity_type") == "query")["entity_id"]
    return pl.concat((pairs["query"], related)).unique(maintain_order=True)


def number_pairs(
    pairs: pl.DataFrame, texts: pl.Series, catalogue: pl.DataFrame, trained: Collection[str]
) -> pl.DataFrame:
    """Add ``query_number`` and ``candidate``, which is a catalogue row or a query number.

    Pairs whose entity is not in the catalogue are left out.

    Args:
        pairs: From ``usable_pairs``.
        texts: From ``query_texts``.
        catalogue: What the entity ids name.
        trained: Entity types that are trained; empty: all.

    Raises:
        DataError: The catalogue holds an id twice, or lacks more than half of the entities that
            pairs of trained types name: the ids are written differently.
    """
    pairs = pairs.with_columns(pl.col("entity_type").cast(pl.String))
    pairs = _left_join(pairs, _catalogue_rows(catalogue), ["entity_type", "entity_id"])
    numbers = pl.DataFrame({"text": texts, "number": np.arange(len(texts), dtype=np.int64)})
    for text, number in (("query", "query_number"), ("entity_id", "candidate_number")):
        pairs = _left_join(pairs, numbers.rename({"text": text, "number": number}), [text])
    is_query = pl.col("entity_type") == "query"
    candidate = pl.when(is_query).then(pl.col("candidate_number")).otherwise(pl.col("row"))
    pairs = pairs.with_columns(candidate.alias("candidate"))
    lost = pairs.filter(pl.col("candidate").is_null())
    if lost.height == pairs.height:
        raise DataError(
            f"none of the {pairs.height} pairs names an entity of the catalogue (first:"
            f" {lost['entity_type'][0]} {lost['entity_id'][0]!r})."
        )
    _refuse_most_lost(pairs, catalogue, trained)
    if lost.height:
        log.info(
            f"{lost.height:,} of {pairs.height:,} pairs name entities that the catalogue lacks"
            f" (first: {lost['entity_id'][0]!r}); left out"
        )
    return pairs.filter(pl.col("candidate").is_not_null())


def _catalogue_rows(catalogue: pl.DataFrame) -> pl.DataFrame:
    """Number the rows of the catalogue: ``entity_type``, ``entity_id``, ``row``."""
    rows = catalogue.select(
        pl.col("entity_type").cast(pl.String),
        entity_id=pl.col("id"),
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    )
    twice = rows.filter(rows.select("entity_type", "entity_id").is_duplicated())
    if twice.height:
        raise DataError(
            f"the catalogue holds {twice['entity_id'][0]!r} twice under one entity type; ids must"
            " be unique. `omni data validate` lists them."
        )
    return rows


def _left_join(left: pl.DataFrame, right: pl.DataFrame, on: list[str]) -> pl.DataFrame:
    return left.join(right, on=on, how="left", maintain_order="left")


def _refuse_most_lost(
    pairs: pl.DataFrame, catalogue: pl.DataFrame, trained: Collection[str]
) -> None:
    entities = pairs.filter(pl.col("entity_type") != "query")
    if trained:
        entities = entities.filter(pl.col("entity_type").is_in(list(trained)))
    lost = entities.filter(pl.col("candidate").is_null())
    if 2 * lost.height <= entities.height:
        return
    first = lost["entity_type"][0]
    same_type = catalogue.filter(pl.col("entity_type").cast(pl.String) == first)
    examples = (lost.filter(pl.col("entity_type") == first)["entity_id"], same_type["id"])
    wanted, there = (
        ", ".join(map(repr, ids.unique(maintain_order=True).head(3).to_list())) or "none"
        for ids in examples
    )
    raise DataError(
        f"{lost.height:,} of {entities.height:,} entity pairs name entities that the catalogue"
        f" lacks. Of type {first!r} the pairs have {wanted}; the catalogue has {there}. Write the"
        " ids alike in both tables, or name only the types to train under [[datasets]]."
    )
