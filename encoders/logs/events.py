"""Read engaged events from a log in bounded batches: the rows that show interest, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import polars as pl

from encoders.errors import ConfigError
from encoders.tables.checks import TableReport, check_frame
from encoders.tables.files import OnBadRows, TableSource, raise_problems, read_raw, table_files
from encoders.tables.schemas import LOG
from encoders.tables.stream import log_rows
from encoders.text.normal_forms import normalize_queries

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "timestamp": pl.Datetime("us", "UTC"),
    "query": pl.String(),
    "language": pl.String(),
    "country": pl.String(),
    "user_id": pl.String(),
    "entity_type": pl.String(),
    "entity_id": pl.String(),
    "action": pl.String(),
}
"""Columns of an events frame.

Rows equal in all of them are one event, however often the log holds it.
"""

BATCH_ROWS = 2_000_000
_NO_IMPRESSION = (pl.col("action").cast(pl.String) != "impression").fill_null(True)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngagementRules:
    """What counts as an engagement."""

    min_dwell_seconds: float = 10.0
    """A click that lasted this long is a long click; a long click known as shorter is a click."""

    def __post_init__(self) -> None:
        if self.min_dwell_seconds < 0:
            raise ConfigError(f"min_dwell_seconds must be at least 0, got {self.min_dwell_seconds}")


class Events(NamedTuple):
    """Events of one batch of log rows."""

    frame: pl.DataFrame
    """Columns of ``EVENT_SCHEMA``, in log order."""
    report: TableReport


def engaged_events(
    log: pl.DataFrame, rules: EngagementRules, source: str = "log", *, now: datetime | None = None
) -> Events:
    """Keep the rows that are engagements, check them and bring them to one form.

    Impressions are left out before the checks. Ids and queries become Unicode form NFC, white space
    of queries collapses, the action is restated by dwell time. An empty log gives no events.

    Args:
        log: Rows of the log table as read. A column ``__row`` (row number in the file, from 1)
            makes messages exact.
        rules: What counts.
        source: File name for messages.
        now: Time that "in the future" is measured from; None: the clock.

    Returns:
        The events of rows without problems, and the report that names the others.

    Raises:
        SchemaError: A required column is missing.
    """
    if "action" in log.columns:
        log = log.filter(_NO_IMPRESSION)
    checked = check_frame(log, LOG, source, now=now)
    frame = checked.frame
    if "dwell_seconds" in frame.columns:
        dwell = pl.col("dwell_seconds")
        frame = frame.with_columns(
            pl.when((pl.col("action") == "click") & (dwell >= rules.min_dwell_seconds))
            .then(pl.lit("long_click"))
            .when((pl.col("action") == "long_click") & (dwell < rules.min_dwell_seconds))
            .then(pl.lit("click"))
            .otherwise(pl.col("action"))
            .alias("action")
        )
    frame = frame.with_columns(normalize_queries(frame["query"]))
    suggested = frame["entity_type"] == "query"
    if suggested.any():
        queries = normalize_queries(frame["entity_id"].filter(suggested))
        frame = frame.with_columns(frame["entity_id"].scatter(suggested.arg_true(), queries))
    return Events(frame.select(list(EVENT_SCHEMA)), checked.report)


def merge_duplicates(events: pl.DataFrame) -> pl.DataFrame:
    """Drop repeated events; order is not kept."""
    return events.unique(subset=list(EVENT_SCHEMA), keep="any")


def read_events(
    path: TableSource,
    rules: EngagementRules,
    *,
    on_bad_rows: OnBadRows = "raise",
    encoding: str = "utf-8",
    now: datetime | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Events]:
    """Read a log batch by batch; Parquet files of any size pass in bounded memory.

    Yields:
        Events of at most ``batch_rows`` log rows each (a whole file for formats other than
        Parquet).

    Raises:
        DataError: The log is missing or unreadable.
        RowError: A row breaks a rule and ``on_bad_rows`` is ``raise``.
    """
    for file in table_files(path):
        for raw in _raw_batches(file, encoding, batch_rows):
            events = engaged_events(raw, rules, file.name, now=now)
            if on_bad_rows == "raise":
                raise_problems(events.report, droppable=True)
            yield events


def _raw_batches(file: Path, encoding: str, batch_rows: int) -> Iterator[pl.DataFrame]:
    """Read a log file as ``raw_batch`` does, batch after batch."""
    rows = log_rows(file) if file.suffix == ".parquet" else batch_rows
    for start in range(0, max(rows, 1), batch_rows):
        yield raw_batch(file, encoding, start, batch_rows)


def raw_batch(file: Path, encoding: str, start: int, rows: int) -> pl.DataFrame:
    """Read rows ``start`` to ``start + rows`` of a Parquet log, or another file whole.

    Impressions of a Parquet log are left out. The column ``__row`` holds row numbers, from 1.
    """
    if file.suffix != ".parquet":
        return read_raw(file, encoding).with_row_index("__row", offset=1)
    part = pl.scan_parquet(file).slice(start, rows).with_row_index("__row", offset=start + 1)
    names = part.collect_schema().names()
    if "action" in names:
        part = part.filter(_NO_IMPRESSION)
    wanted = ("__row", *(c.name for c in LOG.columns if c.name != "position"))
    return part.select(name for name in wanted if name in names).collect()
