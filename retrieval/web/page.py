"""The page to look at, and the JSON behind it: handlers for the metrics port that ask the service as any caller would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
from google.protobuf.message import Message

from protos import retrieval_pb2 as pb
from retrieval.client.results import Hit, RetrieveResult, release_description, retrieve_result
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.handlers import (
    MethodHandler,
    describe_method,
    retrieve_method,
    search_gate,
)
from retrieval.service.service import RetrievalService
from retrieval.web.http_server import Handler, Request, Response

DEADLINE_SECONDS = 10.0
MAX_PAGE_K = 200
PICTURE_ATTRIBUTE = "picture"
IMAGE_ATTRIBUTE = "image"
SAMPLE_MARKS = {"pin": "pin:1f480", "product": "product:circle-caret-up", "ad": "ad:brand-firefox"}
"""An id of the sample data per entity type: a release that holds it shows the sample's pictures, no other reads them (160 MB)."""
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'"
    " data: https: http:; base-uri 'none'"
)
PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


class CallFailed(Exception):
    """The service refused a call of the page."""

    def __init__(self, code: grpc.StatusCode, details: str, retry_after_ms: str | None) -> None:
        super().__init__(details)
        self.code, self.details, self.retry_after_ms = code, details, retry_after_ms


@dataclass(frozen=True, slots=True)
class PageContext:
    """Stands where a gRPC context stands, so that the page passes the same door (rights, limits, metrics) as every caller."""

    metadata: tuple[tuple[str, str], ...]
    ends: float

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """The caller's token, if the browser sent one."""
        return self.metadata

    def time_remaining(self) -> float:
        """Seconds left of ``DEADLINE_SECONDS``."""
        return self.ends - time.monotonic()

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn:
        """Leave with a typed error."""
        raise CallFailed(code, details, dict(trailing).get("retry-after-ms"))


Call = Callable[[bytes, Any], Awaitable[bytes]]


class Page:
    """The page's files and its JSON.

    Args:
        service: Answers the questions.
        pictures: Id -> SVG, for entities whose release holds no ``picture`` attribute; None: the
            sample data's, read at the first need of a release made from it.
    """

    def __init__(
        self, service: RetrievalService, pictures: Mapping[str, str] | None = None
    ) -> None:
        self._service = service
        self._pictures = pictures
        self._sample: Mapping[str, str] | None = None
        self._reading = asyncio.Lock()
        gate = search_gate(service)
        self._retrieve: Call = MethodHandler(retrieve_method(service), gate).handle
        self._describe: Call = MethodHandler(describe_method(service), gate).handle

    async def _ask(self, call: Call, message: Message, request: Request) -> bytes:
        authorization = request.headers.get("authorization")
        metadata = (("authorization", authorization),) if authorization else ()
        context = PageContext(metadata, time.monotonic() + DEADLINE_SECONDS)
        return await asyncio.wait_for(call(message.SerializeToString(), context), DEADLINE_SECONDS)

    async def describe(self, request: Request) -> Response:
        """``GET /api/describe``: entity types with counts, index kind and measured recall; release and space."""
        content = await self._ask(self._describe, pb.DescribeReleaseRequest(), request)
        release = release_description(pb.DescribeReleaseResponse.FromString(content))
        entities = [
            {
                "entity_type": e.entity_type,
                "count": e.count,
                "index_kind": e.index_kind,
                "ann_recall_at_10": e.ann_recall_at_10,
                "ann_recall_low": e.ann_recall_low,
                "ann_recall_high": e.ann_recall_high,
            }
            for e in release.entities.values()
        ]
        return Response.of_json(
            {
                "release_id": release.release_id,
                "space_id": release.space_id,
                "form_id": release.form_id,
                "entities": entities,
            }
        )

    async def search(self, request: Request) -> Response:
        """``GET /api/search?q=&type=&k=&exact=1``: hits to show; with ``exact`` also what the graph would have returned of them."""
        exact = request.query.get("exact") == "1"
        try:
            k = min(MAX_PAGE_K, int(request.query.get("k", "24")))
        except ValueError:
            k = 0
        if k < 1:
            return Response.of_json(
                {"error": f"k: expected a whole number, 1 to {MAX_PAGE_K}."}, 400
            )
        wanted = pb.RetrieveRequest(
            query=request.query.get("q", ""),
            entity_type=request.query.get("type", "pin"),
            k=k,
            filter=request.query.get("filter", ""),
            language=request.query.get("language", ""),
            attributes=["*"],
        )
        graph = retrieve_result(
            pb.RetrieveResponse.FromString(await self._ask(self._retrieve, wanted, request))
        )
        shown = graph
        if exact:
            wanted.exact = True
            wanted.release_id = graph.release_id  # a swap in between must not compare two releases
            shown = retrieve_result(
                pb.RetrieveResponse.FromString(await self._ask(self._retrieve, wanted, request))
            )
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
        return Response.of_json(page)

    async def picture(self, request: Request) -> Response:
        """``GET /api/picture/<entity type>/<id>``: the entity's SVG, never allowed to run a script."""
        entity_type, _, id_ = request.tail.partition("/")
        svg = await self._svg(entity_type, id_)
        if svg is None:
            return Response(b"no picture\n", status=404)
        headers = {"Content-Security-Policy": PICTURE_POLICY, "Cache-Control": "max-age=3600"}
        return Response(svg.encode(), "image/svg+xml; charset=utf-8", headers=headers)

    async def _svg(self, entity_type: str, id_: str) -> str | None:
        active = self._service.releases.active
        if self._service.tokens is None and active is not None and entity_type in active.entities:
            held = (
                active.entities[entity_type]
                .attributes([id_], [PICTURE_ATTRIBUTE])[0]
                .get(PICTURE_ATTRIBUTE)
            )
            if isinstance(held, str) and held.lstrip().startswith("<svg"):
                return held
        if self._pictures is not None:
            return self._pictures.get(id_)
        if active is None or not _is_of_the_sample(active, entity_type):
            return None
        async with self._reading:
            if self._sample is None:
                self._sample = await asyncio.to_thread(_sample_pictures)
        return self._sample.get(id_)


