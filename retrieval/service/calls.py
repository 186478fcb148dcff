"""What every call comes with, beside its request, and what it has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import grpc

from retrieval.bounds.work_threads import WorkThreads
from retrieval.config import Limits
from retrieval.observability.call_log import CallLog
from retrieval.observability.metrics import Metrics
from retrieval.observability.tracing import Tracer
from retrieval.security import EVERYONE, Caller, Tokens
from retrieval.service.admission import Admission

Metadata = Sequence[tuple[str, str | bytes]]


class CallContext(Protocol):
    """The part of ``grpc.aio.ServicerContext`` that the service uses; the page has it, too."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None without one."""
        ...

    def invocation_metadata(self) -> Metadata | None:
        """The request's metadata."""
        ...

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = (), /
    ) -> NoReturn:
        """End the call with a status."""
        ...


class CallInfo(NamedTuple):
    """One call: how to reach its caller, what that caller may do, and when the call arrived.

    Attributes:
        context: Deadline and metadata.
        caller: Rights of the caller's token.
        started_ns: ``time.perf_counter_ns()`` on arrival.
    """

    context: CallContext
    caller: Caller
    started_ns: int


class Deadlines(NamedTuple):
    """What the server gives calls that do not bound themselves.

    Attributes:
        default_seconds: Of a call without a deadline.
        max_seconds: The longest.
    """

    default_seconds: float
    max_seconds: float

    def seconds_for(self, remaining: float | None) -> float | None:
        """Return the server's own bound of a call; None where the caller's is the shorter one."""
        if remaining is None:
            return min(self.default_seconds, self.max_seconds)
        return self.max_seconds if remaining > self.max_seconds else None


def peer_of(context: CallContext) -> str:
    """Return the address of a caller as gRPC writes it; empty where the context has none."""
    peer = getattr(context, "peer", None)
    return str(peer()) if callable(peer) else ""


@dataclass(frozen=True, slots=True)
class CallGate:
    """What calls of one kind pass on their way in and out.

    Attributes:
        admission: Their places.
        metrics: Where they are counted.
        tokens: Known callers; None: everyone is ``anonymous``.
        tracer: Writes their spans, or None.
        parsing: One thread for large messages of all kinds of calls: more would take the
            interpreter from the event loop.
        anonymous: What everyone may do without tokens.
        limits: Of requests.
        call_log: Writes lines about calls, or None.
        deadlines: Of calls that set none or a long one; None: theirs count.
    """

    admission: Admission
    metrics: Metrics
    tokens: Tokens | None
    tracer: Tracer | None
    parsing: WorkThreads
    anonymous: Caller = EVERYONE
    limits: Limits = field(default_factory=Limits)
    call_log: CallLog | None = None
    deadlines: Deadlines | None = None

    def caller(self, context: CallContext) -> Caller:
        """Find who calls. Raises ``Unauthenticated``."""
        return self.caller_of(context.invocation_metadata())

    def caller_of(self, metadata: Metadata | None) -> Caller:
        """Find who calls with this metadata. Raises ``Unauthenticated``."""
        if self.tokens is None:
            return self.anonymous
        return self.tokens.caller(metadata)
