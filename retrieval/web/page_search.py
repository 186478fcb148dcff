"""What the page searches for: which legs, which release, and why each hit is there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.message import Message
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from index_builder.fusion.fused_search import FusedIndex
from index_builder.fusion.voters import Voter, voters_of
from index_builder.fusion.weights import LEGS
from index_builder.lexical.counting import TEXT_FIELDS
from protos import retrieval_pb2 as pb
from retrieval.client.results import Hit, RetrieveResult, retrieve_result
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.handlers import MethodHandler, retrieve_method, search_gate
from retrieval.service.service import RetrievalService
from retrieval.web.http_calls import HttpContext
from retrieval.web.matches import Part, QueryWords, matches_of

DEADLINE_SECONDS = 10.0
MAX_PAGE_K = 200
QUERY_TYPE = "query"
"""Entity type of known queries: callers who may not retrieve it do not see who voted."""
EQUAL_WEIGHTS = (1.0, 1.0, 1.0)
"""Of legs that are asked for where the release has no weights."""

Call = Callable[[bytes, Any], Awaitable[bytes]]
HitJson = dict[str, Any]
DrawHit = Callable[[Hit], HitJson]


class BadParameter(ValueError):
    """A parameter of the address cannot be used; the message says what was expected."""


class Reason(NamedTuple):
    """Why a hit is there."""

    title: list[Part]
    """Its title, cut where words of the query are."""
    fields: list[tuple[str, list[Part]]]
    """Other fields that hold words of the query."""
    voters: list[Voter]
    """Known queries that voted for it."""


async def ask(call: Call, message: Message, request: Request) -> bytes:
    """Ask the service as a caller over HTTP does. Raises ``CallFailed`` and ``TimeoutError``."""
    context = HttpContext(request, DEADLINE_SECONDS)
    return await asyncio.wait_for(call(message.SerializeToString(), context), DEADLINE_SECONDS)


def retrieve_request(given: QueryParams) -> pb.RetrieveRequest:
    """Read what to search for from the parameters of an address.

    Raises:
        BadParameter: ``k`` or ``min_probability`` cannot be used.
    """
    try:
        k = min(MAX_PAGE_K, int(given.get("k", "24")))
    except ValueError:
        k = 0
    if k < 1:
        raise BadParameter(f"k: expected a whole number, 1 to {MAX_PAGE_K}.")
    least = given.get("min_probability", "")
    try:
        min_probability = float(least) if least else None
    except ValueError:
        raise BadParameter("min_probability: expected a number, 0 to 1.") from None
    return pb.RetrieveRequest(
        query=given.get("q", ""),
        entity_type=given.get("type", "pin"),
        k=k,
        filter=given.get("filter", ""),
        language=given.get("language", ""),
        release_id=given.get("release", ""),
        attributes=["*"],
        min_probability=min_probability,
    )


def chosen_legs(text: str) -> tuple[str, ...]:
    """Read names of legs, apart by commas; empty: the release decides.

    Raises:
        BadParameter: There is no such leg.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in LEGS]
    if unknown:
        raise BadParameter(
            f"legs: expected some of {', '.join(LEGS)}, but got {unknown[0][:40]!r}."
        )
    return names


def fusion_of(legs: Sequence[str], index: FusedIndex) -> pb.Fusion:
    """Return how a call asks for some legs: by the release's weights, the others' being 0.

    Args:
        legs: At least one of ``LEGS``.
        index: Of the entity type.
    """
    if tuple(legs) == LEGS[:1]:
        return pb.Fusion(enabled=False)
    if index.fusion is not None and set(legs) == set(LEGS):
        return pb.Fusion(enabled=True)
    own = EQUAL_WEIGHTS if index.fusion is None else index.fusion.weights
    weights = [weight if leg in legs else 0.0 for leg, weight in zip(LEGS, own, strict=True)]
    if not any(weights):
        weights = [float(leg in legs) for leg in LEGS]
    return pb.Fusion(enabled=True, weights=weights)


