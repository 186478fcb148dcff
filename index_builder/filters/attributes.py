"""Columnar attributes of one entity type: typed columns with sorted row orders, so that a filter's leaf is a slice of known size."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from index_builder.errors import BadAttribute

FieldType = Literal["int", "float", "bool", "string", "list<int>", "list<float>", "list<string>"]
Slices = list[tuple[int, int]]

_NAME = re.compile(r"[^\W\d]\w*", re.UNICODE)
_BAD_NAME = (
    "cannot be an attribute: a name starts with a letter or _ and holds letters, digits and _."
    " Rename it."
)
_NULL_INT = np.iinfo(np.int64).min


@dataclass(slots=True)
class Column:
    """Sortable keys of one attribute, one per value, with the row of each value.

    A string's key is its place in the sorted dictionary. Missing values have a key below every
    other (-1, or the lowest int64) or NaN, and are not in ``order``.

    Attributes:
        type: What the attribute holds.
        keys: ``(N,)`` keys by row; for lists ``(V,)`` keys of all values.
        order: uint32 rows in the order of their keys, missing ones left out.
        ranked: ``keys`` in the same order.
        dictionary: Sorted distinct strings, for string types.
        present: bool ``(N,)`` for list types: whether the row has a list at all.
        places: uint32 ``(N,)``, where each row stands in ``order`` (the highest number: nowhere);
            made when a mask is first wanted.
    """

    type: FieldType
    keys: np.ndarray
    order: np.ndarray
    ranked: np.ndarray
    dictionary: list[str] | None = None
    present: np.ndarray | None = None
    places: np.ndarray | None = None

    @property
    def is_list(self) -> bool:
        """Whether a row holds many values."""
        return self.type.startswith("list")

    def mask(self, low: int, high: int) -> np.ndarray:
        """Rows whose place in ``order`` is in ``[low, high)``, bool ``(N,)``; not for lists."""
        if self.places is None:
            places = np.full(len(self.keys), np.iinfo(np.uint32).max, dtype=np.uint32)
            places[self.order] = np.arange(len(self.order), dtype=np.uint32)
            self.places = places
        result: np.ndarray = (self.places - np.uint32(low)) < np.uint32(
            high - low
        )  # below `low` wraps around to large numbers
        return result

    def slices(self, op: str, value: int | float | str | bool) -> Slices:
        """Ranges of ``order`` whose values satisfy ``value_of_row op value``; disjoint, ascending, without empty ones."""
        low, high = self._bounds(value)
        size = len(self.ranked)
        ranges = {
            "==": [(low, high)],
            "!=": [(0, low), (high, size)],
            "<": [(0, low)],
            "<=": [(0, high)],
            ">": [(high, size)],
            ">=": [(low, size)],
        }[op]
        return [(a, b) for a, b in ranges if a < b]

    def between(self, op: str, value: int | float) -> tuple[int, int]:
        """The range of ``order`` whose numbers satisfy ``number op value``, for every ``op`` but ``!=``; may be empty or upside down."""
        low = 0 if op[0] == "<" else self._count_below(value, inclusive=op == ">")
        high = len(self.ranked) if op[0] == ">" else self._count_below(value, inclusive=op != "<")
        return low, high

    def _count_below(self, value: int | float, *, inclusive: bool) -> int:
        if self.ranked.dtype == np.int64 and type(value) is int and -(2**62) < value < 2**62:
            return int(self.ranked.searchsorted(value + inclusive))
        return self._bounds(value)[inclusive]

    def slices_in(self, values: Sequence[Any], *, negated: bool) -> Slices:
        """Ranges of ``order`` whose values are (not) among ``values``."""
        hits = sorted({pair for value in values for pair in self.slices("==", value)})
        if not negated:
            return hits
        result, start = [], 0
        for a, b in hits:
            if start < a:
                result.append((start, a))
            start = b
        if start < len(self.ranked):
            result.append((start, len(self.ranked)))
        return result

    def _bounds(self, value: int | float | str | bool) -> tuple[int, int]:
        """Insertion points left and right of ``value`` among the ranked keys."""
        if self.dictionary is not None:
            assert isinstance(value, str), "bound filters compare strings with strings"
            left, right = bisect_left(self.dictionary, value), bisect_right(self.dictionary, value)
            ranked = self.ranked
            return int(ranked.searchsorted(np.int32(left), "left")), int(
                ranked.searchsorted(np.int32(right), "left")
            )
        if self.ranked.dtype.kind == "f":
            try:
                key = self.ranked.dtype.type(float(value))
            except OverflowError:
                key = self.ranked.dtype.type(math.inf if value > 0 else -math.inf)  # type: ignore[operator]
            return int(self.ranked.searchsorted(key, "left")), int(
                self.ranked.searchsorted(key, "right")
            )
        number = float(value) if isinstance(value, float) else int(value)
        if isinstance(number, float) and not math.isfinite(number):
            at = len(self.ranked) if number > 0 else 0
            return at, at
        lower, upper = (
            math.ceil(number),
            math.floor(number),
        )  # equal for whole numbers; else nothing equals the value
        return self._first_at_least(lower), self._first_at_least(upper + 1)

    def _first_at_least(self, key: int) -> int:
        info = np.iinfo(self.ranked.dtype)
        if key <= info.min:
            return 0
        if key > info.max:
            return len(self.ranked)
        return int(self.ranked.searchsorted(self.ranked.dtype.type(key), "left"))


def _sorted_column(
    type_: FieldType,
    keys: np.ndarray,
    valid: np.ndarray | None,
    dictionary: list[str] | None = None,
) -> Column:
    rows = (
        np.arange(len(keys), dtype=np.uint32)
        if valid is None
        else np.flatnonzero(valid).astype(np.uint32)
    )
    order = rows[np.argsort(keys[rows], kind="stable")]
    return Column(type_, keys, order, keys[order], dictionary)


def _type_of(name: str, dtype: pl.DataType) -> FieldType:
    if dtype.is_integer():
        return "int"
    if dtype.is_float():
        return "float"
    if dtype == pl.Boolean:
        return "bool"
    if (
        dtype == pl.String
        or isinstance(dtype, pl.Categorical | pl.Enum | pl.Null)
        or dtype.is_temporal()
    ):
        return "string"
    if isinstance(dtype, pl.List | pl.Array):
        inner = _type_of(name, dtype.inner)  # type: ignore[arg-type]
        if inner in ("int", "float", "string"):
            return f"list<{inner}>"  # type: ignore[return-value]
    raise BadAttribute(
        f"column {name!r} of type {dtype} cannot be an attribute: expected numbers, booleans,"
        " strings, dates or flat lists of them. Leave the column out, or flatten it."
    )


_POLARS: dict[str, Any] = {
    "int": pl.Int64,
    "float": pl.Float64,
    "bool": pl.Boolean,
    "string": pl.String,
}


def _normalise(name: str, series: pl.Series) -> pl.Series:
    """Dates become ISO 8601 strings, which sort by time; integers int64; categories strings."""
    type_ = _type_of(name, series.dtype)
    inner = series.dtype.inner if isinstance(series.dtype, pl.List | pl.Array) else series.dtype
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    base = type_[5:-1] if type_.startswith("list") else type_
    if base == "float" and inner == pl.Float32:
        return series
    target = _POLARS[base]
    if inner == target:
        return series
    try:
        if inner.is_temporal():  # type: ignore[union-attr]
            return (
                series.list.eval(_iso(pl.element(), inner))
                if type_.startswith("list")
                else series.to_frame().select(_iso(pl.col(name), inner))[name]
            )
        return series.cast(pl.List(target) if type_.startswith("list") else target)
    except pl.exceptions.PolarsError as error:
        raise BadAttribute(
            f"column {name!r} of type {series.dtype} does not fit an attribute of type {type_}:"
            f" {error}"
        ) from error


def _iso(expression: pl.Expr, dtype: Any) -> pl.Expr:
    """Times as Python's ``isoformat`` writes them, which is what live updates send."""
    if isinstance(dtype, pl.Datetime):
        zone = "%:z" if dtype.time_zone else ""
        return (
            expression.dt.cast_time_unit("us")
            .dt.to_string(f"%Y-%m-%dT%H:%M:%S%.6f{zone}")
            .str.replace(r"\.000000", "")
        )
    return expression.dt.to_string("iso")


