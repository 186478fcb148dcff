"""Hide engaged queries from the entities that pairs read: held-back ones, and the pair's own fold.

A train query usually stands among the engaged queries of its entity, and would be found by matching
the text with itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.config.train_config import TrainConfig
from encoders.errors import SchemaError
from encoders.text.hashing import text_bucket


def fold_of(texts: pl.Series, config: TrainConfig) -> npt.NDArray[np.int64]:
    """Deal queries into folds, ``(N,)``; all 0 when cross-fitting is off."""
    if not config.batch.cross_fit:
        return np.zeros(len(texts), dtype=np.int64)
    return text_bucket(texts, config.seed + 202, config.batch.cross_fit)


def without_held_back(catalogue: pl.DataFrame, held_back: pl.Series) -> pl.DataFrame:
    """Remove the engaged queries that are held back for validation from a catalogue.

    Raises:
        SchemaError: Engaged queries are no lists of texts.
    """
    if held_back.is_empty() or not _has_engaged_queries(catalogue):
        return catalogue
    catalogue = _with_lists(catalogue)
    long = _engaged_queries(catalogue)
    distinct = long["text"].unique(maintain_order=True)
    hidden = set(_keys(held_back))
    is_held = pl.Series([key in hidden for key in _keys(distinct)], dtype=pl.Boolean)
    held = distinct.filter(is_held)
    return _with_engaged_queries(catalogue, long.filter(~pl.col("text").is_in(held.implode())))


def catalogue_views(visible: pl.DataFrame, config: TrainConfig) -> list[pl.DataFrame]:
    """Make the catalogue that pairs of each fold see: without the engaged queries of the fold.

    Raises:
        SchemaError: Engaged queries are no lists of texts.
    """
    folds = config.batch.cross_fit
    if not folds or not _has_engaged_queries(visible):
        return [visible]
    visible = _with_lists(visible)
    long = _engaged_queries(visible)
    distinct = long["text"].unique(maintain_order=True)
    fold = pl.DataFrame({"text": distinct, "fold": fold_of(distinct, config)})
    long = long.join(fold, on="text", how="left", maintain_order="left")
    return [_with_engaged_queries(visible, long.filter(pl.col("fold") != f)) for f in range(folds)]


def _keys(texts: pl.Series) -> list[int]:
    """Hash the normal forms of texts."""
    keys: list[int] = text_bucket(texts, 0, 1 << 62).tolist()
    return keys


def _has_engaged_queries(catalogue: pl.DataFrame) -> bool:
    column = "engaged_queries"
    return column in catalogue.columns and catalogue[column].null_count() < catalogue.height


def _with_lists(catalogue: pl.DataFrame) -> pl.DataFrame:
    """Bring engaged queries to lists of texts, in which single queries can be hidden.

    Raises:
        SchemaError: They are anything else, for instance one text an entity.
    """
    found = catalogue["engaged_queries"].dtype
    if isinstance(found, pl.List | pl.Array) and not found.inner.is_nested():
        return catalogue.with_columns(pl.col("engaged_queries").cast(pl.List(pl.String)))
    raise SchemaError(
        f"column engaged_queries must be a list of texts an entity, but is {found}: held-back"
        " queries, and with batch.cross_fit a pair's own, have to be hidden one by one. Split it"
        ' (in polars: pl.col("engaged_queries").str.split(" | ")), or set validation.fraction = 0'
        " and batch.cross_fit = 0."
    )


def _engaged_queries(catalogue: pl.DataFrame) -> pl.DataFrame:
    """List engaged queries, one a row: ``row`` of the catalogue and ``text``."""
    rows = pl.int_range(pl.len(), dtype=pl.Int64)
    return (
        catalogue.select(row=rows, text=pl.col("engaged_queries"))
        .explode("text")
        .drop_nulls("text")
    )


def _with_engaged_queries(catalogue: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """Put rows of ``_engaged_queries`` back into a catalogue as its lists."""
    lists = kept.group_by("row", maintain_order=True).agg(pl.col("text").alias("engaged_queries"))
    rows = catalogue.drop("engaged_queries").with_columns(
        row=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    joined = rows.join(lists, on="row", how="left", maintain_order="left").with_columns(
        pl.col("engaged_queries").fill_null([])
    )
    return joined.select(catalogue.columns)
