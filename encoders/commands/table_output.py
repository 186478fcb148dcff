"""Write a table chunk by chunk, in memory that does not grow with it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.errors import ConfigError

SUFFIXES = (".parquet", ".jsonl", ".csv")


class TableOutput:
    """A table that appears under its name when it is complete.

    All chunks have the columns and types of the first.
    """

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is written yet.

        Args:
            path: Ends in one of ``SUFFIXES``.

        Raises:
            ConfigError: It does not.
        """
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--out {path}: expected a name that ends in {', '.join(SUFFIXES)}.")
        self.rows = 0
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> TableOutput:
        """Return itself."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the table its name; after an error nothing stays."""
        if self._parquet is not None:
            self._parquet.close()
        if kind is None and self._partial.exists():
            os.replace(self._partial, self._path)
        self._partial.unlink(missing_ok=True)

    def write(self, frame: pl.DataFrame) -> None:
        """Append rows."""
        first = not self.rows and not self._partial.exists()
        self.rows += frame.height
        if self._path.suffix == ".parquet":
            table = frame.to_arrow()
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self._partial, table.schema, compression="zstd")
            self._parquet.write_table(_cast(table, self._parquet.schema))
            return
        with self._partial.open("ab") as file:
            if self._path.suffix == ".csv":
                frame.write_csv(file, include_header=first)
            else:
                frame.write_ndjson(file)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Bring a chunk whose columns were all null, or narrower, to the types of the first."""
    return table if table.schema.equals(schema) else table.cast(schema)
