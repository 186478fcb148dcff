"""Logs of any form give the same events, batch by batch, and every row is an event or counted."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoders.errors import DataError
from encoders.logs.events import EngagementRules, read_events
from encoders.tables.files import write_table
from encoders.tables.reading_options import ReadingOptions

RULES = EngagementRules()
COUNT = 50


def log_frame() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "timestamp": [1_700_000_000 + n for n in range(COUNT)],
            "query": [f'red "barn" {n}, old' for n in range(COUNT)],
            "entity_type": "pin",
            "entity_id": [f"p{n % 7}" for n in range(COUNT)],
            "action": ["impression" if n % 5 == 0 else "save" for n in range(COUNT)],
        }
    )


def events_of(path: Path, batch_rows: int = 8, **options: object) -> pl.DataFrame:
    batches = read_events(path, RULES, batch_rows=batch_rows, **options)  # type: ignore[arg-type]
    return pl.concat([batch.frame for batch in batches])


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.jsonl", "l.csv.gz", "l.arrow"])
def test_read_events_every_format_gives_what_parquet_gives(name: str, tmp_path: Path) -> None:
    write_table(log_frame(), tmp_path / name)
    write_table(log_frame(), tmp_path / "l.parquet")
    wanted = events_of(tmp_path / "l.parquet")
    assert wanted.height == COUNT - COUNT // 5
    assert events_of(tmp_path / name).equals(wanted)


def test_read_events_batches_are_no_larger_than_asked(tmp_path: Path) -> None:
    for name in ("l.csv", "l.jsonl", "l.parquet"):
        write_table(log_frame(), tmp_path / name)
        batches = list(read_events(tmp_path / name, RULES, batch_rows=8))
        assert len(batches) >= COUNT // 8
        assert max(batch.report.rows_read for batch in batches) <= 8


@pytest.mark.parametrize("zone", ["Z", "+05:30", "UTC+2", "Europe/Berlin", "UTC"])
def test_read_events_times_of_any_zone_are_the_same_moments(zone: str, tmp_path: Path) -> None:
    moments = [dt.datetime(2024, 5, 1, 12, n, tzinfo=dt.UTC) for n in range(3)]
    columns = {
        "timestamp": pa.array(moments, pa.timestamp("us", zone)),
        "query": ["a", "b", "c"],
        "entity_type": ["pin"] * 3,
        "entity_id": ["p"] * 3,
        "action": ["save"] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    assert events_of(tmp_path / "l.parquet", batch_rows=2)["timestamp"].to_list() == moments


def test_read_events_malformed_rows_are_refused_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    write_table(log_frame(), path)
    path.write_text(path.read_text() + "1700000100,cut")
    with pytest.raises(DataError, match="row 51: expected 5 cells, got 2"):
        events_of(path)
    batches = list(read_events(path, RULES, on_bad_rows="drop"))
    assert sum(batch.frame.height for batch in batches) == COUNT - COUNT // 5
    assert sum(sum(batch.report.rules_broken.values()) for batch in batches) == 1


def test_read_events_renamed_and_mapped_columns_are_read(tmp_path: Path) -> None:
    frame = log_frame().rename({"query": "q"}).with_columns(action=pl.lit("buy"))
    write_table(frame.drop("entity_type"), tmp_path / "l.parquet")
    reading = ReadingOptions(
        rename={"q": "query"},
        values={"action": {"buy": "checkout"}},
        constants={"entity_type": "product"},
    )
    events = events_of(tmp_path / "l.parquet", reading=reading)
    assert events.height == COUNT
    assert set(events["action"]) == {"checkout"}


def test_read_events_file_without_a_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("")
    with pytest.raises(DataError, match="empty"):
        events_of(tmp_path / "l.csv")
