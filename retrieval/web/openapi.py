"""The OpenAPI document of the calls over HTTP, made from the contract's descriptors."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

Schema = dict[str, Any]

_INT64 = {"type": ["integer", "string"], "format": "int64"}
_FLOAT = {
    "anyOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}]
}
SCALARS: dict[int, Schema] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_INT64: _INT64,
    FieldDescriptor.TYPE_UINT64: _INT64,
    FieldDescriptor.TYPE_FLOAT: _FLOAT,
    FieldDescriptor.TYPE_DOUBLE: _FLOAT,
}
"""By protobuf type: how protobuf's JSON form writes it. The contract has no other types."""
ERROR_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "description": "gRPC status, e.g. invalid_argument."},
        "message": {"type": "string", "description": "What was expected, what came, what to do."},
    },
}


@lru_cache(4)
def openapi_document(contract: FileDescriptor) -> Schema:
    """Describe every unary call of a contract as ``POST /<service>/<method>`` with JSON."""
    comments = _comments()
    paths: Schema = {}
    schemas: Schema = {"Error": ERROR_SCHEMA}
    for service in contract.services_by_name.values():
        for method in service.methods:
            paths[f"/{service.full_name}/{method.name}"] = {
                "post": {
                    "operationId": f"{service.name}.{method.name}",
                    "tags": [service.name],
                    "description": comments.get(f"{service.name}.{method.name}", ""),
                    "requestBody": {"required": True, "content": _content(method.input_type)},
                    "responses": {
                        "200": {"description": "Answer", "content": _content(method.output_type)},
                        "default": {
                            "description": "Error",
                            "content": {
                                "application/json": {
                                    "schema": {"$ref": "#/components/schemas/Error"}
                                }
                            },
                        },
                    },
                }
            }
    for message in contract.message_types_by_name.values():
        schemas[message.name] = _message(message, comments)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": contract.package,
            "version": contract.package.rpartition(".")[2],
            "description": comments.get("", ""),
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _content(message: Descriptor) -> Schema:
    return {"application/json": {"schema": _reference(message)}}


def _reference(message: Descriptor) -> Schema:
    return {"$ref": f"#/components/schemas/{message.name}"}


def _message(message: Descriptor, comments: dict[str, str]) -> Schema:
    properties = {}
    for field in message.fields:
        schema = _field(field)
        comment = comments.get(f"{message.name}.{field.name}")
        properties[field.json_name] = {**schema, "description": comment} if comment else schema
    found: Schema = {"type": "object", "properties": properties}
    if message.name in comments:
        found["description"] = comments[message.name]
    return found


def _field(field: FieldDescriptor) -> Schema:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _field(message.fields_by_name["value"])}
    schema = _reference(message) if message is not None else SCALARS[field.type]
    return {"type": "array", "items": schema} if field.is_repeated else schema


_LINE = re.compile(
    r"(?:message|service)\s+(?P<block>\w+)"
    r"|rpc\s+(?P<rpc>\w+)"
    r"|(?:optional\s+|repeated\s+)?[\w.<>, ]+?\s(?P<field>\w+)\s*=\s*\d+;"
)


def _comments() -> dict[str, str]:
    """Return the comments of the contract's source: by message, ``Message.field``, ``Service.rpc``.

    Descriptors at run time hold none. Under "": that at the head of the file.
    """
    lines = resources.files("protos").joinpath("retrieval.proto").read_text("utf-8").splitlines()
    found: dict[str, str] = {}
    above: list[str] = []
    block = ""
    for line in map(str.strip, lines):
        if line.startswith("//"):
            above.append(line.removeprefix("//").strip())
            continue
        match = _LINE.match(line)
        if line.startswith("syntax"):
            found[""] = "\n".join(above)
        elif match and above:
            name = match["rpc"] or match["field"]
            found[f"{block}.{name}" if name else match["block"]] = " ".join(above)
        if match and match["block"]:
            block = match["block"]
        above = []
    return found
