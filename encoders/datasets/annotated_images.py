"""Read the annotated images ``small`` (also in the package) and ``large``, in their own format.

All pairs are human annotations and translations, standing in for engagement. They are not clicks.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.datasets.dataset import load_large
from encoders.errors import DataError
from encoders.tables.files import read_raw

SMALL_FILES = ("entities.jsonl.gz", "pairs.jsonl.gz")


def read_small(folder: Path) -> dict[str, pl.DataFrame]:
    """Read ``entities.jsonl.gz`` and ``pairs.jsonl.gz`` of a folder or its sub-folder ``small``.

    Returns:
        ``catalogue`` without engaged queries, ``boards`` (small groups as boards) and ``pairs``
        with the kind of annotation as action.

    Raises:
        DataError: The files are not there.
    """
    folder = folder / "small" if (folder / "small").is_dir() else folder
    missing = [name for name in SMALL_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: expected {', '.join(missing)}, found none.")
    catalogue = read_raw(folder / "entities.jsonl.gz").rename({"boards": "board_titles"})
    types = catalogue.select(pl.col("id").alias("entity_id"), "entity_type")
    pairs = read_raw(folder / "pairs.jsonl.gz").join(
        types, on="entity_id", how="left", maintain_order="left"
    )
    return {
        "catalogue": catalogue,
        "boards": _boards(catalogue),
        "pairs": pairs.rename({"kind": "action"}),
    }


def read_large(folder: Path) -> dict[str, pl.DataFrame]:
    """Read ``LARGE_FILES`` of a folder or its sub-folder ``large``.

    Returns:
        As ``read_small``.

    Raises:
        ConfigError: The files are not there.
    """
    large = load_large(folder, engaged_queries=0)
    catalogue = large.catalogue.drop("engaged_queries")
    return {"catalogue": catalogue, "boards": _boards(catalogue), "pairs": large.pairs.drop("kind")}


def _boards(catalogue: pl.DataFrame) -> pl.DataFrame:
    """Return the groups that entities belong to as boards."""
    rows = (
        catalogue.select(pl.col("board_titles").alias("title"), pl.col("id").alias("entity_id"))
        .explode("title")
        .drop_nulls("title")
    )
    return rows.select(pl.col("title").alias("board_id"), "title", "entity_id")
