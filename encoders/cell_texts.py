"""How a cell reads where text is wanted: 38.0 as ``38``, whatever type the other rows of its column gave it."""

from __future__ import annotations

import io

import polars as pl


def cell_texts(values: pl.Series) -> pl.Series:
    """The texts of a column, or the lists of texts of a column of lists.

    Numbers read as polars reads those of JSON files as text (38 and 38.0 as ``38``, 1e-7 as ``0.0000001``); NaN is missing.
    """
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    in_lists = isinstance(values.dtype, pl.List)
    wanted = pl.List(pl.String()) if in_lists else pl.String()
    leaf = values.dtype.inner if in_lists else values.dtype  # type: ignore[attr-defined]
    if not leaf.is_float() or values.is_empty():
        return values.cast(wanted)
    lines = values.alias("cell").to_frame().write_ndjson()
    return pl.read_ndjson(io.BytesIO(lines.encode()), schema={"cell": wanted})["cell"].alias(values.name)
