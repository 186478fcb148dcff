"""Read the Wayfair annotation data set (WANDS): English furniture and home products, judged.

Published columns used, tab-separated: query.csv(query_id, query, query_class),
product.csv(product_id, product_name, product_class, category hierarchy, product_description,
average_rating, review_count), label.csv(query_id, product_id, label).
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.datasets.dataset import split_by_query
from encoders.errors import DataError, SchemaError

GRADES = {"Exact": 2, "Partial": 1, "Irrelevant": 0}
COLUMNS: dict[str, tuple[str, ...]] = {
    "query": ("query_id", "query", "query_class"),
    "product": (
        "product_id",
        "product_name",
        "product_class",
        "category hierarchy",
        "product_description",
        "average_rating",
        "review_count",
    ),
    "label": ("query_id", "product_id", "label"),
}


def read(folder: Path) -> dict[str, pl.DataFrame]:
    """Read the folder with ``query.csv``, ``product.csv`` and ``label.csv``.

    Returns:
        ``catalogue``, ``judgements`` (grades 2 to 0), ``pairs`` (Exact only; the data set has no
        split: a tenth of the queries is held out, by a hash of the query) and ``labels`` (the
        query's class as a path).

    Raises:
        DataError: A file is missing.
        SchemaError: A published column is missing.
    """
    queries, products, labels = (_read(folder, name) for name in COLUMNS)
    catalogue = products.select(
        pl.col("product_id").alias("id"),
        pl.lit("product").alias("entity_type"),
        pl.col("product_name").alias("title"),
        pl.col("product_description").alias("description"),
        pl.coalesce("category hierarchy", "product_class").alias("category"),
        pl.col("average_rating").cast(pl.Float64, strict=False),
        pl.col("review_count").cast(pl.Float64, strict=False),
    )
    judged = labels.join(queries, on="query_id", how="left", maintain_order="left")
    judgements = judged.select(
        "query",
        pl.col("product_id").alias("entity_id"),
        pl.col("label").replace_strict(GRADES, default=None, return_dtype=pl.Int64).alias("grade"),
        pl.lit("US").alias("country"),
        pl.lit("wands").alias("judge"),
    )
    exact = judged.filter((pl.col("label") == "Exact") & pl.col("query").is_not_null())
    pairs = exact.select(
        "query",
        pl.lit("en").alias("language"),
        pl.lit("US").alias("country"),
        pl.lit("product").alias("entity_type"),
        pl.col("product_id").alias("entity_id"),
        pl.lit("exact").alias("action"),
    )
    split = split_by_query(pairs["query"].to_list())
    pairs = pairs.with_columns(pl.Series("split", split, dtype=pl.String))
    classes = queries.filter(pl.col("query_class").fill_null("") != "")
    parts = pl.col("query_class").str.split("/").list.eval(pl.element().str.strip_chars())
    paths = classes.select("query", parts.alias("path"))
    return {"catalogue": catalogue, "judgements": judgements, "pairs": pairs, "labels": paths}


def _read(folder: Path, name: str) -> pl.DataFrame:
    """Read one file and check that it has the published columns."""
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise DataError(
            f"{folder}: expected {path.name}, found none. Name the folder 'dataset' of the WANDS"
            " repository."
        )
    try:
        frame = pl.read_csv(path, separator="\t", infer_schema=False, glob=False)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{path.name}: not readable as tab-separated UTF-8 ({str(error).splitlines()[0]})."
        ) from error
    missing = [c for c in COLUMNS[name] if c not in frame.columns]
    if missing:
        raise SchemaError(
            f"{path.name}: the published column(s) {', '.join(missing)} are missing; found"
            f" {', '.join(frame.columns)}."
        )
    return frame
