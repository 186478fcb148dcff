"""The paths of a server's HTTP port: metrics, health, the page."""

from __future__ import annotations

import importlib

from retrieval.observability.metrics import Metrics, exposition
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.service.service import RetrievalService
from retrieval.web.http_server import Handler, Request, Response


def http_routes(
    service: RetrievalService, metrics: Metrics, snapshots: SharedSnapshots | None
) -> dict[str, Handler]:
    """Return path -> handler.

    Args:
        service: Whose health is reported; answers the page's questions.
        metrics: Of this process.
        snapshots: Metrics of all workers, this one included; None: this process is alone.
    """

    async def scrape(request: Request) -> Response:
        merged = snapshots.merged() if snapshots is not None else metrics.snapshot()
        return Response(exposition(merged), "text/plain; version=0.0.4; charset=utf-8")

    async def healthz(request: Request) -> Response:
        active = service.releases.active
        if active is None or service.draining:
            reason = "draining" if service.draining else service.releases.reason_not_ready
            return Response.of_json({"ready": False, "reason": reason}, 503)
        return Response.of_json(
            {
                "ready": True,
                "release_id": active.release_id,
                "space_id": active.space_id,
                "entity_types": sorted(active.entities),
            }
        )

    routes: dict[str, Handler] = {"/metrics": scrape, "/healthz": healthz}
    try:
        page = importlib.import_module("retrieval.web.page")
    except ModuleNotFoundError as error:
        if error.name != "retrieval.web.page":
            raise
    else:
        routes.update(page.routes(service))
    return routes
