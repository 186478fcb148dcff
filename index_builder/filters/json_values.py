"""JSON values of attributes: check them, and lay them out as columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import polars as pl

from index_builder.errors import BadAttribute
from index_builder.filters.field_types import (
    BAD_NAME,
    POLARS_TYPES,
    field_type,
    is_attribute_name,
)
from index_builder.filters.times import is_time

log = logging.getLogger(__name__)

_PART_MARK = "\0"
"""Between the name of a column with several types and the number of a part that holds one of them.

No attribute's name holds it.
"""
_JSON_TYPES = {int: "int", float: "float", bool: "bool", str: "string"}


def json_columns(name: str, cells: Sequence[Any]) -> list[pl.Series]:
    """Lay JSON values out as a column of the type that they have in common.

    Where they have none, or none that an attribute can have: a column of Python objects, and for
    ``fitted_column`` one part for each type, which holds the values of that type.
    """
    column = _of_common_type(name, cells)
    if column is not None:
        return [column]
    kinds = [
        (type(cell), frozenset(map(type, cell)) if isinstance(cell, list) else None)
        for cell in cells
    ]
    parts: list[pl.Series] = []
    for kind in dict.fromkeys(kinds):
        part = _of_common_type(
            f"{name}{_PART_MARK}{len(parts)}",
            [cell if found == kind else None for cell, found in zip(cells, kinds)],
        )
        if part is not None:
            parts.append(part)
    return [pl.Series(name, cells, dtype=pl.Object), *parts]


def is_part(name: str) -> bool:
    """Return whether a column of ``json_columns`` is a part, which repeats values of another."""
    return _PART_MARK in name


def _of_common_type(name: str, cells: Sequence[Any]) -> pl.Series | None:
    """Lay values out as a column of their common type; None where no attribute has such a type."""
    types = set(map(type, cells)) - {type(None)}
    in_lists = types == {list}
    if in_lists:
        items = chain.from_iterable(cell for cell in cells if cell is not None)
        types = set(map(type, items)) - {type(None)}
    kinds = {_JSON_TYPES.get(found, "") for found in types}
    if kinds == {"int", "float"}:
        kinds = {"float"}
    if len(kinds) > 1 or "" in kinds or (in_lists and "bool" in kinds):
        return None
    leaf = POLARS_TYPES[kinds.pop()] if kinds else pl.Null
    try:
        return pl.Series(name, cells, dtype=pl.List(leaf) if in_lists else leaf)
    except (OverflowError, pl.exceptions.PolarsError):  # a number that needs more than 64 bits
        return None


def of_one_type(series: pl.Series, sequences: Sequence[int]) -> pl.Series:
    """Reduce a column of ``json_columns`` to the type of the value that was written first.

    Values that do not fit it become null, which is logged: no text is made of them. Writes are
    checked against earlier ones, so that these are left of writers that knew nothing of each other.

    Args:
        series: The column.
        sequences: Place of each row's write in the log.
    """
    if series.dtype != pl.Object:
        return series
    cells = series.to_list()
    kinds = [_kind_of(cell) for cell in cells]
    known = [
        (sequence, kind)
        for sequence, kind in zip(sequences, kinds)
        if kind is not None and kind != "list<>"
    ]
    wanted = min(known)[1] if known else "list<>"
    kept = [
        cell if kind is not None and _fits(cell, kind, wanted) else None
        for cell, kind in zip(cells, kinds)
    ]
    lost = sum(cell is not None for cell in cells) - sum(cell is not None for cell in kept)
    log.warning(
        f"attribute {series.name!r}: {lost:,} live values are not {wanted}, as the first that was"
        " written is, and are missing in this release"
    )
    column = _of_common_type(series.name, kept)
    return series if column is None or column.dtype == pl.Null else column


def _is_whole(dtype: pl.DataType) -> bool:
    """Return whether a type holds integers or lists of them."""
    return (dtype.inner if isinstance(dtype, pl.List) else dtype) == pl.Int64


def _has_fractions(series: pl.Series) -> bool:
    """Return whether any number of a column, or of its lists, is no integer."""
    numbers = series.explode() if isinstance(series.dtype, pl.List) else series
    return numbers.dtype.is_float() and bool((numbers != numbers.floor()).any())


def fitted(series: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Cast ``series`` to ``dtype``; values that it cannot hold become null.

    Fractions stay: where integers are wanted, the column then holds floats.
    """
    if series.dtype == dtype:
        return series
    if _is_whole(dtype) and _has_fractions(series):
        dtype = pl.List(pl.Float64) if isinstance(dtype, pl.List) else pl.Float64()
    try:
        return series.cast(dtype, strict=False)
    except pl.exceptions.PolarsError:  # lists for scalars, or the other way round
        return pl.Series(series.name, [None] * len(series), dtype=dtype)


