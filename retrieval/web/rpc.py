"""Every unary call over HTTP: ``POST /<service>/<method>`` in the Connect protocol or gRPC-Web.

The calls run through the same handlers as on the gRPC port: rights, places, metrics and errors are
the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from retrieval.http2.calls import HandlerCallDetails, UnaryHandler
from retrieval.service.calls import CallGate
from retrieval.web.dialects import STYLES, Style
from retrieval.web.http_calls import (
    DEFAULT_SECONDS,
    BodyBudget,
    ClientGone,
    HttpContext,
    answer_call,
    failure_of,
)
from retrieval.web.http_errors import CallFailed, error_response

log = logging.getLogger(__name__)

INLINE_BODY_BYTES = 2 * 1024
"""A larger body is read in a thread: a kilobyte of JSON may take a millisecond."""
INLINE_ANSWER_BYTES = 32 * 1024
"""A larger answer is written in a thread."""
ENCODING_HEADERS = ("content-encoding", "grpc-encoding")
"""Where a compressed body says so."""
GONE = Response(status_code=499)


class RpcMethod(NamedTuple):
    """One call.

    Attributes:
        name: Without its service's.
        handler: Answers it.
        request_class: Of its message.
        response_class: Of its answer.
    """

    name: str
    handler: UnaryHandler
    request_class: type[Message]
    response_class: type[Message]


def rpc_methods(
    contract: FileDescriptor, handlers: Sequence[grpc.GenericRpcHandler]
) -> dict[str, RpcMethod]:
    """Return the unary methods of a contract by path, ``/<service>/<method>``."""
    found: dict[str, RpcMethod] = {}
    for service in contract.services_by_name.values():
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            details = HandlerCallDetails(path, ())
            known = (generic.service(details) for generic in handlers)
            handler = next((one for one in known if one is not None), None)
            if isinstance(handler, UnaryHandler):
                found[path] = RpcMethod(
                    method.name,
                    handler,
                    GetMessageClass(method.input_type),
                    GetMessageClass(method.output_type),
                )
    return found


class RpcEndpoint:
    """Answers the calls.

    Args:
        methods: By path.
        gate: Finds who calls, before the body is read.
        max_bytes: Of one message.
    """

    def __init__(self, methods: Mapping[str, RpcMethod], gate: CallGate, max_bytes: int) -> None:
        self._methods = methods
        self._gate = gate
        self._max_bytes = max_bytes
        self._bodies = BodyBudget()

    def routes(self) -> Iterator[BaseRoute]:
        """Yield a route for each method, and one for those that there are not."""
        for path in self._methods:
            yield Route(path, self._answer, methods=["POST"])
        for service in sorted({path.rpartition("/")[0] for path in self._methods}):
            yield Route(f"{service}/{{method:path}}", self._unknown, methods=["POST"])

    async def _unknown(self, request: Request) -> Response:
        error = CallFailed(
            grpc.StatusCode.UNIMPLEMENTED, f"there is no method {request.url.path[:200]}."
        )
        return error_response(error, 404)

    async def _answer(self, request: Request) -> Response:
        method = self._methods[request.scope["path"]]
        content_type = request.headers.get("content-type", "")
        style = STYLES.get(content_type.partition(";")[0].strip().lower())
        if style is None:
            return PlainTextResponse(
                f"content-type: expected one of {', '.join(STYLES)}\n",
                415,
                {"Accept-Post": ", ".join(STYLES)},
            )
        try:
            return await self._call(method, style, content_type, request)
        except CallFailed as error:
            return style.dialect.failure(error, content_type)
        except ClientGone:
            return GONE

    async def _call(
        self, method: RpcMethod, style: Style, content_type: str, request: Request
    ) -> Response:
        headers = request.headers
        seconds = style.dialect.timeout(headers)
        context = HttpContext(request, DEFAULT_SECONDS if seconds is None else seconds)
        self._admit(method, context)
        # JSON and base64 take more bytes than what they stand for
        max_bytes = 2 * min(self._max_bytes, method.handler.max_bytes or self._max_bytes)
        async with self._bodies.body_of(request, max_bytes) as body:
            try:
                content = await self._decoded(style, method, headers, body, max_bytes)
            except CallFailed as error:
                self._gate.metrics.count("omni_requests", (method.name, error.code.name))
                raise
            answer = await answer_call(method.handler, content, context, request)
        if len(answer) <= INLINE_ANSWER_BYTES:
            written = style.codec.encode(answer, method.response_class)
        else:
            written = await asyncio.to_thread(style.codec.encode, answer, method.response_class)
        return style.dialect.answer(written, content_type)

    async def _decoded(
        self, style: Style, method: RpcMethod, headers: Headers, body: bytes, max_bytes: int
    ) -> bytes:
        """Return the message of a request's body; one that is or may become large in a thread."""

        def decode() -> bytes:
            message = style.dialect.message(headers, body, max_bytes)
            return style.codec.decode(message, method.request_class)

        is_packed = any(headers.get(name, "identity") != "identity" for name in ENCODING_HEADERS)
        if len(body) <= INLINE_BODY_BYTES and not is_packed:
            return decode()
        return await self._gate.parsing.run(decode)

    def _admit(self, method: RpcMethod, context: HttpContext) -> None:
        """Refuse strangers, and calls that a full server would refuse, before the body is read."""
        try:
            self._gate.caller(context)
        except Exception as error:
            failed = failure_of(error)
            self._gate.metrics.count("omni_requests", (method.name, failed.code.name))
            raise failed from error
        refuse = method.handler.refuse
        refusal = None if refuse is None else refuse(context.invocation_metadata())
        if refusal is not None:
            raise CallFailed(refusal.code, refusal.message, refusal.trailing)
