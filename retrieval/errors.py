"""Errors of serving, a branch of ``OmniError``; ``retrieval/status.py`` holds their gRPC codes.

ServingError
├── InvalidRequest            the request can never succeed                  INVALID_ARGUMENT
│   ├── EmptyQuery            no text and no vector
│   ├── InvalidK              k outside 1..max_k
│   ├── InvalidEmbedding      a ready vector of the wrong size, norm or with NaN
│   └── RequestTooLarge       more texts, ids or bytes than the limits allow
├── UnknownRelease            no such release in the store                   NOT_FOUND
├── ReleaseNotLoaded          a pinned release is not in memory              FAILED_PRECONDITION
├── ReleaseRefused            a release failed its proof                     FAILED_PRECONDITION
├── NothingToRollBack         there is no earlier release                    FAILED_PRECONDITION
├── WritesDisabled            this server takes no live writes               FAILED_PRECONDITION
├── Overloaded                a queue is full                                RESOURCE_EXHAUSTED
│   └── RateExceeded          the token asks more often than it may
├── MessageTooLarge           more bytes than a message of the method may be RESOURCE_EXHAUSTED
├── AnswerTooLarge            the answer is more than is sent                RESOURCE_EXHAUSTED
├── DeadlinePassed            the caller's deadline passed                   DEADLINE_EXCEEDED
├── NotReady                  no release yet, or shutting down               UNAVAILABLE
├── Unauthenticated           no token, or a wrong one                       UNAUTHENTICATED
├── PermissionDenied          the token may not do this                      PERMISSION_DENIED
├── EncoderFailed             the query tower raised or made a bad vector    INTERNAL
├── CannotListen              an address cannot be listened on               (command line only)
│   └── AddressInUse          another process listens on the port
└── ServerDied                the server started by the demo ended           (command line only)
"""

from __future__ import annotations

from collections.abc import Iterable

from encoders.errors import OmniError


class ServingError(OmniError):
    """Root of the errors that the service reports to callers."""


class InvalidRequest(ServingError):
    """The request can never succeed; the message names the field and what was expected."""


class EmptyQuery(InvalidRequest):
    """The request holds neither visible text nor a vector."""

    def __init__(self, where: str = "query") -> None:
        super().__init__(
            f"{where}: expected text with at least one visible character, but got an empty one."
            " Send a query, or an embedding."
        )


class InvalidK(InvalidRequest):
    """``k`` is outside 1..max_k."""

    def __init__(self, k: int, max_k: int) -> None:
        super().__init__(
            f"k: expected 1 to {max_k}, but got {k}. Set k to the number of results you want."
        )


class InvalidEmbedding(InvalidRequest):
    """A ready vector has a wrong byte length, a wrong norm, or NaN or infinity in it."""


class RequestTooLarge(InvalidRequest):
    """The request holds more than a limit allows."""

    def __init__(self, field: str, limit: int, got: int, unit: str = "") -> None:
        super().__init__(
            f"{field}: expected at most {limit}{unit}, but got {got}{unit}. Split the request, or"
            " raise the limit of the server."
        )


class UnknownRelease(ServingError):
    """The store holds no such release."""

    def __init__(self, release_id: str) -> None:
        super().__init__(
            f"release_id: no release {release_id[:80]!r} in the store. `omni release list` shows"
            " what there is."
        )


class ReleaseNotLoaded(ServingError):
    """A request pinned a release that this server does not hold in memory."""

    def __init__(self, release_id: str, loaded: Iterable[str]) -> None:
        held = ", ".join(loaded) or "none"
        super().__init__(
            f"release_id: {release_id[:80]!r} is not loaded; loaded: {held}. Leave release_id empty"
            " to use the active one."
        )


class ReleaseRefused(ServingError):
    """A release is not served: damaged, foreign, or its golden queries fail."""


class NothingToRollBack(ServingError):
    """There is no earlier release to go back to."""


class WritesDisabled(ServingError):
    """Live writes are not possible on this server."""


class Overloaded(ServingError):
    """A queue is full; ``retry_after_ms`` says when to come again."""

    def __init__(self, what: str, limit: int, retry_after_ms: int) -> None:
        self.what = what
        self.limit = limit
        self.retry_after_ms = retry_after_ms
        super().__init__(
            f"{what}: all {limit} places are taken. Try again in {retry_after_ms} ms, with jitter."
        )


class MessageTooLarge(ServingError):
    """A message has more bytes than one of its method may have."""

    def __init__(self, limit: int, got: int) -> None:
        super().__init__(
            f"a message may have {limit} bytes in this call, but got {got}. Split the request."
        )


class RateExceeded(Overloaded):
    """A token asks more often than its rate allows."""

    def __init__(self, token: str, per_second: float, retry_after_ms: int) -> None:
        self.what = "rate"
        self.limit = round(per_second)
        self.retry_after_ms = retry_after_ms
        ServingError.__init__(
            self,
            f"token {token!r}: {per_second:g} searches a second are allowed, and more came. Try"
            f" again in {retry_after_ms} ms, with jitter.",
        )


class AnswerTooLarge(ServingError):
    """An answer would have more bytes than the server sends."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the answer has more than {max_bytes} bytes.")


class DeadlinePassed(ServingError):
    """The caller's deadline passed, or would pass before the queue gets to this request."""


class NotReady(ServingError):
    """No release is loaded yet, or the server is shutting down."""


class Unauthenticated(ServingError):
    """No token came, or one that is not known."""

    def __init__(self) -> None:
        super().__init__(
            "authorization: expected metadata `authorization: Bearer <token>` with a known token."
            " Ask the operator for one."
        )


class PermissionDenied(ServingError):
    """The token does not hold the right that this call needs."""


class EncoderFailed(ServingError):
    """The query tower failed, or made a vector with NaN or of a wrong size."""


class CannotListen(ServingError):
    """The wanted address cannot be listened on; the message says why."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}.")


class AddressInUse(CannotListen):
    """Another process listens on the wanted address."""

    def __init__(self, address: str, flag: str = "--port") -> None:
        super().__init__(
            address,
            f"another process already does. Stop it, or choose another with {flag} (0 picks a free"
            " one)",
        )


class ServerDied(ServingError):
    """The server process that was started here ended by itself or was killed."""
