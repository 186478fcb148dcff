"""The demo page and its JSON: routes of the web port that call the service as callers do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib import resources
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from index_builder.fusion.weights import LEGS
from protos import retrieval_pb2 as pb
from retrieval.client.results import Hit, release_description
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.handlers import MethodHandler, control_gate, describe_method
from retrieval.service.service import RetrievalService
from retrieval.web.http_errors import HTTP_STATUS, CallFailed, retry_after_header
from retrieval.web.page_search import (
    DEADLINE_SECONDS,
    QUERY_TYPE,
    Call,
    DrawHit,
    PageSearch,
    ask,
    title_of,
)

PICTURE_ATTRIBUTE = "picture"
IMAGE_ATTRIBUTE = "image"
MAX_SAMPLES = 8
MAX_SAMPLE_CHARACTERS = 40
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
        control = control_gate(service)
        self._describe: Call = MethodHandler(describe_method(service), control).handle
        self._search = PageSearch(service, self._draw)

    async def search(self, request: Request) -> Response:
        """Answer ``GET /api/search``, see ``PageSearch.search``."""
        return await self._search.search(request)

    async def describe(self, request: Request) -> Response:
        """Answer ``GET /api/describe?release=``: what is served, as far as the page shows it."""
        wanted = pb.DescribeReleaseRequest(release_id=request.query_params.get("release", ""))
        content = await ask(self._describe, wanted, request)
        release = release_description(pb.DescribeReleaseResponse.FromString(content))
        serving = self._service.releases.loaded.get(release.release_id)
        entities = [
            {
                **{name: getattr(entity, name) for name in DESCRIBED},
                **({} if serving is None else _legs_json(serving, entity.entity_type)),
            }
            for entity in release.entities.values()
        ]
        return JSONResponse(
            {
                "release_id": release.release_id,
                "space_id": release.space_id,
                "form_id": release.form_id,
                "loaded_release_ids": release.loaded_release_ids,
                "samples": [] if serving is None else _samples(serving, release.entities),
                "entities": entities,
            }
        )

    def _draw(self, entity_type: str) -> DrawHit:
        """Return what turns hits of an entity type into JSON."""
        active = self._service.releases.active
        has_sample = active is not None and _holds_the_sample(active, entity_type)

        def picture_of(hit: Hit, svg: object) -> str:
            if entity_type == QUERY_TYPE:
                return ""
            image = hit.attributes.get(IMAGE_ATTRIBUTE)
            if not svg and isinstance(image, str) and image.startswith(IMAGE_SCHEMES):
                return image
            is_served = bool(svg) and self._service.tokens is None
            if is_served or (has_sample if self._images is None else hit.id in self._images):
                return f"api/picture/{quote(entity_type, safe='')}/{quote(hit.id, safe='')}"
            return ""

        def draw(hit: Hit) -> dict[str, Any]:
            values = {
                name: value if _is_json(value) else str(value)
                for name, value in hit.attributes.items()
                if value not in (None, "", [])
            }
            svg = values.pop(PICTURE_ATTRIBUTE, None)
            return {
                "id": hit.id,
                "score": round(hit.score, 4),
                "title": title_of(hit),
                "character": values.get("character") or "",
                "picture": picture_of(hit, svg),
                "attributes": values,
            }

        return draw

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


def _legs_json(serving: ServingRelease, entity_type: str) -> dict[str, Any]:
    """Describe which legs an entity type has, and by which the release answers."""
    index = serving.entities[entity_type]
    fused = serving.release.fused[entity_type]
    has_leg = (True, index.lexical is not None, fused.votes is not None)
    fusion = fused.fusion
    return {
        "attributes": index.attribute_table.schema,
        "target_recall": index.default_recall,
        "legs": [leg for leg, there in zip(LEGS, has_leg, strict=True) if there],
        "fused": fusion is not None and fusion.enabled,
        "gain": None if fusion is None else fusion.gain,
        "calibrated": fusion is not None and fusion.probability is not None,
    }


def _samples(serving: ServingRelease, shown: Collection[str]) -> list[str]:
    """Return texts to begin with: known queries, else titles; of what the caller may see."""
    entity_type = QUERY_TYPE if QUERY_TYPE in shown else next(iter(shown), None)
    if entity_type is None or not len(serving.entities[entity_type].ids):
        return []
    index = serving.entities[entity_type]
    rows = np.unique(np.linspace(0, len(index.ids) - 1, 4 * MAX_SAMPLES).astype(np.int64))
    ids = index.ids.take(rows)
    titles = [str(values.get("title") or "") for values in index.attributes(ids, ["title"])]
    if entity_type == QUERY_TYPE:
        titles = [title or id_ for title, id_ in zip(titles, ids, strict=True)]
    short = [text for text in dict.fromkeys(titles) if 0 < len(text) <= MAX_SAMPLE_CHARACTERS]
    return short[:MAX_SAMPLES]


def _is_json(value: Any) -> bool:
    """Return whether JSON can hold a value: it has no NaN and no infinity."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    return not isinstance(value, float) or math.isfinite(value)


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


class _Files:
    """The page's own files, read once."""

    def __init__(self) -> None:
        folder = resources.files("retrieval.web").joinpath("assets")
        self._contents = {file.name: file.read_bytes() for file in folder.iterdir()}

    async def index(self, request: Request) -> Response:
        """Answer ``GET /``."""
        return self._file("index.html")

    async def named(self, request: Request) -> Response:
        """Answer ``GET /page/<name>``."""
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        content_type = CONTENT_TYPES.get("." + name.rpartition(".")[2])
        if name not in self._contents or content_type is None:
            return Response(b"no such file\n", 404)
        headers = {
            "Content-Security-Policy": PAGE_POLICY,
            "Cache-Control": "no-cache",
            "Content-Type": content_type,
        }
        return Response(self._contents[name], headers=headers)


def page_routes(
    service: RetrievalService, images: Mapping[str, str] | None = None
) -> list[BaseRoute]:
    """Return the routes of the page."""
    page = Page(service, images)
    files = _Files()
    return [
        Route("/", files.index),
        Route("/page/{name}", files.named),
        Route("/api/describe", guarded(page.describe)),
        Route("/api/search", guarded(page.search)),
        Route("/api/picture/{entity:path}", guarded(page.picture)),
    ]
