"""Attributes of live entries appended to those of a catalogue or release, for a rebuild."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from index_builder.filters.attributes import normalised
from index_builder.filters.field_types import can_be_attribute, refined_type
from index_builder.filters.json_values import fitted_column, is_part, of_one_type
from index_builder.filters.times import is_time


def fold_attributes(
    frame: pl.DataFrame | None, keep: np.ndarray, live: pl.DataFrame, sequences: Sequence[int]
) -> pl.DataFrame | None:
    """Append the attributes of live entries to the rows of ``frame`` that stay.

    They are cast to the types the base has; what does not fit is null. What no column can hold is
    left out: a log may hold entries that were checked against another release, or never.

    Args:
        frame: Attributes of the base, or None.
        keep: bool ``(N,)``, the rows of ``frame`` that stay.
        live: Columns of ``json_columns``, one row for each entry.
        sequences: Place of each entry in the log.
    """
    known = frame.columns if frame is not None else []
    new = [
        of_one_type(series, sequences)
        for series in live
        if series.name not in known and not is_part(series.name)
    ]
    new = [series for series in new if can_be_attribute(series)]
    if not known and not new:
        return frame
    height = int(keep.sum())
    kept = frame.filter(pl.Series(keep)) if frame is not None and known else pl.DataFrame()
    parts = [_parts(normalised(name, kept[name]), live, len(sequences)) for name in known]
    parts += [
        (pl.Series(series.name, [None] * height, dtype=series.dtype), series) for series in new
    ]
    return pl.DataFrame(
        [
            pl.concat([old.to_frame(), fresh.to_frame()], how="vertical_relaxed").to_series()
            for old, fresh in parts
        ]
    )


def _parts(base: pl.Series, live: pl.DataFrame, count: int) -> tuple[pl.Series, pl.Series]:
    """Return a column of the base, dates as texts, and what live entries add to it."""
    fresh = fitted_column(live, base.name, base.dtype, count)
    type_ = refined_type(base.name, base)
    # One text among dates would make the column text, and every filter on its dates an error
    if type_ == "time":
        times = [text if text is not None and is_time(text) else None for text in fresh]
        fresh = pl.Series(base.name, times, dtype=pl.String)
    elif type_ == "list<time>":
        lists = [cell if cell is None else [t for t in cell if t and is_time(t)] for cell in fresh]
        fresh = pl.Series(base.name, lists, dtype=pl.List(pl.String))
    return base, fresh
