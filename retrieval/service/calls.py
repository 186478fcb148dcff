"""What every call comes with, beside its request, and what it has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import grpc

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


@dataclass(frozen=True, slots=True)
class CallGate:
    """What calls of one kind pass on their way in and out.

    Attributes:
        admission: Their places.
        metrics: Where they are counted.
        tokens: Known callers; None lets everyone do everything.
        tracer: Writes their spans, or None.
    """

    admission: Admission
    metrics: Metrics
    tokens: Tokens | None
    tracer: Tracer | None

    def caller(self, context: CallContext) -> Caller:
        """Find who calls. Raises ``Unauthenticated``."""
        return self.caller_of(context.invocation_metadata())

    def caller_of(self, metadata: Metadata | None) -> Caller:
        """Find who calls with this metadata. Raises ``Unauthenticated``."""
        if self.tokens is None:
            return EVERYONE
        return self.tokens.caller(metadata)
