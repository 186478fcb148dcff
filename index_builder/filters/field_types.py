"""Types of attributes, and what may be one."""

from __future__ import annotations

import re
from typing import Any, Literal

import polars as pl

from index_builder.errors import BadAttribute
from index_builder.filters.times import are_times

FieldType = Literal[
    "int",
    "float",
    "bool",
    "string",
    "time",
    "list<int>",
    "list<float>",
    "list<string>",
    "list<time>",
]
BAD_NAME = (
    "cannot be an attribute: a name starts with a letter or _ and holds letters, digits and _."
    " Rename it."
)
_LOOKED_AT = 100
"""Lists that are enough to tell that most columns of texts hold no times."""
_NAME = re.compile(r"[^\W\d]\w*", re.UNICODE)
POLARS_TYPES: dict[str, Any] = {
    "int": pl.Int64,
    "float": pl.Float64,
    "bool": pl.Boolean,
    "string": pl.String,
}
"""Type of an attribute, or of a list's items -> the polars type that holds it."""


def is_attribute_name(name: str) -> bool:
    """Return whether filters can name it."""
    return _NAME.fullmatch(name) is not None


def field_type(name: str, dtype: pl.DataType) -> FieldType:
    """Return the attribute type of a column.

    Raises:
        BadAttribute: A column of that type cannot be an attribute.
    """
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
        inner = field_type(name, dtype.inner)  # type: ignore[arg-type]
        if inner in ("int", "float", "string"):
            return f"list<{inner}>"  # type: ignore[return-value]
    raise BadAttribute(
        f"column {name!r} of type {dtype} cannot be an attribute: expected numbers, booleans,"
        " strings, dates or flat lists of them. Leave the column out, or flatten it."
    )


def refined_type(name: str, series: pl.Series) -> FieldType:
    """Return the attribute type of a normalised column: texts that all are times are times."""
    type_ = field_type(name, series.dtype)
    if type_ == "string" and are_times(series):
        return "time"
    if type_ == "list<string>":
        some = series.head(_LOOKED_AT).explode()
        if some.null_count() == len(some) or are_times(some):
            return "list<time>" if are_times(series.explode()) else type_
    return type_


def can_be_attribute(series: pl.Series) -> bool:
    """Return whether a column has a name and a type that an ``AttributeTable`` takes."""
    try:
        return is_attribute_name(series.name) and bool(field_type(series.name, series.dtype))
    except BadAttribute:
        return False
