"""The calls of protos/retrieval.proto as gRPC handlers over bytes: rights, places, errors."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from protos import retrieval_pb2 as pb
from retrieval.bounds.messages import (
    INLINE_BYTES,
    MessageBounds,
    nested_messages,
    require_bounded,
)
from retrieval.errors import DeadlinePassed, InvalidRequest, Unauthenticated
from retrieval.http2.calls import UnaryHandler
from retrieval.http2.headers import Metadata
from retrieval.http2.refusals import Refusal
from retrieval.observability.call_log import FinishedCall
from retrieval.service.admin import AdminService
from retrieval.service.admission import Admission, Refusals, retry_trailer
from retrieval.service.calls import CallContext, CallGate, CallInfo, peer_of
from retrieval.service.fast_path import FastPath
from retrieval.service.service import RetrievalService
from retrieval.service.validation import check_labels
from retrieval.status import status_for

log = logging.getLogger(__name__)

RETRIEVAL = "omnisearchsage.v1.Retrieval"
ADMIN = "omnisearchsage.v1.Admin"


class Method(NamedTuple):
    """One RPC.

    Attributes:
        name: Without its service's.
        request_class: What the bytes of a request hold.
        answer: Answers a request.
        bounds: Of a request's bytes and fields.
        searches: How many searches a request holds; None: one, however large.
        needs_admin: Whether the caller needs the admin right.
    """

    name: str
    request_class: type[Message]
    answer: Callable[[Any, CallInfo], Awaitable[Message]]
    bounds: MessageBounds
    searches: Callable[[Any], int] | None = None
    needs_admin: bool = False

    @property
    def service(self) -> str:
        """Full name of its service."""
        return ADMIN if self.needs_admin else RETRIEVAL


class MethodHandler:
    """Answers one method's calls. Messages are parsed in here, so that bad bytes get a typed error.

    Args:
        method: Which.
        gate: What its calls pass.
    """

    def __init__(self, method: Method, gate: CallGate) -> None:
        self._method = method
        self._gate = gate
        self._nested = nested_messages(method.request_class.DESCRIPTOR)
        self._seconds = gate.metrics.histogram("omni_request_seconds", (method.name,))

    async def handle(self, content: bytes, context: CallContext) -> bytes:
        """Answer the bytes of a request, or end the call with a typed status."""
        method = self._method
        gate = self._gate
        admission = gate.admission
        started_ns = time.perf_counter_ns()
        places = 0
        token = outcome = ""
        request: Message | None = None
        response: Message | None = None
        try:
            caller = gate.caller(context)
            token = caller.name
            if method.needs_admin:
                caller.require_admin()
            places = admission.enter(admission.cost_of(0, len(content)))
            request = await self._parsed(content)
            if len(content) > gate.limits.max_label_bytes:
                check_labels(request, gate.limits)
            searches = 1
            if method.searches is not None:
                searches = method.searches(request)
                wanted = admission.cost_of(searches)
                places += admission.enter(wanted - places, held=places)
            if caller.rate is not None:
                caller.rate.take(max(1, searches))
            response = await self._in_time(request, CallInfo(context, caller, started_ns))
            answer: bytes = response.SerializeToString()
            outcome = "OK"
            return answer
        except asyncio.CancelledError as error:
            # By the caller, or by the transport because the caller's time is over
            remaining = context.time_remaining()
            in_time = remaining is None or remaining > 0
            outcome = "CANCELLED" if in_time else "DEADLINE_EXCEEDED"
            drop_tracebacks(error)
            raise
        except Exception as error:  # whatever went wrong becomes a typed status
            code, message = status_for(error)
            outcome = code.name
            if code is grpc.StatusCode.INTERNAL:
                error_id = uuid.uuid4().hex[:12]
                log.exception("%s failed, id %s", method.name, error_id)
                message = f"{message} Its id there is {error_id}."
            elif isinstance(error, OSError):
                log.error("%s failed: %s", method.name, error)
            drop_tracebacks(error)
            await context.abort(code, message, retry_trailer(error))
            raise AssertionError("abort raises") from error
        finally:
            seconds = (time.perf_counter_ns() - started_ns) / 1e9
            outcome = outcome or "UNKNOWN"
            self._count(outcome)
            self._seconds.observe(seconds)
            if places:
                admission.leave(places, seconds)
            is_logged = gate.call_log is not None and gate.call_log.wants(seconds)
            if is_logged or gate.tracer is not None:
                self._record(
                    FinishedCall(
                        method=method.name,
                        code=outcome,
                        seconds=seconds,
                        peer=peer_of(context),
                        token=token,
                        metadata=context.invocation_metadata(),
                        request=request,
                        response=response,
                        service=method.service,
                    ),
                    is_logged=is_logged,
                )
            request = response = None
            content = b""

    def _record(self, call: FinishedCall, *, is_logged: bool) -> None:
        """Write the log's line and the spans of a call that has ended."""
        gate = self._gate
        if is_logged and gate.call_log is not None:
            gate.call_log.write(call)
        if gate.tracer is not None:
            gate.tracer.record_call(call)

    async def _in_time(self, request: Message, call: CallInfo) -> Message:
        """Answer a request within the server's own bounds of deadlines.

        Raises:
            DeadlinePassed: They passed.
        """
        answering = self._method.answer(request, call)
        deadlines = self._gate.deadlines
        seconds = None
        if deadlines is not None and not self._method.needs_admin:
            seconds = deadlines.seconds_for(call.context.time_remaining())
        if seconds is None:
            return await answering
        try:
            async with asyncio.timeout(seconds) as bound:
                return await answering
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise DeadlinePassed(
                f"the deadline passed; the work was dropped. The server gives a call {seconds:g} s."
            ) from error

    async def _parsed(self, content: bytes) -> Message:
        """Parse a request, in a thread if it is large. Raises as ``require_bounded``."""
        if len(content) > INLINE_BYTES:
            return await self._gate.parsing.run(partial(self._parsed_now, content))
        return self._parsed_now(content)

    def _parsed_now(self, content: bytes) -> Message:
        method = self._method
        require_bounded(content, method.bounds, self._nested)
        try:
            return method.request_class.FromString(content)
        except DecodeError as error:
            raise InvalidRequest(
                f"{method.name}: the bytes are not a {method.request_class.DESCRIPTOR.name} message"
                f" ({error})."
            ) from error

    def _count(self, code: str) -> None:
        self._gate.metrics.count("omni_requests", (self._method.name, code))


def drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of those that led to it.

    They hold the local variables of all calls that it has come through, a request's message among
    them, as long as the transport holds the error. The frames themselves are left alone: some may
    belong to a suspended task that serves other callers, and clearing would end it.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class RetrieveHandler:
    """Answers ``Retrieve`` by the fast path where it can, by the full path where it cannot.

    For transports that know only one function per method; ``http2`` calls the two itself.
    """

    def __init__(self, fast_path: FastPath, full_path: MethodHandler) -> None:
        self._fast_path = fast_path
        self._full_path = full_path

    async def handle(self, content: bytes, context: CallContext) -> bytes:
        """Answer the bytes of a request, or end the call with a typed status."""
        answer = self._fast_path(content, context)
        if isinstance(answer, Refusal):
            await context.abort(answer.code, answer.message, answer.trailing)
        if answer is None:
            return await self._full_path.handle(content, context)
        return answer


def search_gate(service: RetrievalService) -> CallGate:
    """Return what single searches pass."""
    return _gate(service, service.admission)


def bulk_gate(service: RetrievalService) -> CallGate:
    """Return what calls of many texts pass: they take no places from single searches."""
    return _gate(service, service.bulk_admission)


def control_gate(service: RetrievalService) -> CallGate:
    """Return what calls about the server pass: they have places of their own."""
    return _gate(service, service.control_admission)


def _gate(service: RetrievalService, admission: Admission) -> CallGate:
    return CallGate(
        admission,
        service.metrics,
        service.tokens,
        service.tracer,
        service.parsing,
        service.anonymous,
        service.limits,
        service.call_log,
        service.deadlines,
    )


