"""Attributes of live entries appended to those of a catalogue or release, for a rebuild."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import polars as pl

from index_builder.filters.attributes import normalised
from index_builder.filters.field_types import can_be_attribute, refined_type
from index_builder.filters.json_values import fitted_column, is_part, of_one_type
from index_builder.filters.times import is_time

log = logging.getLogger(__name__)


def fold_attributes(
    frame: pl.DataFrame | None, keep: np.ndarray, live: pl.DataFrame, sequences: Sequence[int]
) -> pl.DataFrame | None:
    """Append the attributes of live entries to the rows of ``frame`` that stay.

    They are cast to the types the base has, by all of its rows; what does not fit is null, which
    is logged. What no column can hold is left out: a log may hold entries that were checked against
    another release, or never.

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
    parts: list[tuple[pl.Series, pl.Series]] = []
    if frame is not None:
        stays = pl.Series(keep)
        parts = [
            _parts(normalised(name, frame[name]), stays, live, len(sequences)) for name in known
        ]
    parts += [
        (pl.Series(series.name, [None] * height, dtype=series.dtype), series) for series in new
    ]
    return pl.DataFrame(
        [
            pl.concat([old.to_frame(), fresh.to_frame()], how="vertical_relaxed").to_series()
            for old, fresh in parts
        ]
    )


def _parts(
    base: pl.Series, keep: pl.Series, live: pl.DataFrame, count: int
) -> tuple[pl.Series, pl.Series]:
    """Return what stays of a column of the base, dates as texts, and what live entries add.

    Its type is that of the whole base, which live entries were checked against.
    """
    fresh = fitted_column(live, base.name, base.dtype, count)
    type_ = refined_type(base.name, base)
    # One text among dates would make the column text, and every filter on its dates an error
    if type_ == "time":
        times = [text if text is not None and is_time(text) else None for text in fresh]
        fresh = pl.Series(base.name, times, dtype=pl.String)
    elif type_ == "list<time>":
        lists = [cell if cell is None else [t for t in cell if t and is_time(t)] for cell in fresh]
        fresh = pl.Series(base.name, lists, dtype=pl.List(pl.String))
    if base.name in live.columns:
        lost = _count_values(live[base.name].head(count)) - _count_values(fresh)
        if lost:
            log.warning(
                f"attribute {base.name!r}: {lost:,} live values are not {type_}, as the source has"
                " them, and are missing in this release"
            )
    return base.filter(keep), fresh


def _count_values(series: pl.Series) -> int:
    """Count the values of a column, in lists each one."""
    return sum(
        sum(item is not None for item in cell) if isinstance(cell, list) else cell is not None
        for cell in series.to_list()
    )
