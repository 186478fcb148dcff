"""What a server answers over HTTP: calls as JSON, the page, metrics and health."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp

from protos import retrieval_pb2 as pb
from retrieval.addresses import AllowedHosts
from retrieval.config import ServeConfig
from retrieval.observability.metrics import Metrics, exposition
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.service.handlers import search_gate
from retrieval.service.service import RetrievalService
from retrieval.web.http_calls import HttpContext, failure_of
from retrieval.web.http_errors import error_response
from retrieval.web.openapi import openapi_document
from retrieval.web.request_policy import RequestPolicy, with_cors
from retrieval.web.rpc import RpcEndpoint, rpc_methods

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class HttpApps:
    """What a server answers over HTTP, port by port.

    Attributes:
        web: Calls, the page, health and metrics, under the server's rules for callers.
        probe: Health and metrics alone, for a private network.
        calls: Calls alone, for the gRPC port.
    """

    web: ASGIApp
    probe: ASGIApp
    calls: ASGIApp


def http_apps(
    config: ServeConfig,
    service: RetrievalService,
    snapshots: SharedSnapshots | None,
    handlers: Sequence[grpc.GenericRpcHandler],
) -> HttpApps:
    """Make the applications of a server.

    Args:
        config: Allowed names and origins.
        service: Whose health and metrics are reported; answers the page's questions.
        snapshots: Metrics of all workers, this one included; None: this process is alone.
        handlers: Of the gRPC port.
    """
    reports = _Reports(service, snapshots)
    gate = search_gate(service)
    calls = RpcEndpoint(rpc_methods(pb.DESCRIPTOR, handlers), gate, config.limits.max_message_bytes)
    call_routes = [*calls.routes(), Route("/openapi.json", _openapi)]
    web_routes = [
        *call_routes,
        Route("/metrics", _for_callers(reports.metrics, service)),
        Route("/healthz", reports.health_for_callers),
        *_page(service),
    ]
    probes = [
        Route("/metrics", reports.metrics),
        Route("/healthz", reports.health),
        Route("/readyz", reports.health),
        Route("/livez", reports.alive),
    ]
    return HttpApps(
        web=_for_strangers(web_routes, config),
        probe=RequestPolicy(Router(probes, redirect_slashes=False), None),
        calls=_for_strangers(call_routes, config),
    )


def _for_strangers(routes: Sequence[BaseRoute], config: ServeConfig) -> ASGIApp:
    """Make an application that answers under the server's names, to pages of allowed origins."""
    return RequestPolicy(
        with_cors(Router(routes, redirect_slashes=False), config.cors_origins),
        AllowedHosts(config.allowed_hosts),
    )


class _Reports:
    """Health and metrics of a server."""

    def __init__(self, service: RetrievalService, snapshots: SharedSnapshots | None) -> None:
        self._service = service
        self._metrics: Metrics = service.metrics
        self._snapshots = snapshots

    async def metrics(self, request: Request) -> Response:
        snapshots = self._snapshots
        merged = snapshots.merged() if snapshots is not None else self._metrics.snapshot()
        return Response(exposition(merged), headers={"Content-Type": METRICS_TYPE})

    async def health(self, request: Request) -> Response:
        """Say whether a release is served, and which."""
        active = self._service.releases.active
        if active is None or not self._is_ready():
            return self._not_ready()
        return JSONResponse(
            {
                "ready": True,
                "release_id": active.release_id,
                "space_id": active.space_id,
                "entity_types": sorted(active.entities),
            }
        )

    async def health_for_callers(self, request: Request) -> Response:
        """Say whether a release is served; which, only to those who may know."""
        if self._service.tokens is not None:
            try:
                search_gate(self._service).caller(HttpContext(request, 0.0))
            except Exception:
                ready = self._is_ready()
                return JSONResponse({"ready": ready}, 200 if ready else 503)
        return await self.health(request)

    async def alive(self, request: Request) -> Response:
        """Say that the event loop runs."""
        return JSONResponse({"alive": True})

    def _is_ready(self) -> bool:
        service = self._service
        return service.releases.active is not None and service.listening and not service.draining

    def _not_ready(self) -> Response:
        service = self._service
        reason = "draining" if service.draining else service.releases.reason_not_ready
        return JSONResponse({"ready": False, "reason": reason}, 503)


def _for_callers(endpoint: Endpoint, service: RetrievalService) -> Endpoint:
    """Demand a token where there are tokens."""

    async def answer(request: Request) -> Response:
        try:
            search_gate(service).caller(HttpContext(request, 0.0))
        except Exception as error:
            return error_response(failure_of(error))
        return await endpoint(request)

    return answer


async def _openapi(request: Request) -> Response:
    return JSONResponse(openapi_document(pb.DESCRIPTOR))


def _page(service: RetrievalService) -> list[BaseRoute]:
    """Return the page's routes; a server without the module goes without it."""
    try:
        page = importlib.import_module("retrieval.web.page")
    except ModuleNotFoundError as error:
        if error.name != "retrieval.web.page":
            raise
        return []
    routes: list[BaseRoute] = page.page_routes(service)
    return routes