class PageSearch:
    """Answers ``GET /api/search`` for the page.

    Args:
        service: Answers the calls.
        draw: Turns a hit of an entity type into JSON.
    """

    def __init__(self, service: RetrievalService, draw: Callable[[str], DrawHit]) -> None:
        self._service = service
        self._draw = draw
        self._gate = search_gate(service)
        self._retrieve: Call = MethodHandler(retrieve_method(service), self._gate).handle

    async def search(self, request: Request) -> Response:
        """Answer ``GET /api/search?q=&type=&k=&filter=&legs=&release=&exact=1``: hits to show.

        ``min_probability`` leaves out hits of a calibrated fused answer that are likely no answers.
        ``legs`` are some of dense, lexical and votes; left out, the release decides. With ``exact``
        the answer also says which of the hits the graph would have returned.
        """
        given = request.query_params
        try:
            wanted = retrieve_request(given)
            legs = chosen_legs(given.get("legs", ""))
        except BadParameter as error:
            return JSONResponse({"error": str(error)}, 400)
        if legs and (fused := self._fused(wanted)) is not None:
            wanted.fusion.CopyFrom(fusion_of(legs, fused))
        graph = await self._found(wanted, request)
        shown = graph
        is_exact = given.get("exact") == "1"
        if is_exact:
            wanted.exact = True
            wanted.release_id = graph.release_id  # a swap in between must not compare two releases
            shown = await self._found(wanted, request)
        reasons, weights = await self._explained(wanted, shown, request)
        page = _answer_json(shown, self._draw(wanted.entity_type), reasons)
        page["weights"] = weights
        page["cache_hit"] = graph.cache_hit
        if is_exact:
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
        content = await ask(self._retrieve, wanted, request)
        return retrieve_result(pb.RetrieveResponse.FromString(content))

    def _serving(self, release_id: str) -> ServingRelease | None:
        releases = self._service.releases
        return releases.loaded.get(release_id) if release_id else releases.active

    def _fused(self, wanted: pb.RetrieveRequest) -> FusedIndex | None:
        serving = self._serving(wanted.release_id)
        return None if serving is None else serving.release.fused.get(wanted.entity_type)

    async def _explained(
        self, wanted: pb.RetrieveRequest, found: RetrieveResult, request: Request
    ) -> tuple[list[Reason], dict[str, float] | None]:
        """Say why hits are there, and by which weights the legs were added; None: by none.

        The caller's right to the entity type was proved by the search itself.
        """
        serving = self._serving(found.release_id)
        if serving is None:  # retired since: the hits are shown without reasons
            return [], None
        fused = serving.release.fused[wanted.entity_type]
        weights: Sequence[float] = wanted.fusion.weights
        if not weights and fused.fusion is not None:
            weights = fused.fusion.weights
        context = HttpContext(request, DEADLINE_SECONDS)
        with serving:
            neighbours = None
            if "votes" in found.legs and self._gate.caller(context).may_retrieve(QUERY_TYPE):
                query = await self._service.queries.of_message(wanted, serving, context)
                neighbours = partial(fused.query, query.text, query.vector, exact=wanted.exact)
            work = partial(_reasons, fused, wanted.query, found.hits, neighbours)
            reasons = await asyncio.to_thread(work)
        by_leg = dict(zip(LEGS, map(float, weights), strict=True)) if found.legs else None
        return reasons, by_leg


def _reasons(
    fused: FusedIndex, text: str, hits: Sequence[Hit], neighbours: Callable[[], Any] | None
) -> list[Reason]:
    lexical = fused.entities.lexical
    fields = [name for name in (lexical.fields if lexical else TEXT_FIELDS) if name != "title"]
    words = QueryWords(text)
    voters: Iterable[list[Voter]] = ([] for _ in hits)
    if neighbours is not None:
        voters = voters_of(fused, neighbours(), [hit.id for hit in hits])
    return [
        Reason(words.parts(title_of(hit)), matches_of(words, hit.attributes, fields), list(named))
        for hit, named in zip(hits, voters, strict=True)
    ]


def title_of(hit: Hit) -> str:
    """Return what a hit is called: its title, its query, or its id."""
    return str(hit.attributes.get("title") or hit.attributes.get("query") or hit.id)


def _how(result: RetrieveResult) -> dict[str, Any]:
    return {
        "plan": result.plan,
        "ef": result.ef,
        "estimated_recall": result.estimated_recall,
        "timings": result.timings._asdict(),
    }


def _answer_json(
    result: RetrieveResult, draw: DrawHit, reasons: Sequence[Reason]
) -> dict[str, Any]:
    hits = [draw(hit) for hit in result.hits]
    for hit, scores in zip(hits, result.fused or ()):
        hit["scores"] = {
            name: None if value is None else round(value, 4)
            for name, value in scores._asdict().items()
        }
    for hit, reason in zip(hits, reasons):
        hit["why"] = {
            "title": reason.title,
            "fields": [{"name": name, "parts": parts} for name, parts in reason.fields],
            "voters": [
                {"query": voter.query, "cosine": round(voter.cosine, 4), "share": voter.share}
                for voter in reason.voters
            ],
        }
    return {
        "hits": hits,
        "release_id": result.release_id,
        "space_id": result.space_id,
        "legs": list(result.legs),
        "answer_cached": result.answer_cached,
        "unknown_share": result.unknown_share,
        "selectivity": result.selectivity,
        **_how(result),
    }
