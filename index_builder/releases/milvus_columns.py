"""Rows of a release as the columns of one insert into Milvus."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from index_builder.filters.field_types import FieldType
from index_builder.filters.selection import ID_FIELD
from index_builder.filters.times import period_of
from index_builder.releases.milvus_filters import time_field
from index_builder.search.entity_index import EntityIndex

VECTOR_FIELD = "embedding"
_ATTRIBUTES_FIELD = "$meta"
"""Where Milvus keeps fields that its schema does not name."""
_FLOATS_TAG = b"\x0a"
"""What stands before the length of the packed floats of a vector column."""


def copied_attributes(index: EntityIndex) -> dict[str, FieldType]:
    """Return the attributes that a copy holds, with their types."""
    schema = index.attribute_table.schema
    return {name: schema[name] for name in schema if name not in (ID_FIELD, VECTOR_FIELD)}


def insert_request(name: str, index: EntityIndex, rows: np.ndarray) -> Any:
    """Return the message that inserts rows: ids, vectors and attributes, a column each.

    Vectors go over as the bytes that they are in memory: no Python object is made of a number.

    Args:
        name: Of the collection.
        index: Of the release.
        rows: int64 ``(R,)``, base rows.
    """
    from pymilvus.grpc_gen import milvus_pb2, schema_pb2

    vectors = np.ascontiguousarray(index.row_vectors(rows), dtype="<f4")
    packed = vectors.tobytes()
    floats = schema_pb2.FloatArray.FromString(_FLOATS_TAG + _varint(len(packed)) + packed)
    attributes = [
        json.dumps(row, ensure_ascii=False).encode() for row in _attribute_rows(index, rows)
    ]
    columns = [
        schema_pb2.FieldData(
            field_name=ID_FIELD,
            type=schema_pb2.VarChar,
            scalars=schema_pb2.ScalarField(
                string_data=schema_pb2.StringArray(data=index.ids.take(rows))
            ),
        ),
        schema_pb2.FieldData(
            field_name=VECTOR_FIELD,
            type=schema_pb2.FloatVector,
            vectors=schema_pb2.VectorField(dim=vectors.shape[1], float_vector=floats),
        ),
        schema_pb2.FieldData(
            field_name=_ATTRIBUTES_FIELD,
            type=schema_pb2.JSON,
            is_dynamic=True,
            scalars=schema_pb2.ScalarField(json_data=schema_pb2.JSONArray(data=attributes)),
        ),
    ]
    return milvus_pb2.InsertRequest(collection_name=name, fields_data=columns, num_rows=len(rows))


def _varint(value: int) -> bytes:
    """Return a length as protobuf writes it: seven bits a byte, lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _attribute_rows(index: EntityIndex, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return attributes as Milvus takes them: missing values are missing keys."""
    types = copied_attributes(index)
    dtypes = index.attribute_table.frame.schema
    singles = {name for name in types if dtypes[name] in (pl.Float32, pl.List(pl.Float32))}
    return [
        _with_times(
            {
                name: _shortest(value) if name in singles else value
                for name, value in values.items()
                if not _is_missing(value)
            },
            types,
        )
        for values in index.attribute_table.values(rows, list(types))
    ]


def _with_times(fields: dict[str, Any], types: Mapping[str, FieldType]) -> dict[str, Any]:
    times = {
        time_field(name): _instants(value)
        for name, value in fields.items()
        if types[name] in ("time", "list<time>")
    }
    return {**fields, **times}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shortest(value: Any) -> Any:
    """Return the shortest decimal that a float32 reads as, which filters write; of lists, each."""
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return None if value is None else float(str(np.float32(value)))


def _instants(value: str | list[str]) -> int | list[int]:
    """Return the microseconds since 1970 of a time or of each of a list."""
    if isinstance(value, str):
        period = period_of(value)
        assert period is not None, "every value of the column is a time"
        return period.low
    return [_instants(text) for text in value if text is not None]  # type: ignore[misc]
