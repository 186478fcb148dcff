"""The demo page and its JSON: routes of the web port that call the service as callers do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from protos import retrieval_pb2 as pb
from retrieval.client.results import Hit, RetrieveResult, release_description, retrieve_result
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.handlers import (
    MethodHandler,
    control_gate,
    describe_method,
    retrieve_method,
    search_gate,
)
from retrieval.service.service import RetrievalService
from retrieval.web.http_calls import HttpContext
from retrieval.web.http_errors import HTTP_STATUS, CallFailed, retry_after_header

DEADLINE_SECONDS = 10.0
MAX_PAGE_K = 200
PICTURE_ATTRIBUTE = "picture"
IMAGE_ATTRIBUTE = "image"
IMAGE_SCHEMES = ("https://", "http://", "data:image/")
SAMPLE_MARKS = {"pin": "pin:1f480", "product": "product:circle-caret-up", "ad": "ad:brand-firefox"}
"""An id of the sample data per entity type.

A release that holds it shows the sample's images; no other reads them (160 MB).
"""
DESCRIBED = (
    "entity_type",
    "count",
    "index_kind",
    "ann_recall_at_10",
    "ann_recall_low",
    "ann_recall_high",
)
"""Fields of an entity type that the page shows."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'"
    " data: https: http:; base-uri 'none'; frame-ancestors 'none'"
)
PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}

Call = Callable[[bytes, Any], Awaitable[bytes]]
Endpoint = Callable[[Request], Awaitable[Response]]


class Page:
    """The page's files and its JSON.

    Args:
        service: Answers the calls.
        images: Id -> SVG, for entities whose release holds no ``picture`` attribute; None: the
            sample data's, read when a release made from it first needs one.
    """

    def __init__(self, service: RetrievalService, images: Mapping[str, str] | None = None) -> None:
        self._service = service
        self._images = images
        self._sample_images: Mapping[str, str] | None = None
        self._reading = asyncio.Lock()
        searching = search_gate(service)
        control = control_gate(service)
        self._retrieve: Call = MethodHandler(retrieve_method(service), searching).handle
        self._describe: Call = MethodHandler(describe_method(service), control).handle

    async def _ask(self, call: Call, message: Message, request: Request) -> bytes:
        context = HttpContext(request, DEADLINE_SECONDS)
        return await asyncio.wait_for(call(message.SerializeToString(), context), DEADLINE_SECONDS)

    async def describe(self, request: Request) -> Response:
        """Answer ``GET /api/describe``: entity types with counts, kind and measured recall."""
        content = await self._ask(self._describe, pb.DescribeReleaseRequest(), request)
        release = release_description(pb.DescribeReleaseResponse.FromString(content))
        entities = [
            {name: getattr(entity, name) for name in DESCRIBED}
            for entity in release.entities.values()
        ]
        return JSONResponse(
            {
                "release_id": release.release_id,
                "space_id": release.space_id,
                "form_id": release.form_id,
                "entities": entities,
            }
        )

    async def search(self, request: Request) -> Response:
        """Answer ``GET /api/search?q=&type=&k=&exact=1``: hits to show.

        With ``exact`` the answer also says which of them the graph would have returned.
        """
        exact = request.query_params.get("exact") == "1"
        try:
            k = min(MAX_PAGE_K, int(request.query_params.get("k", "24")))
        except ValueError:
            k = 0
        if k < 1:
            return JSONResponse({"error": f"k: expected a whole number, 1 to {MAX_PAGE_K}."}, 400)
        wanted = pb.RetrieveRequest(
            query=request.query_params.get("q", ""),
            entity_type=request.query_params.get("type", "pin"),
            k=k,
            filter=request.query_params.get("filter", ""),
            language=request.query_params.get("language", ""),
            attributes=["*"],
        )
        graph = await self._found(wanted, request)
        shown = graph
        if exact:
            wanted.exact = True
            wanted.release_id = graph.release_id  # a swap in between must not compare two releases
            shown = await self._found(wanted, request)
        page = _result_json(shown, wanted.entity_type)
        page["cache_hit"] = graph.cache_hit
        if exact:
            found = set(graph.ids)
            for hit in page["hits"]:
                hit["missed_by_graph"] = hit["id"] not in found
            page["graph"] = {
                "found": sum(not hit["missed_by_graph"] for hit in page["hits"]),
                "of": len(shown.hits),
                **_how(graph),
            }
        return JSONResponse(page)

    async def _found(self, wanted: pb.RetrieveRequest, request: Request) -> RetrieveResult:
        content = await self._ask(self._retrieve, wanted, request)
        return retrieve_result(pb.RetrieveResponse.FromString(content))

    async def picture(self, request: Request) -> Response:
        """Answer ``GET /api/picture/<entity type>/<id>``: the entity's SVG, without scripts."""
        entity_type, _, id_ = request.path_params["entity"].partition("/")
        svg = await self._svg(entity_type, id_)
        if svg is None:
            return Response(b"no picture\n", 404)
        headers = {"Content-Security-Policy": PICTURE_POLICY, "Cache-Control": "max-age=3600"}
        return Response(svg.encode(), headers=headers, media_type="image/svg+xml")

    async def _svg(self, entity_type: str, id_: str) -> str | None:
        active = self._service.releases.active
        if self._service.tokens is None and active is not None and entity_type in active.entities:
            (attributes,) = active.entities[entity_type].attributes([id_], [PICTURE_ATTRIBUTE])
            svg = attributes.get(PICTURE_ATTRIBUTE)
            if isinstance(svg, str) and svg.lstrip().startswith("<svg"):
                return svg
        if self._images is not None:
            return self._images.get(id_)
        if active is None or not _holds_the_sample(active, entity_type):
            return None
        async with self._reading:
            if self._sample_images is None:
                self._sample_images = await asyncio.to_thread(_read_sample_images)
        return self._sample_images.get(id_)


