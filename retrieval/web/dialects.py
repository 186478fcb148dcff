"""How a unary call and its answer are written over HTTP: the Connect protocol, and gRPC-Web.

Connect: https://connectrpc.com/docs/protocol. gRPC-Web: PROTOCOL-WEB.md of grpc/grpc.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import NamedTuple, Protocol
from urllib.parse import quote

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.datastructures import Headers
from starlette.responses import Response

from retrieval.http2.headers import timeout_seconds
from retrieval.http2.messages import inflated
from retrieval.http2.refusals import Aborted
from retrieval.web.http_errors import CallFailed, error_response
from retrieval.web.json_form import json_form

PREFIX_BYTES = 5
COMPRESSED = 0x01
TRAILERS = 0x80
MAX_JSON_VALUES = 100_000
"""Of one request: a JSON value takes far more memory and time than its text."""
_UNQUOTED = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


class Codec(Protocol):
    """Turns the bytes of a message into those of its serialised protobuf form, and back."""

    name: str

    def decode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Return the serialised request; raises ``CallFailed``."""

    def encode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Return the answer as the caller reads it."""


class ProtoCodec:
    """Serialised messages, as they are."""

    name = "proto"

    def decode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Return the content; the handler checks it."""
        return content

    def encode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Return the content."""
        return content


class JsonCodec:
    """Protobuf's JSON form: lowerCamelCase names (others are read, too), bytes in base64."""

    name = "json"

    def decode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Read JSON."""
        name = message_class.DESCRIPTOR.name
        values = content.count(b",") + content.count(b"{") + content.count(b"[")
        if values > MAX_JSON_VALUES:
            raise _invalid(
                f"the body: expected at most {MAX_JSON_VALUES} JSON values, but got about {values}."
                " Split the request, or send application/proto."
            )
        message = message_class()
        try:
            if content.strip():
                json_format.Parse(content, message)
        except (json_format.ParseError, ValueError, RecursionError) as error:
            raise _invalid(
                f"the body: expected {name} as JSON, but {str(error)[:300] or 'it is too deep'}."
            ) from error
        serialized: bytes = message.SerializeToString()
        return serialized

    def encode(self, content: bytes, message_class: type[Message]) -> bytes:
        """Write JSON."""
        value = json_form(message_class.DESCRIPTOR)(message_class.FromString(content))
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Dialect(Protocol):
    """One protocol over HTTP."""

    def timeout(self, headers: Headers) -> float | None:
        """Return the seconds that the caller gives; raises ``CallFailed``."""

    def message(self, headers: Headers, body: bytes, max_bytes: int) -> bytes:
        """Return the one message of a request's body; raises ``CallFailed``."""

    def answer(self, content: bytes, content_type: str) -> Response:
        """Return the response that carries a message."""

    def failure(self, error: CallFailed, content_type: str) -> Response:
        """Return the response of a failed call."""


class ConnectUnary:
    """The Connect protocol's unary calls: the body is the message, errors are JSON."""

    def timeout(self, headers: Headers) -> float | None:
        """Read Connect-Timeout-Ms."""
        text = headers.get("connect-timeout-ms")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise _invalid("connect-timeout-ms: expected at most ten digits.")
        return int(text) / 1000

    def message(self, headers: Headers, body: bytes, max_bytes: int) -> bytes:
        """Return the body, uncompressed."""
        encoding = headers.get("content-encoding", "identity")
        return body if encoding == "identity" else _inflated(body, encoding, max_bytes)

    def answer(self, content: bytes, content_type: str) -> Response:
        """Return the message as the body."""
        return Response(content, headers={"Content-Type": content_type})

    def failure(self, error: CallFailed, content_type: str) -> Response:
        """Return the error as JSON, whatever the message's form is."""
        return error_response(error)


class GrpcWeb:
    """gRPC-Web: messages in frames, the status in a last frame of trailers.

    Args:
        is_text: The body is base64, for browsers that cannot read bytes.
    """

    def __init__(self, *, is_text: bool) -> None:
        self._is_text = is_text

    def timeout(self, headers: Headers) -> float | None:
        """Read grpc-timeout."""
        text = headers.get("grpc-timeout")
        if text is None:
            return None
        seconds = timeout_seconds(text)
        if seconds is None:
            raise _invalid("grpc-timeout: not a number with a unit.")
        return seconds

    def message(self, headers: Headers, body: bytes, max_bytes: int) -> bytes:
        """Return the one message."""
        if self._is_text:
            try:
                body = base64.b64decode(body, validate=True)
            except binascii.Error as error:
                raise _invalid(f"the body is no base64: {error}.") from error
        size = int.from_bytes(body[1:PREFIX_BYTES], "big")
        if len(body) < PREFIX_BYTES or len(body) != PREFIX_BYTES + size or body[0] & TRAILERS:
            raise _invalid("expected one whole message.")
        if body[0] & COMPRESSED:
            encoding = headers.get("grpc-encoding", "identity")
            return _inflated(body[PREFIX_BYTES:], encoding, max_bytes)
        return body[PREFIX_BYTES:]

    def answer(self, content: bytes, content_type: str) -> Response:
        """Return a frame with the message, and one with trailers."""
        return self._response(_framed(0, content) + _framed(TRAILERS, _trailers(0)), content_type)

    def failure(self, error: CallFailed, content_type: str) -> Response:
        """Return a frame with trailers alone."""
        code = error.code.value[0]
        lines = _trailers(code, error.details)
        for key, value in error.trailing:
            text = value if isinstance(value, str) else value.decode("latin-1")
            lines += f"{key}: {text}\r\n".encode("latin-1", "replace")
        return self._response(_framed(TRAILERS, lines), content_type)

    def _response(self, content: bytes, content_type: str) -> Response:
        body = base64.b64encode(content) if self._is_text else content
        return Response(body, headers={"Content-Type": content_type})


class Style(NamedTuple):
    """What a content type stands for."""

    dialect: Dialect
    codec: Codec


_PROTO = ProtoCodec()
_JSON = JsonCodec()
_WEB = GrpcWeb(is_text=False)
_WEB_TEXT = GrpcWeb(is_text=True)
STYLES: dict[str, Style] = {
    "application/json": Style(ConnectUnary(), _JSON),
    "application/proto": Style(ConnectUnary(), _PROTO),
    "application/grpc-web": Style(_WEB, _PROTO),
    "application/grpc-web+proto": Style(_WEB, _PROTO),
    "application/grpc-web+json": Style(_WEB, _JSON),
    "application/grpc-web-text": Style(_WEB_TEXT, _PROTO),
    "application/grpc-web-text+proto": Style(_WEB_TEXT, _PROTO),
}
"""By content type. None of them is one that a browser sends to another origin unasked."""


def _inflated(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress a message as the gRPC port does; raises ``CallFailed``."""
    try:
        return inflated(content, encoding, max_bytes)
    except Aborted as error:
        raise CallFailed(error.code, error.message) from error


def _framed(flags: int, content: bytes) -> bytes:
    return bytes((flags,)) + len(content).to_bytes(4, "big") + content


def _trailers(code: int, message: str = "") -> bytes:
    lines = f"grpc-status: {code}\r\n"
    if message:
        lines += f"grpc-message: {quote(message, safe=_UNQUOTED)}\r\n"
    return lines.encode()


def _invalid(message: str) -> CallFailed:
    return CallFailed(grpc.StatusCode.INVALID_ARGUMENT, message)
