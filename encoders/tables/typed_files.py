"""Read Parquet and Arrow files in chunks; types of other systems become those that tables have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from encoders.errors import DataError, SchemaError
from encoders.tables.schemas import MALFORMED, ROW

_ARROW_FILE = b"ARROW1"
"""First bytes of an Arrow file; what begins otherwise may be a stream (DuckDB, Flight)."""
_UNREADABLE = "cannot be read as {kind} ({error}). Is the file complete?"


def parquet_chunks(
    path: Path, columns: Collection[str] | None, chunk_rows: int
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a Parquet file with their ``ROW``; of ``columns``, those that are there.

    Raises:
        DataError: The file is unreadable.
        SchemaError: A column stands twice, or its type cannot be read.
    """
    try:
        with pq.ParquetFile(path) as parquet:
            check_names(parquet.schema_arrow.names, path.name)
            wanted = None
            if columns is not None:
                wanted = [name for name in parquet.schema_arrow.names if name in columns]
            batches = parquet.iter_batches(batch_size=chunk_rows, columns=wanted)
            yield from _frames(batches, parquet.schema_arrow, path.name)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path.name}: {_UNREADABLE.format(kind='parquet', error=first_line(error))}"
        ) from error


def arrow_chunks(path: Path) -> Iterator[pl.DataFrame]:
    """Yield the rows of an Arrow IPC file (Feather 2) or stream with their ``ROW``, in batches.

    Raises:
        DataError: The file is unreadable.
        SchemaError: A column stands twice, or its type cannot be read.
    """
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
            source.seek(0)
            if not is_file:
                with pa.ipc.open_stream(source) as stream:
                    check_names(stream.schema.names, path.name)
                    yield from _frames(iter(stream), stream.schema, path.name)
                return
            with pa.ipc.open_file(source) as file:
                check_names(file.schema.names, path.name)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
                yield from _frames(batches, file.schema, path.name)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path.name}: {_UNREADABLE.format(kind='arrow', error=first_line(error))}"
        ) from error


def _frames(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, source: str
) -> Iterator[pl.DataFrame]:
    """Turn batches into frames; a file without rows gives one frame without rows."""
    row = 1
    for batch in batches:
        if batch.num_rows:
            yield plain_frame(pa.Table.from_batches([batch]), source).with_row_index(
                ROW, offset=row
            )
            row += batch.num_rows
    if row == 1:
        yield plain_frame(schema.empty_table(), source).with_row_index(ROW, offset=1)


def check_names(names: Collection[str], source: str) -> None:
    """Refuse a file that names a column twice, or as this program names its own.

    Raises:
        SchemaError: It does.
    """
    listed = list(names)
    for name in (ROW, MALFORMED):
        if name in listed:
            raise SchemaError(f"{source}: the name of the column {name!r} is taken. Rename it.")
    repeated = [name for name in listed if listed.count(name) > 1]
    if repeated:
        raise SchemaError(
            f"{source}: the column {repeated[0]!r} stands {listed.count(repeated[0])} times."
            " Rename or remove all but one."
        )


def plain_frame(table: pa.Table, source: str) -> pl.DataFrame:
    """Turn an Arrow table into a frame of the types that tables have.

    Decimals become numbers, times with any zone UTC, dictionaries their values.

    Raises:
        SchemaError: A column's type cannot be read.
        DataError: A text is not UTF-8.
    """
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        try:
            column = _plain_column(column)
            column.validate(full=True)
            columns[field.name] = cast(pl.Series, pl.from_arrow(column))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{source}: column {field.name!r} holds what its type {field.type} does not allow"
                f" ({first_line(error)}). Write the file again."
            ) from error
        except (pa.ArrowException, pl.exceptions.PolarsError) as error:
            raise _unknown_type(field, source) from error
        except BaseException as error:
            # What polars does not know, its Rust side panics on, below BaseException.
            if type(error).__name__ != "PanicException":
                raise
            raise _unknown_type(field, source) from None
    return pl.DataFrame(columns)


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast a column to its plain type; whole decimals that need more than 64 bits become text."""
    wanted = plain_type(column.type)
    if wanted == column.type:
        return column
    if pa.types.is_dictionary(column.type):
        # A direct cast knows no dictionaries of string_view, which polars writes
        values = [
            chunk.dictionary.cast(_taken(wanted)).take(chunk.indices) for chunk in column.chunks
        ]
        return pa.chunked_array(values, type=_taken(wanted))
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        lists = [_list_of_view(chunk) for chunk in column.chunks]
        return _plain_column(pa.chunked_array(lists, type=pa.large_list(column.type.value_type)))
    if pa.types.is_decimal(column.type) and pa.types.is_floating(wanted):
        # A direct cast multiplies, so 9.95 becomes 9.950000000000001
        return column.cast(pa.string()).cast(wanted)
    try:
        return column.cast(wanted)
    except pa.ArrowInvalid:
        if not pa.types.is_decimal(column.type):
            raise
        return column.cast(pa.string())


def _taken(found: pa.DataType) -> pa.DataType:
    """Return the type as which values can be taken by their places."""
    if pa.types.is_string_view(found) or pa.types.is_string(found):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(found) else found


def _list_of_view(views: pa.Array) -> pa.Array:
    """Lay the lists of a view one behind the other; a cast leaves the buffer of offsets short."""
    lengths = pc.fill_null(pc.list_value_length(views), 0)
    ends = pc.cumulative_sum(lengths).cast(pa.int64())
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    return pa.LargeListArray.from_arrays(offsets, views.flatten(), mask=views.is_null())


def _unknown_type(field: pa.Field, source: str) -> SchemaError:
    return SchemaError(
        f"{source}: column {field.name!r} of type {field.type} cannot be read. Write it as text,"
        " numbers, dates or lists of them, or leave it out."
    )


def plain_type(found: pa.DataType) -> pa.DataType:
    """Return the type that a column of type ``found`` is read as."""
    if pa.types.is_dictionary(found):
        return plain_type(found.value_type)
    if pa.types.is_decimal(found):
        return pa.float64() if found.scale > 0 else pa.int64()
    if pa.types.is_float16(found):
        return pa.float32()
    if pa.types.is_timestamp(found) and found.tz is not None:
        return pa.timestamp(found.unit, "UTC")
    if pa.types.is_list(found) or pa.types.is_list_view(found):
        return pa.list_(plain_type(found.value_type))
    if pa.types.is_large_list(found) or pa.types.is_large_list_view(found):
        return pa.large_list(plain_type(found.value_type))
    if pa.types.is_fixed_size_list(found):
        return pa.list_(plain_type(found.value_type), found.list_size)
    if isinstance(found, pa.BaseExtensionType):
        return plain_type(found.storage_type)
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
