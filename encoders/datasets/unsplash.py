"""Read the Unsplash data set (Lite or Full) as pins, boards, a log and pairs.

Photos are the pins, collections the boards, downloads after a search the log.
Published columns used: photos(photo_id, photo_image_url, photo_description, ai_description,
photographer_username, photo_location_country, stats_views, stats_downloads), keywords(photo_id,
keyword, suggested_by_user), collections(photo_id, collection_id, collection_title),
conversions(converted_at, conversion_type, keyword, photo_id, anonymous_user_id,
conversion_country); tab- or comma-separated, in parts.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.datasets.dataset import split_by_query
from encoders.datasets.importers import find_parts
from encoders.errors import SchemaError
from encoders.tables.files import read_raw

COLUMNS: dict[str, tuple[str, ...]] = {
    "photos": ("photo_id", "photo_image_url", "photo_description", "ai_description"),
    "keywords": ("photo_id", "keyword", "suggested_by_user"),
    "collections": ("photo_id", "collection_id", "collection_title"),
    "conversions": (
        "converted_at",
        "conversion_type",
        "keyword",
        "photo_id",
        "anonymous_user_id",
        "conversion_country",
    ),
}
ATTRIBUTES = ("photographer_username", "photo_location_country", "stats_views", "stats_downloads")


def read(folder: Path) -> dict[str, pl.DataFrame]:
    """Read an unpacked Unsplash data set.

    Returns:
        ``catalogue`` (pins; keywords as the attribute ``keywords``), ``boards``, ``log`` (every
        download is a ``save``), and ``pairs``: keywords that users suggested for a photo, split by
        keyword.

    Raises:
        DataError: A file is missing.
        SchemaError: A published column is missing.
    """
    photos, keywords, collections, conversions = (_read(folder, name) for name in COLUMNS)
    words = keywords.group_by("photo_id", maintain_order=True).agg(
        pl.col("keyword").alias("keywords")
    )
    kept = [c for c in ATTRIBUTES if c in photos.columns]
    catalogue = photos.join(words, on="photo_id", how="left", maintain_order="left").select(
        pl.col("photo_id").alias("id"),
        pl.lit("pin").alias("entity_type"),
        pl.col("photo_description").alias("description"),
        pl.col("ai_description").alias("caption"),
        pl.col("photo_image_url").alias("image"),
        pl.lit("unsplash.com").alias("domain"),
        "keywords",
        *kept,
    )
    boards = collections.select(
        pl.col("collection_id").alias("board_id"),
        pl.col("collection_title").alias("title"),
        entity_id="photo_id",
    )
    log = conversions.select(
        pl.col("converted_at").alias("timestamp"),
        pl.col("keyword").alias("query"),
        pl.col("conversion_country").alias("country"),
        pl.col("anonymous_user_id").alias("user_id"),
        pl.lit("pin").alias("entity_type"),
        pl.col("photo_id").alias("entity_id"),
        pl.col("conversion_type").replace({"download": "save"}).alias("action"),
    )
    suggested = keywords.filter(
        pl.col("suggested_by_user").str.to_lowercase().is_in(["t", "true", "1"])
    )
    pairs = suggested.select(
        pl.col("keyword").alias("query"),
        pl.lit("pin").alias("entity_type"),
        pl.col("photo_id").alias("entity_id"),
        pl.lit("keyword").alias("action"),
    )
    split = split_by_query(pairs["query"].to_list())
    pairs = pairs.with_columns(pl.Series("split", split, dtype=pl.String))
    return {"catalogue": catalogue, "boards": boards, "log": log, "pairs": pairs}


def _read(folder: Path, name: str) -> pl.DataFrame:
    """Read the parts of one table and check that they have the published columns."""
    parts = find_parts(folder, name, (".tsv", ".csv"))
    frame = pl.concat([read_raw(part) for part in parts], how="diagonal_relaxed")
    missing = [c for c in COLUMNS[name] if c not in frame.columns]
    if missing:
        raise SchemaError(
            f"{name}: the published column(s) {', '.join(missing)} are missing; found"
            f" {', '.join(frame.columns)}."
        )
    return frame