def _holds_the_sample(serving: ServingRelease, entity_type: str) -> bool:
    mark = SAMPLE_MARKS.get(entity_type)
    return (
        mark is not None
        and entity_type in serving.entities
        and serving.entities[entity_type].row_of(mark) is not None
    )


def _read_sample_images() -> Mapping[str, str]:
    from encoders.datasets.dataset import load_sample

    return load_sample(engaged_queries=0).images


def _how(result: RetrieveResult) -> dict[str, Any]:
    return {
        "plan": result.plan,
        "ef": result.ef,
        "estimated_recall": result.estimated_recall,
        "timings": result.timings._asdict(),
    }


def _result_json(result: RetrieveResult, entity_type: str) -> dict[str, Any]:
    return {
        "hits": [_hit_json(hit, entity_type) for hit in result.hits],
        "release_id": result.release_id,
        "space_id": result.space_id,
        **_how(result),
    }


def _hit_json(hit: Hit, entity_type: str) -> dict[str, Any]:
    values = {
        name: value if _is_json(value) else str(value)
        for name, value in hit.attributes.items()
        if value not in (None, "", [])
    }
    svg = values.pop(PICTURE_ATTRIBUTE, None)
    title = values.get("title") or values.get("query") or hit.id
    return {
        "id": hit.id,
        "score": round(hit.score, 4),
        "title": str(title),
        "character": values.get("character") or "",
        "picture": "" if entity_type == "query" else _picture_address(hit, entity_type, bool(svg)),
        "attributes": values,
    }


def _is_json(value: Any) -> bool:
    """Return whether JSON can hold a value: it has no NaN and no infinity."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    return not isinstance(value, float) or math.isfinite(value)


def _picture_address(hit: Hit, entity_type: str, has_svg: bool) -> str:
    """Return where the browser finds an entity's picture: its ``image``, if there is no SVG."""
    image = hit.attributes.get(IMAGE_ATTRIBUTE)
    if not has_svg and isinstance(image, str) and image.startswith(IMAGE_SCHEMES):
        return image
    return f"api/picture/{quote(entity_type, safe='')}/{quote(hit.id, safe='')}"


def guarded(endpoint: Endpoint) -> Endpoint:
    """Answer errors as JSON with the HTTP status that matches the gRPC one."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CallFailed as error:
            return JSONResponse(
                {"error": error.details, "code": error.code.name},
                HTTP_STATUS.get(error.code, 500),
                retry_after_header(error.trailing),
            )
        except TimeoutError:
            late = grpc.StatusCode.DEADLINE_EXCEEDED
            return JSONResponse(
                {"error": f"no answer within {DEADLINE_SECONDS:g} s.", "code": late.name},
                HTTP_STATUS[late],
            )

    return answer


def _file(name: str) -> Endpoint:
    content = resources.files("retrieval.web").joinpath(name).read_bytes()
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "Cache-Control": "no-cache",
        "Content-Type": CONTENT_TYPES["." + name.rsplit(".", 1)[1]],
    }

    async def serve(request: Request) -> Response:
        return Response(content, headers=headers)

    return serve


def page_routes(
    service: RetrievalService, images: Mapping[str, str] | None = None
) -> list[BaseRoute]:
    """Return the routes of the page."""
    page = Page(service, images)
    return [
        Route("/", _file("index.html")),
        Route("/page/page.css", _file("page.css")),
        Route("/page/page.js", _file("page.js")),
        Route("/api/describe", guarded(page.describe)),
        Route("/api/search", guarded(page.search)),
        Route("/api/picture/{entity:path}", guarded(page.picture)),
    ]
