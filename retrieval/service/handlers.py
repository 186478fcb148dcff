"""The calls of protos/retrieval.proto as gRPC handlers over bytes: rights, places, errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from protos import retrieval_pb2 as pb
from retrieval.errors import InvalidRequest
from retrieval.http2.calls import UnaryHandler
from retrieval.http2.refusals import Refusal
from retrieval.service.admin import AdminService
from retrieval.service.admission import Refusals, retry_trailer
from retrieval.service.calls import CallContext, CallGate, CallInfo
from retrieval.service.fast_path import FastPath
from retrieval.service.service import RetrievalService
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
        searches: How many searches a request holds; None: one, however large.
        needs_admin: Whether the caller needs the admin right.
    """

    name: str
    request_class: type[Message]
    answer: Callable[[Any, CallInfo], Awaitable[Message]]
    searches: Callable[[Any], int] | None = None
    needs_admin: bool = False


class MethodHandler:
    """Answers one method's calls. Messages are parsed in here, so that bad bytes get a typed error.

    Args:
        method: Which.
        gate: What its calls pass.
    """

    def __init__(self, method: Method, gate: CallGate) -> None:
        self._method = method
        self._gate = gate
        self._parse = method.request_class.FromString
        self._seconds = gate.metrics.histogram("omni_request_seconds", (method.name,))

    async def handle(self, content: bytes, context: CallContext) -> bytes:
        """Answer the bytes of a request, or end the call with a typed status."""
        method = self._method
        gate = self._gate
        started_ns = time.perf_counter_ns()
        places = 0
        try:
            caller = gate.caller(context)
            if method.needs_admin:
                caller.require_admin()
            request = self._parsed(content)
            wanted = 1
            if method.searches is not None:
                wanted = gate.admission.cost_of(method.searches(request))
            gate.admission.enter(wanted)
            places = wanted
            response = await method.answer(request, CallInfo(context, caller, started_ns))
            answer: bytes = response.SerializeToString()
            if gate.tracer is not None:
                metadata = context.invocation_metadata() or ()
                took_ns = time.perf_counter_ns() - started_ns
                gate.tracer.record_call(method.name, request, response, took_ns, metadata)
            self._count("OK")
            return answer
        except asyncio.CancelledError:
            # By the caller, or by the transport because the caller's time is over
            remaining = context.time_remaining()
            in_time = remaining is None or remaining > 0
            self._count("CANCELLED" if in_time else "DEADLINE_EXCEEDED")
            raise
        except Exception as error:  # whatever went wrong becomes a typed status
            code, message = status_for(error)
            self._count(code.name)
            if code is grpc.StatusCode.INTERNAL:
                log.exception("%s failed", method.name)
            await context.abort(code, message, retry_trailer(error))
            raise AssertionError("abort raises") from error
        finally:
            seconds = (time.perf_counter_ns() - started_ns) / 1e9
            if places:
                gate.admission.leave(places, seconds)
            self._seconds.observe(seconds)

    def _parsed(self, content: bytes) -> Message:
        try:
            return self._parse(content)
        except DecodeError as error:
            raise InvalidRequest(
                f"{self._method.name}: the bytes are not a"
                f" {self._method.request_class.DESCRIPTOR.name} message ({error})."
            ) from error

    def _count(self, code: str) -> None:
        self._gate.metrics.count("omni_requests", (self._method.name, code))


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
    """Return what searches pass."""
    return CallGate(service.admission, service.metrics, service.tokens, service.tracer)


def control_gate(service: RetrievalService) -> CallGate:
    """Return what calls about the server pass: they have places of their own."""
    return CallGate(service.control_admission, service.metrics, service.tokens, service.tracer)


def retrieve_method(service: RetrievalService) -> Method:
    """Return ``Retrieve``."""
    return Method("Retrieve", pb.RetrieveRequest, service.retrieve)


def describe_method(service: RetrievalService) -> Method:
    """Return ``DescribeRelease``."""
    return Method("DescribeRelease", pb.DescribeReleaseRequest, service.describe_release)


def generic_handlers(
    service: RetrievalService, admin: AdminService
) -> tuple[grpc.GenericRpcHandler, grpc.GenericRpcHandler]:
    """Make the handlers of both services, to be added to a ``grpc.aio`` or ``http2`` server."""
    searching = search_gate(service)
    control = control_gate(service)
    retrieval_handlers = {"Retrieve": _retrieve_handler(service, searching)}
    for method in (
        Method(
            "RetrieveMulti",
            pb.RetrieveMultiRequest,
            service.retrieve_multi,
            lambda message: len(message.targets),
        ),
        Method(
            "RetrieveBatch",
            pb.RetrieveBatchRequest,
            service.retrieve_batch,
            service.searches_of,
        ),
        Method("Embed", pb.EmbedRequest, service.embed, lambda message: len(message.queries)),
        Method("Score", pb.ScoreRequest, service.score),
    ):
        refusals = Refusals(method.name, searching.admission, searching.metrics.count)
        retrieval_handlers[method.name] = UnaryHandler(
            MethodHandler(method, searching).handle, refuse=refusals.when_full
        )
    describe = describe_method(service)
    retrieval_handlers[describe.name] = UnaryHandler(MethodHandler(describe, control).handle)
    admin_handlers = {
        method.name: UnaryHandler(MethodHandler(method, control).handle)
        for method in _admin_methods(admin)
    }
    return (
        grpc.method_handlers_generic_handler(RETRIEVAL, retrieval_handlers),
        grpc.method_handlers_generic_handler(ADMIN, admin_handlers),
    )


def _retrieve_handler(service: RetrievalService, gate: CallGate) -> UnaryHandler:
    fast_path = FastPath(
        gate, service.releases, service.queries, service.searches, service.recorder
    )
    full_path = MethodHandler(retrieve_method(service), gate)
    return UnaryHandler(
        RetrieveHandler(fast_path, full_path).handle,
        answer_now=fast_path,
        answer_later=full_path.handle,
        refuse=fast_path.refusals.when_full,
    )


def _admin_methods(admin: AdminService) -> tuple[Method, ...]:
    return (
        Method("Activate", pb.ActivateRequest, admin.activate, needs_admin=True),
        Method("Rollback", pb.RollbackRequest, admin.rollback, needs_admin=True),
        Method(
            "Upsert",
            pb.UpsertRequest,
            admin.upsert,
            lambda message: len(message.entities),
            needs_admin=True,
        ),
        Method(
            "Delete",
            pb.DeleteRequest,
            admin.delete,
            lambda message: len(message.ids),
            needs_admin=True,
        ),
    )
