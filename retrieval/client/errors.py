"""Errors of the clients: one class per gRPC status, so that callers catch what they can act on.

OmniError
└── CallError              a call failed; .code, .attempts and .target say which and how often
    ├── InvalidRequest     INVALID_ARGUMENT: this request can never succeed
    ├── NotAuthenticated   UNAUTHENTICATED: no token, or a wrong one
    ├── NotAllowed         PERMISSION_DENIED: this token may not do this
    ├── NotFound           NOT_FOUND: no such entity type or release
    ├── Precondition       FAILED_PRECONDITION: another embedding space, or release not loaded
    ├── Overloaded         RESOURCE_EXHAUSTED: the server is full; .retry_after_seconds is its hint
    ├── DeadlineExceeded   DEADLINE_EXCEEDED: no answer in time
    ├── Unavailable        UNAVAILABLE: nobody listens, no release loaded yet, or draining
    ├── NotSupported       UNIMPLEMENTED: the server does not have this call
    └── ServerFault        INTERNAL and everything else: a fault of the server
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from encoders.errors import OmniError

__all__ = [
    "BY_CODE",
    "CallError",
    "DeadlineExceeded",
    "InvalidRequest",
    "NotAllowed",
    "NotAuthenticated",
    "NotFound",
    "NotSupported",
    "Overloaded",
    "Precondition",
    "ServerFault",
    "Unavailable",
    "error_from",
    "retry_after_seconds",
]

RETRY_AFTER_KEY = "retry-after-ms"


class CallError(OmniError):
    """A call to the service failed.

    Attributes:
        code: The gRPC status code.
        details: The server's message as it came.
        method: Short name of the call, e.g. ``Retrieve``.
        target: The server that was asked.
        attempts: How often it was tried.
        retry_after_seconds: The server's hint, or None.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        *,
        method: str,
        target: str,
        attempts: int,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.code = code
        self.details = details
        self.method = method
        self.target = target
        self.attempts = attempts
        self.retry_after_seconds = retry_after_seconds
        tried = "" if attempts == 1 else f" (tried {attempts} times)"
        super().__init__(f"{method} on {target}{tried}: {code.name}: {details or 'no message'}")


class InvalidRequest(CallError):
    """The request can never succeed; the message says which field and what was expected."""


class NotAuthenticated(CallError):
    """A token is required and none or a wrong one was sent."""


class NotAllowed(CallError):
    """The token is valid but has no right to this call or entity type."""


class NotFound(CallError):
    """The release has no such entity type, or there is no such release."""


class Precondition(CallError):
    """The vector comes from another embedding space, or the pinned release is not loaded."""


class Overloaded(CallError):
    """The server refused the call because it is full."""


class DeadlineExceeded(CallError):
    """No answer arrived before the deadline."""


class Unavailable(CallError):
    """Nobody answers at the target, no release is loaded yet, or the server is draining."""


class NotSupported(CallError):
    """The server does not implement this call."""


class ServerFault(CallError):
    """The server failed in a way it did not expect."""


BY_CODE: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthenticated,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Precondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
}


def retry_after_seconds(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Read the server's hint (trailing metadata ``retry-after-ms``) in seconds.

    Returns:
        None if it is absent, negative or not a number.
    """
    for key, value in metadata or ():
        if key == RETRY_AFTER_KEY:
            try:
                seconds = float(value) / 1000
            except ValueError:
                return None
            return seconds if 0 <= seconds < float("inf") else None
    return None


def error_from(error: grpc.RpcError, *, method: str, target: str, attempts: int) -> CallError:
    """Turn gRPC's error (sync or asyncio) into the class of ``BY_CODE`` for its status."""
    code = error.code()
    kind = BY_CODE.get(code, ServerFault)
    hint = retry_after_seconds(error.trailing_metadata())
    return kind(
        code,
        error.details() or "",
        method=method,
        target=target,
        attempts=attempts,
        retry_after_seconds=hint,
    )
