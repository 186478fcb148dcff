"""Messages in protobuf's JSON form, several times faster than ``google.protobuf.json_format``.

For the contract's messages: no enums, no well-known types.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

Convert = Callable[[Any], Any]


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _single(value: float) -> float | str:
    """Return a float32 with as few digits as name it."""
    return float(str(np.float32(value))) if math.isfinite(value) else _number(value)


def _same(value: Any) -> Any:
    return value


CONVERTERS: dict[int, Convert] = {
    FieldDescriptor.TYPE_STRING: _same,
    FieldDescriptor.TYPE_BOOL: _same,
    FieldDescriptor.TYPE_INT32: _same,
    FieldDescriptor.TYPE_INT64: str,
    FieldDescriptor.TYPE_UINT64: str,
    FieldDescriptor.TYPE_FLOAT: _single,
    FieldDescriptor.TYPE_DOUBLE: _number,
    FieldDescriptor.TYPE_BYTES: lambda value: base64.b64encode(value).decode(),
}


@cache
def json_form(descriptor: Descriptor) -> Callable[[Message], dict[str, Any]]:
    """Return a function that turns messages of one type into what ``json.dumps`` writes."""
    fields: dict[int, tuple[str, Convert]] = {}

    def convert(message: Message) -> dict[str, Any]:
        found = {}
        for field, value in message.ListFields():
            name, convert_value = fields[field.number]
            found[name] = convert_value(value)
        return found

    for field in descriptor.fields:
        fields[field.number] = field.json_name, _converter(field)
    return convert


def _converter(field: FieldDescriptor) -> Convert:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        of_value = _of_one(message.fields_by_name["value"])
        return lambda value: {key: of_value(item) for key, item in value.items()}
    of_one = _of_one(field)
    if field.is_repeated:
        return lambda value: [of_one(item) for item in value]
    return of_one


def _of_one(field: FieldDescriptor) -> Convert:
    message = field.message_type
    if message is None:
        return CONVERTERS[field.type]
    # Looked up when it is needed: a type may hold itself
    return lambda value: json_form(message)(value)