def retrieve_method(service: RetrievalService) -> Method:
    """Return ``Retrieve``."""
    bounds = service.message_bounds["Retrieve"]
    return Method("Retrieve", pb.RetrieveRequest, service.retrieve, bounds)


def describe_method(service: RetrievalService) -> Method:
    """Return ``DescribeRelease``."""
    bounds = service.message_bounds["DescribeRelease"]
    return Method("DescribeRelease", pb.DescribeReleaseRequest, service.describe_release, bounds)


def generic_handlers(
    service: RetrievalService, admin: AdminService
) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
    """Make the handlers of both services, to be added to a ``grpc.aio`` or ``http2`` server."""
    bounds = service.message_bounds
    searching = search_gate(service)
    bulk = bulk_gate(service)
    control = control_gate(service)
    methods: tuple[tuple[Method, CallGate], ...] = (
        (
            Method(
                "RetrieveMulti",
                pb.RetrieveMultiRequest,
                service.retrieve_multi,
                bounds["RetrieveMulti"],
                lambda message: len(message.targets),
            ),
            searching,
        ),
        (Method("Score", pb.ScoreRequest, service.score, bounds["Score"]), searching),
        (
            Method(
                "RetrieveBatch",
                pb.RetrieveBatchRequest,
                service.retrieve_batch,
                bounds["RetrieveBatch"],
                service.searches_of,
            ),
            bulk,
        ),
        (
            Method(
                "Embed",
                pb.EmbedRequest,
                service.embed,
                bounds["Embed"],
                lambda message: len(message.queries),
            ),
            bulk,
        ),
        (describe_method(service), control),
    )
    retrieval_handlers = {"Retrieve": _retrieve_handler(service, searching)}
    for method, gate in methods:
        retrieval_handlers[method.name] = _unary_handler(method, gate)
    admin_handlers = {
        method.name: _unary_handler(method, control) for method in _admin_methods(admin, bounds)
    }
    return (
        grpc.method_handlers_generic_handler(RETRIEVAL, retrieval_handlers),
        grpc.method_handlers_generic_handler(ADMIN, admin_handlers),
    )


def _unary_handler(method: Method, gate: CallGate) -> UnaryHandler:
    """Make the handler of a method that refuses a call before its message has come, if it may."""
    refusals = Refusals(method.name, gate.admission, gate.metrics.count)

    def refuse(metadata: Metadata) -> Refusal | None:
        try:
            gate.caller_of(metadata)
        except Unauthenticated as error:
            return refusals.unauthenticated(error)
        return refusals.when_full()

    return UnaryHandler(
        MethodHandler(method, gate).handle, refuse=refuse, max_bytes=method.bounds.max_bytes
    )


def _retrieve_handler(service: RetrievalService, gate: CallGate) -> UnaryHandler:
    fast_path = FastPath(
        gate, service.releases, service.queries, service.searches, service.recorder
    )
    method = retrieve_method(service)
    full_path = MethodHandler(method, gate)
    # Not refused before its message has come: its answer may be ready
    return UnaryHandler(
        RetrieveHandler(fast_path, full_path).handle,
        answer_now=fast_path,
        answer_later=full_path.handle,
        max_bytes=method.bounds.max_bytes,
    )


def _admin_methods(admin: AdminService, bounds: dict[str, MessageBounds]) -> tuple[Method, ...]:
    return (
        Method(
            "Activate", pb.ActivateRequest, admin.activate, bounds["Activate"], needs_admin=True
        ),
        Method(
            "Rollback", pb.RollbackRequest, admin.rollback, bounds["Rollback"], needs_admin=True
        ),
        Method(
            "Upsert",
            pb.UpsertRequest,
            admin.upsert,
            bounds["Upsert"],
            lambda message: len(message.entities),
            needs_admin=True,
        ),
        Method(
            "Delete",
            pb.DeleteRequest,
            admin.delete,
            bounds["Delete"],
            lambda message: len(message.ids),
            needs_admin=True,
        ),
    )
