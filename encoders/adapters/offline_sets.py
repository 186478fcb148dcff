"""The annotated picture sets in this project's own format: ``small`` (also in the package) and ``large``.

All pairs are human annotations and translations, standing in for engagement. They are not clicks.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from encoders.sample import load_large
from encoders.tables import read_raw


def read(folder: Path) -> dict[str, pl.DataFrame]:
    """Read ``entities.jsonl.gz`` with either ``pairs.jsonl.gz`` (small) or ``pairs_train.jsonl.gz`` and ``pairs_dev.jsonl.gz`` (large).

    Returns:
        ``catalogue`` without engaged queries, ``boards`` (small groups as boards) and ``pairs`` with the kind of annotation as action.

    Raises:
        ConfigError: The files are not there.
    """
    small = folder / "small" if (folder / "small" / "pairs.jsonl.gz").is_file() else folder
    if not (small / "pairs.jsonl.gz").is_file():
        large = load_large(folder, engaged_queries=0)
        catalogue, pairs = large.catalogue.drop("engaged_queries"), large.pairs.drop("kind")
    else:
        catalogue = read_raw(small / "entities.jsonl.gz").rename({"boards": "board_titles"})
        types = catalogue.select(pl.col("id").alias("entity_id"), "entity_type")
        pairs = read_raw(small / "pairs.jsonl.gz").join(types, on="entity_id", how="left", maintain_order="left")
        pairs = pairs.rename({"kind": "action"})
    boards = catalogue.select(pl.col("board_titles").alias("title"), pl.col("id").alias("entity_id")).explode("title").drop_nulls("title")
    return {"catalogue": catalogue, "boards": boards.select(pl.col("title").alias("board_id"), "title", "entity_id"), "pairs": pairs}