def _keys_of(
    type_: str, series: pl.Series
) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Keys, validity (None when all are valid) and dictionary of a flat series."""
    valid = None if series.null_count() == 0 else series.is_not_null().to_numpy()
    if type_ == "string":
        words = series.drop_nulls().unique().sort()
        dictionary = words.to_list()
        codes = (
            series.cast(pl.Enum(words)).to_physical().cast(pl.Int32).fill_null(-1)
            if dictionary
            else pl.Series([-1] * len(series), dtype=pl.Int32)
        )
        return codes.to_numpy().astype(np.int32), valid, dictionary
    if type_ == "bool":
        return series.cast(pl.Int8).fill_null(-1).to_numpy().astype(np.int8), valid, None
    if type_ == "int":
        return series.fill_null(_NULL_INT).to_numpy().astype(np.int64), valid, None
    keys = series.fill_null(math.nan).to_numpy().copy()
    missing = np.isnan(keys)
    return keys, (~missing if missing.any() else None), None


def fitted(series: pl.Series, dtype: pl.DataType) -> pl.Series:
    """The values of ``series`` as ``dtype``; those that it cannot hold are null.

    Fractions stay: floats in the place of integers.
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
    """The first ``count`` rows of a column made by ``json_columns`` as ``dtype``: missing columns and impossible values are null."""
    if name not in frame.columns:
        return pl.Series(name, [None] * count, dtype=dtype)
    parts = [
        fitted(frame[part].head(count), dtype).alias(part)
        for part in frame.columns
        if part.startswith(name + _OF_ONE_TYPE)
    ]
    if parts:
        return pl.DataFrame(parts).select(pl.coalesce(pl.all()).alias(name))[name]
    return fitted(frame[name].head(count), dtype)


