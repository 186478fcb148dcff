"""Columns of files that have types: what Spark, pandas and databases write is read as it is."""

from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from encoders.tables.files import read_table
from encoders.tables.stream import _raw_chunks

INTEGERS = (
    (pl.Int8, 127),
    (pl.Int16, 32_767),
    (pl.Int32, 2**31 - 1),
    (pl.Int64, 2**53 + 1),
    (pl.UInt8, 255),
    (pl.UInt16, 65_535),
    (pl.UInt32, 2**32 - 1),
    (pl.UInt64, 2**63 - 1),
)


def catalogue(values: pl.Series) -> pl.DataFrame:
    count = len(values)
    return pl.DataFrame(
        {
            "id": [f"p{i}" for i in range(count)],
            "entity_type": ["pin"] * count,
            "title": ["red lamp"] * count,
            "stock": values,
        }
    )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(("dtype", "largest"), INTEGERS, ids=lambda value: str(value))
def test_read_table_integer_of_any_width_keeps_its_values(
    dtype: type[pl.DataType], largest: int, suffix: str, tmp_path: Path
) -> None:
    frame = catalogue(pl.Series([0, None, largest], dtype=dtype))
    path = tmp_path / f"catalogue.{suffix}"
    frame.write_parquet(path) if suffix == "parquet" else frame.write_ipc(path)
    assert read_table(path, "catalogue")["stock"].to_list() == [0, None, largest]


def test_read_table_decimal_column_is_numbers(tmp_path: Path) -> None:
    values = pl.Series([Decimal("1.25"), None], dtype=pl.Decimal(10, 2))
    catalogue(values).write_parquet(tmp_path / "catalogue.parquet")
    stock = read_table(tmp_path / "catalogue.parquet", "catalogue")["stock"]
    assert stock.dtype == pl.Float64
    assert stock.to_list() == [1.25, None]


def test_read_table_column_of_nulls_only_is_read(tmp_path: Path) -> None:
    catalogue(pl.Series([None, None], dtype=pl.Int16)).write_parquet(tmp_path / "c.parquet")
    assert read_table(tmp_path / "c.parquet", "catalogue")["stock"].to_list() == [None, None]


def test_stream_catalogue_typed_columns_read_as_by_read_table(tmp_path: Path) -> None:
    """Rebuild and embed stream what validate and train read whole."""
    path = tmp_path / "catalogue.parquet"
    values = pl.Series([Decimal("1.25"), None], dtype=pl.Decimal(10, 2))
    small = pl.Series("small", [1, 2], dtype=pl.Int16)
    catalogue(values).with_columns(small).write_parquet(path)
    chunks = pl.concat(list(_raw_chunks(path, None, 1)))
    assert chunks["stock"].to_list() == read_table(path, "catalogue")["stock"].to_list()
    assert chunks["small"].to_list() == [1, 2]
