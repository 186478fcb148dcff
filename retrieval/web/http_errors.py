"""gRPC statuses over HTTP: the Connect protocol's names and HTTP codes, and calls that fail."""

from __future__ import annotations

import math
from collections.abc import Sequence

import grpc
from starlette.responses import JSONResponse, Response

Trailing = Sequence[tuple[str, str | bytes]]

HTTP_STATUS = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
"""Of the Connect protocol's specification."""
RETRY_AFTER_KEY = "retry-after-ms"


class CallFailed(Exception):
    """A call ends with a gRPC status; the service's handlers raise it through ``abort``.

    Attributes:
        code: The status.
        details: Its message.
        trailing: Trailing metadata.
    """

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Trailing = ()) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailing = trailing


def connect_code(code: grpc.StatusCode) -> str:
    """Return the Connect protocol's name of a status."""
    return "canceled" if code is grpc.StatusCode.CANCELLED else code.name.lower()


def retry_after_header(trailing: Trailing) -> dict[str, str]:
    """Return HTTP's Retry-After of a hint in milliseconds; whole seconds, rounded up."""
    hint = dict(trailing).get(RETRY_AFTER_KEY)
    return {} if hint is None else {"Retry-After": str(max(1, math.ceil(float(hint) / 1000)))}


def error_response(error: CallFailed, status: int | None = None) -> Response:
    """Make the Connect protocol's error of a unary call: always JSON, with the HTTP code it says.

    Args:
        error: What to say.
        status: Another HTTP code.
    """
    headers = {f"trailer-{key}": _text(value) for key, value in error.trailing}
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        {"code": connect_code(error.code), "message": error.details},
        status or HTTP_STATUS.get(error.code, 500),
        {**headers, **retry_after_header(error.trailing)},
    )


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
