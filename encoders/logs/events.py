"""Read engaged events from a log in bounded batches: the rows that show interest, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.errors import ConfigError, DataError
from encoders.tables.checks import TableReport, check_frame
from encoders.tables.files import OnBadRows, raise_problems
from encoders.tables.parts import TableFile, TableSource, source_name, table_files
from encoders.tables.reading import DEFAULT_OPTIONS, read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import LOG, ROW
from encoders.tables.stream import parquet_rows
from encoders.tables.typed_files import plain_type
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
    reading: ReadingOptions = DEFAULT_OPTIONS,
    now: datetime | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[Events]:
    """Read a log batch by batch, in memory that does not grow with it.

    Yields:
        Events of at most ``batch_rows`` log rows each.

    Raises:
        DataError: The log is missing or unreadable.
        RowError: A row breaks a rule and ``on_bad_rows`` is ``raise``.
    """
    is_empty = True
    for file in table_files(path):
        for start in batch_starts(file, reading, batch_rows):
            for raw in raw_batches(file, reading, start, batch_rows):
                is_empty = False
                events = engaged_events(raw, rules, file.name, now=now)
                if on_bad_rows == "raise":
                    raise_problems(events.report, droppable=True)
                yield events
    if is_empty:
        raise empty_log(path)


def empty_log(path: TableSource) -> DataError:
    """Word the error of a log that has neither rows nor columns."""
    return DataError(f"{source_name(path)}: the log is empty. Was the export cut short?")


def batch_starts(file: TableFile, reading: ReadingOptions, rows: int) -> range:
    """Return where the parts of a log file begin that ``raw_batches`` reads one by one."""
    scanned = _scanned_columns(file, reading) is not None
    return range(0, max(parquet_rows(file.path), 1) if scanned else 1, rows)


def raw_batches(
    file: TableFile, reading: ReadingOptions, start: int, rows: int
) -> Iterator[pl.DataFrame]:
    """Read rows ``start`` to ``start + rows`` of a Parquet log; other files whole, in batches.

    Impressions of a Parquet log are left out. The column ``ROW`` holds row numbers, from 1.
    """
    names = _scanned_columns(file, reading)
    if names is None:
        wanted = {column.name for column in LOG.columns}
        yield from read_chunks(file, reading, columns=wanted, chunk_rows=rows)
    else:
        yield _scanned(file, names, start, rows)


def _scanned_columns(file: TableFile, reading: ReadingOptions) -> list[str] | None:
    """List the columns of a Parquet log that polars' faster reader reads as they are.

    None: the file is another one, or has types, names or values that ``read_chunks`` adapts.
    """
    if file.format != ".parquet" or file.partition:
        return None
    if reading.rename or reading.values or reading.constants:
        return None
    try:
        schema = pq.read_schema(file.path)
    except (OSError, pa.ArrowException):
        return None  # ``read_chunks`` says what is wrong
    wanted = {column.name for column in LOG.columns} - {"position"}
    fields = [field for field in schema if field.name in wanted]
    names = [field.name for field in fields]
    plain = all(plain_type(field.type) == field.type for field in fields)
    return names if plain and len(set(names)) == len(names) and ROW not in schema.names else None


def _scanned(file: TableFile, names: Sequence[str], start: int, rows: int) -> pl.DataFrame:
    """Read a part of a Parquet log by polars' reader, without impressions."""
    part = pl.scan_parquet(file.path, glob=False, hive_partitioning=False)
    part = part.slice(start, rows).with_row_index(ROW, offset=start + 1)
    if "action" in names:
        part = part.filter(_NO_IMPRESSION)
    return part.select(ROW, *names).collect()