def fitted_column(frame: pl.DataFrame, name: str, dtype: pl.DataType, count: int) -> pl.Series:
    """Cast the first ``count`` rows of a column of ``json_columns`` to ``dtype``.

    Missing columns and values that ``dtype`` cannot hold become null.
    """
    if name not in frame.columns:
        return pl.Series(name, [None] * count, dtype=dtype)
    parts = [
        fitted(frame[part].head(count), dtype).alias(part)
        for part in frame.columns
        if part.startswith(name + _PART_MARK)
    ]
    if parts:
        return pl.DataFrame(parts).select(pl.coalesce(pl.all()).alias(name))[name]
    return fitted(frame[name].head(count), dtype)


def column_types(frame: pl.DataFrame) -> dict[str, str]:
    """Return the type of each column of ``json_columns``; where there are several, the first one.

    A column without any value has none.
    """
    types: dict[str, str] = {}
    for series in frame:
        name, _, _ = series.name.partition(_PART_MARK)
        dtype: Any = series.dtype
        inner = dtype.inner if isinstance(dtype, pl.List) else dtype
        if name not in types and inner not in (pl.Null, pl.Object):
            types[name] = field_type(name, dtype)
    return types


def learn_types(types: dict[str, str], values: Mapping[str, Any]) -> None:
    """Add the types of checked values whose attributes have none yet."""
    for name, value in values.items():
        kind = _kind_of(value)
        if name not in types and kind is not None and kind != "list<>":
            types[name] = kind


def check_attributes(values: Mapping[str, Any], schema: Mapping[str, str], where: str) -> None:
    """Check that attributes of one entity can be filtered and built into a release.

    Args:
        values: JSON values by name; None is a missing value.
        schema: Types that the index holds (``AttributeTable.schema``), and those of attributes that
            came since (``learn_types``); numbers of either kind fit each other. Other names may
            have any flat type.
        where: Begins the message.

    Raises:
        BadAttribute: A name, a nested or mixed list, NaN or infinity, or a type that does not fit.
    """
    for name, value in values.items():
        if not is_attribute_name(name):
            raise BadAttribute(f"{where}: attribute {name!r} {BAD_NAME}")
        if value is None:
            continue
        kind = _kind_of(value)
        if kind is None:
            raise BadAttribute(
                f"{where}: attribute {name!r} must be a finite number, a text, true or false, or a"
                f" flat list of numbers or of texts, but is {_shown(value)}."
            )
        wanted = schema.get(name)
        if wanted is not None and not _fits(value, kind, wanted):
            hint = " Write 2024-05-01 or 2024-05-01T12:30:00Z." if "time" in wanted else ""
            raise BadAttribute(
                f"{where}: attribute {name!r} is {wanted} in this index, but got {_shown(value)},"
                f" which is {kind}.{hint}"
            )


def _kind_of(value: Any) -> str | None:
    """Return the type of a JSON value, as ``FieldType`` spells it; None if no column holds it.

    An empty list is a ``list<>``.
    """
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) < value < 2**63 else None
    if isinstance(value, float):
        return "float" if math.isfinite(value) else None
    if isinstance(value, str):
        return "string"
    if not isinstance(value, list | tuple):
        return None
    kinds = {_kind_of(item) for item in value}
    if not kinds:
        return "list<>"
    if kinds == {"int", "float"}:
        return "list<float>"
    kind = kinds.pop() if len(kinds) == 1 else None
    return f"list<{kind}>" if kind in ("int", "float", "string") else None


def _fits(value: Any, kind: str, wanted: str) -> bool:
    """Return whether a value of a kind fits an attribute; numbers of either kind fit each other."""
    if kind == "list<>":
        return wanted.startswith("list")
    if wanted == "time":
        return kind == "string" and is_time(value)
    if wanted == "list<time>":
        return kind == "list<string>" and all(map(is_time, value))
    return kind.replace("float", "int") == wanted.replace("float", "int")


def _shown(value: Any) -> str:
    """Shorten a value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
