"""Read the Amazon shopping queries data set (ESCI): products and judgements of us, es and jp.

Published columns used: examples(query, product_id, product_locale, esci_label, split) and
products(product_id, product_title, product_description, product_bullet_point, product_brand,
product_color, product_locale), both Parquet.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.errors import DataError, SchemaError

GRADES = {"E": 3, "S": 2, "C": 1, "I": 0}
"""Exact, Substitute, Complement, Irrelevant."""

LANGUAGES = {"us": "en", "es": "es", "jp": "ja"}
COUNTRIES = {"us": "US", "es": "ES", "jp": "JP"}
EXAMPLES = ("query", "product_id", "product_locale", "esci_label", "split")
PRODUCTS = (
    "product_id",
    "product_title",
    "product_description",
    "product_bullet_point",
    "product_brand",
    "product_color",
    "product_locale",
)


def read(folder: Path) -> dict[str, pl.DataFrame]:
    """Read ``shopping_queries_dataset_examples.parquet`` and ``..._products.parquet``.

    Returns:
        ``catalogue`` (ids are ``locale:product_id``, as one product id is sold in several locales),
        ``judgements`` (grades 3 to 0) and ``pairs`` (Exact only; test becomes ``heldout``; the data
        set splits by query).

    Raises:
        DataError: A file is missing.
        SchemaError: A published column is missing.
    """
    examples = _read(folder, "examples", EXAMPLES)
    products = _read(folder, "products", PRODUCTS)
    identifier = pl.format("{}:{}", "product_locale", "product_id")
    catalogue = products.select(
        identifier.alias("id"),
        pl.lit("product").alias("entity_type"),
        pl.col("product_title").alias("title"),
        pl.concat_str(
            "product_description", "product_bullet_point", separator="\n", ignore_nulls=True
        ).alias("description"),
        pl.col("product_brand").alias("brand"),
        pl.col("product_color").alias("color"),
        pl.col("product_locale").replace(COUNTRIES).alias("country"),
    )
    judgements = examples.select(
        "query",
        identifier.alias("entity_id"),
        pl.col("esci_label")
        .replace_strict(GRADES, default=None, return_dtype=pl.Int64)
        .alias("grade"),
        pl.col("product_locale").replace(COUNTRIES).alias("country"),
        pl.lit("esci").alias("judge"),
    )
    pairs = examples.filter(pl.col("esci_label") == "E").select(
        "query",
        pl.col("product_locale").replace(LANGUAGES).alias("language"),
        pl.col("product_locale").replace(COUNTRIES).alias("country"),
        pl.lit("product").alias("entity_type"),
        identifier.alias("entity_id"),
        pl.lit("exact").alias("action"),
        pl.col("split").replace({"test": "heldout"}).alias("split"),
    )
    return {"catalogue": catalogue, "judgements": judgements, "pairs": pairs}


def _read(folder: Path, name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """Read the published columns of one file."""
    path = folder / f"shopping_queries_dataset_{name}.parquet"
    if not path.is_file():
        raise DataError(
            f"{folder}: expected {path.name}, found none. Download the ESCI data set and name the"
            " folder that holds this file."
        )
    frame = pl.scan_parquet(path, glob=False)
    found = frame.collect_schema().names()
    missing = [c for c in columns if c not in found]
    if missing:
        raise SchemaError(
            f"{path.name}: the published column(s) {', '.join(missing)} are missing; found"
            f" {', '.join(found)}."
        )
    return frame.select(columns).collect()
