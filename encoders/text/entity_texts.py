"""Join an entity's fields to one text, for zero-shot encoders, BM25 and the text embedding."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl


def entity_texts(
    catalogue: pl.DataFrame,
    fields: Sequence[str] = ("title", "description", "category", "board_titles", "engaged_queries"),
) -> list[str]:
    """Return one text per catalogue row: its fields, and the items of lists, joined by full stops.

    Empty and missing fields are left out.
    """
    parts = []
    for name in fields:
        if name in catalogue.columns:
            column = pl.col(name)
            parts.append(
                column.list.join(". ").alias(name)
                if catalogue[name].dtype == pl.List
                else column.cast(pl.String).alias(name)
            )
    if not parts:
        return [""] * catalogue.height
    joined = (
        catalogue.select(parts)
        .with_columns(pl.all().replace("", None))
        .select(pl.concat_str(pl.all(), separator=". ", ignore_nulls=True))
    )
    return joined.to_series().fill_null("").to_list()