_OF_ONE_TYPE = "\0"
"""Behind a name of several types: a column that holds those values which are of one.

No attribute can be called so.
"""
_JSON_TYPES = {int: "int", float: "float", bool: "bool", str: "string"}


def json_columns(name: str, cells: Sequence[Any]) -> list[pl.Series]:
    """JSON values as a column of the type that they have in common.

    Where they have none, or none that an attribute can have: a column of Python objects, and for
    ``fitted_column`` one more for each type.
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
            f"{name}{_OF_ONE_TYPE}{len(parts)}",
            [cell if found == kind else None for cell, found in zip(cells, kinds)],
        )
        if part is not None:
            parts.append(part)
    return [pl.Series(name, cells, dtype=pl.Object), *parts]


def is_of_one_type(name: str) -> bool:
    """Whether a column of ``json_columns`` only repeats, for ``fitted_column``, what another one holds."""
    return _OF_ONE_TYPE in name


def _of_common_type(name: str, cells: Sequence[Any]) -> pl.Series | None:
    types = set(map(type, cells)) - {type(None)}
    in_lists = types == {list}
    if in_lists:
        types = set(map(type, chain.from_iterable(cell for cell in cells if cell is not None))) - {
            type(None)
        }
    kinds = {_JSON_TYPES.get(found, "") for found in types}
    kind = (
        "float"
        if kinds == {"int", "float"}
        else kinds.pop()
        if len(kinds) == 1
        else ""
        if kinds
        else "nothing"
    )
    if not kind or (in_lists and kind == "bool"):
        return None
    leaf = _POLARS.get(kind, pl.Null)
    try:
        return pl.Series(name, cells, dtype=pl.List(leaf) if in_lists else leaf)
    except (OverflowError, pl.exceptions.PolarsError):  # a number that needs more than 64 bits
        return None


def of_one_type(series: pl.Series) -> pl.Series:
    """A column of ``json_columns`` without what no attribute can hold; what is left of several types becomes text."""
    if series.dtype != pl.Object:
        return series
    cells = [
        cell if cell is not None and _kind_of(cell) is not None else None
        for cell in series.to_list()
    ]
    column = _of_common_type(series.name, cells)
    if column is None:
        return pl.Series(
            series.name, [None if cell is None else str(cell) for cell in cells], dtype=pl.String
        )
    return series if column.dtype == pl.Null else column


def _is_whole(dtype: pl.DataType) -> bool:
    return (dtype.inner if isinstance(dtype, pl.List) else dtype) == pl.Int64


def _has_fractions(series: pl.Series) -> bool:
    numbers = series.explode() if isinstance(series.dtype, pl.List) else series
    return numbers.dtype.is_float() and bool((numbers != numbers.floor()).any())


def check_attributes(values: Mapping[str, Any], schema: Mapping[str, str], where: str) -> None:
    """See that attributes of one entity can be filtered and built into a release.

    Args:
        values: JSON values by name; None is a missing value.
        schema: What the index holds (``AttributeTable.schema``); numbers of either kind fit each
            other. Other names may have any flat type.
        where: Begins the message.

    Raises:
        BadAttribute: A name, a nested or mixed list, NaN or infinity, or a type that does not fit.
    """
    for name, value in values.items():
        if not is_attribute_name(name):
            raise BadAttribute(f"{where}: attribute {name!r} {_BAD_NAME}")
        if value is None:
            continue
        kind = _kind_of(value)
        if kind is None:
            raise BadAttribute(
                f"{where}: attribute {name!r} must be a finite number, a text, true or false, or a"
                f" flat list of numbers or of texts, but is {_shown(value)}."
            )
        wanted = schema.get(name)
        if wanted is not None and not _fits(kind, wanted):
            raise BadAttribute(
                f"{where}: attribute {name!r} is {wanted} in the release, but got {_shown(value)},"
                f" which is {kind}."
            )


def is_attribute_name(name: str) -> bool:
    """Whether filters can name it."""
    return _NAME.fullmatch(name) is not None


def can_be_attribute(series: pl.Series) -> bool:
    """Whether a column has a name and a type that an ``AttributeTable`` takes."""
    try:
        return is_attribute_name(series.name) and bool(_type_of(series.name, series.dtype))
    except BadAttribute:
        return False


def _kind_of(value: Any) -> str | None:
    """The type of a JSON value in the words of ``FieldType``; None if no column holds it."""
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
    if kinds == {"int", "float"}:
        kinds = {"float"}
    kind = kinds.pop() if len(kinds) == 1 else None if kinds else ""
    return f"list<{kind}>" if kind in ("int", "float", "string", "") else None


def _fits(kind: str, wanted: str) -> bool:
    if kind == "list<>":
        return wanted.startswith("list")
    return kind.replace("float", "int") == wanted.replace("float", "int")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class AttributeTable:
    """Attributes of ``count`` rows; columns are prepared for filtering when a filter first names them, or by ``warm``."""

    def __init__(self, frame: pl.DataFrame) -> None:
        for name in frame.columns:
            if not is_attribute_name(name):
                raise BadAttribute(f"column {name!r} {_BAD_NAME}")
        self.frame = frame.with_columns(
            [_normalise(name, frame[name]).alias(name) for name in frame.columns]
        )
        self.count = len(frame)
        self.schema: dict[str, FieldType] = {
            name: _type_of(name, dtype) for name, dtype in self.frame.schema.items()
        }
        self._columns: dict[str, Column] = {}

    @classmethod
    def aligned(cls, frame: pl.DataFrame, like: AttributeTable, count: int) -> AttributeTable:
        """The first ``count`` rows of ``frame`` with the columns and types of ``like``: missing columns and impossible values are null."""
        columns = [
            fitted_column(frame, name, dtype, count) for name, dtype in like.frame.schema.items()
        ]
        table = cls(pl.DataFrame(columns))
        table.count = count
        return table

    @classmethod
    def empty(cls, count: int) -> AttributeTable:
        """A table of ``count`` rows without any attribute."""
        table = cls(pl.DataFrame())
        table.count = count
        return table

    def column(self, name: str) -> Column:
        """The column prepared for filtering; ``name`` must be in ``schema``."""
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = self._prepare(name)
        return column

    def _prepare(self, name: str) -> Column:
        type_, series = self.schema[name], self.frame[name]
        if not type_.startswith("list"):
            keys, valid, dictionary = _keys_of(type_, series)
            return _sorted_column(type_, keys, valid, dictionary)
        exploded = (
            pl.DataFrame({"row": pl.Series(range(self.count), dtype=pl.UInt32), "value": series})
            .explode("value")
            .drop_nulls()
            .unique()
        )
        exploded = exploded.sort("value", "row")
        keys, _, dictionary = _keys_of(type_[5:-1], exploded["value"])
        return Column(
            type_,
            keys,
            exploded["row"].to_numpy().copy(),
            keys,
            dictionary,
            series.is_not_null().to_numpy(),
        )

    def warm(self, names: Sequence[str] | None = None) -> None:
        """Prepare the named columns now (all by default), so that forked workers share them."""
        for name in self.schema if names is None else names:
            column = self.column(name)
            if not column.is_list:
                column.mask(0, 0)

    def values(
        self, rows: Sequence[int] | np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Attribute values of rows, in order; unknown names are absent from the result."""
        known = [name for name in names if name in self.schema]
        if not known:
            return [{} for _ in rows]
        if len(rows) == 0:
            return []
        picked: list[dict[str, Any]] = self.frame.select(known)[
            np.asarray(rows, dtype=np.int64)
        ].to_dicts()
        return picked

    def save(self, path: Path) -> None:
        """Write the attributes as Parquet."""
        self.frame.write_parquet(path, compression="zstd", statistics=False)

    @classmethod
    def load(cls, path: Path, count: int) -> AttributeTable:
        """Read what ``save`` wrote; ``count`` is the number of rows of the index."""
        table = cls(pl.read_parquet(path, memory_map=False))
        if table.schema and table.count != count:
            raise BadAttribute(
                f"{path.name} holds {table.count} rows, but the index holds {count}. Rebuild this"
                " release."
            )
        table.count = count
        return table

    def rows_of(self, mapping: Mapping[str, Any]) -> pl.DataFrame:
        """One row with this table's columns from a mapping; unknown keys are dropped, missing ones null."""
        return pl.DataFrame(
            {
                name: pl.Series(name, [mapping.get(name)], dtype=dtype, strict=False)
                for name, dtype in self.frame.schema.items()
            }
        )