def _is_of_the_sample(serving: ServingRelease, entity_type: str) -> bool:
    mark = SAMPLE_MARKS.get(entity_type)
    return (
        mark is not None
        and entity_type in serving.entities
        and serving.entities[entity_type].row_of(mark) is not None
    )


def _sample_pictures() -> Mapping[str, str]:
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
    values = {name: value for name, value in hit.attributes.items() if value not in (None, "", [])}
    svg = values.pop(PICTURE_ATTRIBUTE, None)
    image = values.get(IMAGE_ATTRIBUTE)
    picture = f"api/picture/{quote(entity_type, safe='')}/{quote(hit.id, safe='')}"
    if (
        not svg
        and isinstance(image, str)
        and image.startswith(("https://", "http://", "data:image/"))
    ):
        picture = image
    if entity_type == "query":
        picture = ""
    title = values.get("title") or values.get("query") or hit.id
    return {
        "id": hit.id,
        "score": round(hit.score, 4),
        "title": str(title),
        "character": values.get("character") or "",
        "picture": picture,
        "attributes": values,
    }


def guarded(handler: Handler) -> Handler:
    """Answer errors as JSON with the HTTP status that matches the gRPC one."""

    async def answer(request: Request) -> Response:
        if request.method == "POST":
            return Response.of_json({"error": "expected GET."}, 405)
        try:
            return await handler(request)
        except CallFailed as error:
            response = Response.of_json(
                {"error": error.details, "code": error.code.name}, HTTP_STATUS.get(error.code, 500)
            )
            if error.retry_after_ms is None:
                return response
            seconds = str(max(1, round(float(error.retry_after_ms) / 1000)))
            return Response(
                response.body, response.content_type, response.status, {"Retry-After": seconds}
            )
        except TimeoutError:
            return Response.of_json(
                {"error": f"no answer within {DEADLINE_SECONDS:g} s.", "code": "DEADLINE_EXCEEDED"},
                504,
            )

    return answer


def _file(name: str) -> Handler:
    content = resources.files("retrieval.web").joinpath(name).read_bytes()
    kind = CONTENT_TYPES["." + name.rsplit(".", 1)[1]]

    async def serve(request: Request) -> Response:
        return Response(
            content,
            kind,
            headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"},
        )

    return serve


def routes(
    service: RetrievalService, pictures: Mapping[str, str] | None = None
) -> dict[str, Handler]:
    """The page's paths for the HTTP server: ``/``, ``/page/...``, ``/api/describe``, ``/api/search``, ``/api/picture/...``."""
    page = Page(service, pictures)
    return {
        "/": _file("index.html"),
        "/page/page.css": _file("page.css"),
        "/page/page.js": _file("page.js"),
        "/api/describe": guarded(page.describe),
        "/api/search": guarded(page.search),
        "/api/picture/": guarded(page.picture),
    }
