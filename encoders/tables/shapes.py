"""Tell single values from lists: what a column holds must be of one shape in all files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import polars as pl

from encoders.errors import SchemaError


def check_shapes(rows: pl.DataFrame, where: str, shapes: dict[str, tuple[str, str]]) -> None:
    """Remember where each column was first seen as what.

    Raises:
        SchemaError: A column is of another shape here; one vector a row beside several vectors a
            row is no other shape.
    """
    for name, dtype in rows.schema.items():
        shape = _shape(dtype)
        if shape is None:
            continue
        known, first = shapes.setdefault(name, (shape, where))
        if known != shape:
            raise SchemaError(
                f"column {name!r} holds {known} in {first}, but {shape} in {where}. Export it in"
                " one form in all files."
            )


def _shape(dtype: pl.DataType) -> str | None:
    """Name the shape of a column's cells; None: all of them are null."""
    leaf, depth = leaf_type(dtype)
    if leaf == pl.Null:
        return None
    if not depth:
        return "records" if isinstance(leaf, pl.Struct) else "single values"
    return "lists" if depth == 1 or leaf.is_numeric() else "lists of lists"


def leaf_type(dtype: pl.DataType) -> tuple[pl.DataType, int]:
    """Return what lists of lists hold in the end, and how deep."""
    depth = 0
    while isinstance(dtype, pl.List | pl.Array):
        dtype = cast(pl.DataType, dtype.inner)
        depth += 1
    return dtype, depth


def join_frames(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Join frames one below the other; times without a zone are UTC where others have one.

    Raises:
        SchemaError: No type holds the values that a column has in all of them.
    """
    zoned = {
        name
        for frame in frames
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None
    }
    joined = [_zoned(frame, zoned) for frame in frames]
    try:
        return pl.concat(joined, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        types: dict[str, dict[str, None]] = {}
        for frame in joined:
            for name, dtype in frame.schema.items():
                types.setdefault(name, {})[str(dtype)] = None
        found = "; ".join(f"{n!r}: {', '.join(t)}" for n, t in types.items() if len(t) > 1)
        raise SchemaError(
            f"a column must be of one type in all files, but got {found}. Export it as one, or"
            " leave it out."
        ) from error


def _zoned(frame: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    """Give the times of some columns the zone UTC where they have none."""
    return frame.with_columns(
        frame[name].dt.replace_time_zone("UTC")
        for name, dtype in frame.schema.items()
        if name in names and isinstance(dtype, pl.Datetime) and dtype.time_zone is None
    )
