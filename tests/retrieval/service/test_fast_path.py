"""The fast path of Retrieve beside the full path: the same answers, and it declines the rest."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.small_releases import entity_texts
from index_builder.search.entity_index import EntityIndex
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.config import Limits
from retrieval.http2.refusals import Refusal
from retrieval.service.answer_cache import AnswerCache
from retrieval.service.fast_path import FastPath
from retrieval.service.handlers import MethodHandler, retrieve_method, search_gate
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import cost_key
from retrieval.service.service import RetrievalService
from tests.helpers.serving.real_server import Running, SmallStore, serving

TEXTS = entity_texts(30)


class Caller:
    """A context without deadline and metadata."""

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> Any:
        raise RuntimeError(code)


@pytest.fixture(scope="module")
def running(small_store: SmallStore) -> Iterator[Running]:
    with serving(small_store, shadow_fraction=0.0) as found:
        with grpc.insecure_channel(found.address) as channel:
            for text in TEXTS:
                rpc.RetrievalStub(channel).Retrieve(
                    pb.RetrieveRequest(query=text, entity_type="pin", k=3)
                )
        yield found


def fast_path_of(service: RetrievalService) -> FastPath:
    return FastPath(
        search_gate(service),
        service.releases,
        service.queries,
        service.searches,
        service.recorder,
    )


def ask_fast_path(fast_path: FastPath, content: bytes) -> Any:
    """What the fast path says, on a loop of its own."""

    async def ask() -> Any:
        return fast_path(content, Caller())

    return asyncio.run(ask())


def expect_short(service: RetrievalService, k: int, min_recall: float | None = None) -> None:
    """Have the searcher expect that such searches are short."""
    active = service.releases.active
    assert active is not None
    request = SearchRequest("pin", k, min_recall=min_recall)
    service.searches.searcher.learn(cost_key(active.entities["pin"], request, k), 1e-5)


def ask_both_paths(
    running: Running, message: pb.RetrieveRequest, cached: bool = False
) -> tuple[pb.RetrieveResponse | None, pb.RetrieveResponse]:
    """What the fast path and the full path answer, both on the server's loop.

    Both search unless answers may be cached.
    """
    service = running.server.service
    answers = service.searches.answers

    async def ask() -> tuple[pb.RetrieveResponse | None, pb.RetrieveResponse]:
        if not cached:
            service.searches.answers = AnswerCache(0)
        min_recall = message.min_recall if message.HasField("min_recall") else None
        expect_short(service, message.k, min_recall)
        content = message.SerializeToString()
        fast = fast_path_of(service)(content, Caller())
        assert not isinstance(fast, Refusal)
        full_path = MethodHandler(retrieve_method(service), search_gate(service))
        full = pb.RetrieveResponse.FromString(await full_path.handle(content, Caller()))
        return (None if fast is None else pb.RetrieveResponse.FromString(fast)), full

    try:
        return asyncio.run_coroutine_threadsafe(ask(), running.loop).result(30)
    finally:
        service.searches.answers = answers


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(TEXTS),
    st.integers(1, 64),
    st.sampled_from([None, 0.5, 0.95, 1.0]),
    st.sampled_from(["", "r-1"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_fast_path_answer_is_that_of_the_full_path(
    running: Running,
    text: str,
    k: int,
    min_recall: float | None,
    request_id: str,
    pinned: bool,
    ready_vector: bool,
    cached: bool,
) -> None:
    request = pb.RetrieveRequest(
        entity_type="pin", k=k, request_id=request_id, min_recall=min_recall
    )
    if pinned:
        request.release_id = running.release_id
    if ready_vector:
        request.embedding = running.encoder.encode([text])[0].astype("<f4").tobytes()
        request.space_id = running.space_id
    else:
        request.query = f"  {text}\t"  # not yet normalised
    if cached:
        ask_both_paths(running, request, cached)
    fast, full = ask_both_paths(running, request, cached)
    assert fast is not None and fast.answer_cached == (cached and not ready_vector)
    for answer in (fast, full):
        assert answer.timings.total_ns > 0
        answer.ClearField("timings")
    assert fast == full


@pytest.mark.parametrize(
    "fields",
    [
        {"filter": "price < 5"},
        {"exclude_ids": ["pin-1"]},
        {"min_score": 0.1},
        {"diversity": 0.5},
        {"collapse_above": 0.9},
        {"exact": True},
        {"attributes": ["title", "price", "stock", "sale", "tags"], "k": 41},
        {"k": 101},
        {"query": "never asked before"},
    ],
)
def test_fast_path_request_that_is_not_plain_is_declined(running: Running, fields: dict) -> None:
    fast, full = ask_both_paths(
        running, pb.RetrieveRequest(**{"query": TEXTS[0], "entity_type": "pin", "k": 3, **fields})
    )
    assert fast is None and full.hits


@pytest.mark.parametrize("names", [["title"], ["*"], ["tags", "nothing", "sale", "stock"]])
def test_fast_path_hits_with_attributes_are_those_of_the_full_path(
    running: Running, names: list[str]
) -> None:
    request = pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3, attributes=names)
    for _ in range(2):  # read, then kept
        fast, full = ask_both_paths(running, request)
        assert fast is not None and list(fast.hits) == list(full.hits)
        wanted = set(names) - {"nothing"} if names != ["*"] else {"title", "price", "tags"}
        assert all(wanted <= set(hit.attributes) for hit in full.hits)


def test_fast_path_invalid_request_is_declined_and_raises_nothing(running: Running) -> None:
    fast_path = fast_path_of(running.server.service)
    good = running.encoder.encode(["red cat"])[0].astype("<f4")
    for request in (
        pb.RetrieveRequest(),
        pb.RetrieveRequest(query=TEXTS[0], entity_type="video", k=3),
        pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=0),
        pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=-1),
        pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3, min_recall=2.0),
        pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3, release_id="other"),
        pb.RetrieveRequest(
            query=TEXTS[0],
            embedding=good.tobytes(),
            space_id=running.space_id,
            entity_type="pin",
            k=3,
        ),
        pb.RetrieveRequest(embedding=good.tobytes(), space_id="other", entity_type="pin", k=3),
        pb.RetrieveRequest(
            embedding=(good * 2).tobytes(), space_id=running.space_id, entity_type="pin", k=3
        ),
        pb.RetrieveRequest(
            embedding=np.full_like(good, np.nan).tobytes(),
            space_id=running.space_id,
            entity_type="pin",
            k=3,
        ),
    ):
        assert ask_fast_path(fast_path, request.SerializeToString()) is None
    assert ask_fast_path(fast_path, b"\xff\xff\xff") is None


def test_retrieve_plain_cached_call_takes_the_fast_path(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full path is broken on purpose once the search is known to be short; nobody notices."""
    service = running.server.service
    with grpc.insecure_channel(running.address) as channel:
        stub = rpc.RetrievalStub(channel)
        for _ in range(20):
            assert stub.Retrieve(
                pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3)
            ).cache_hit
        monkeypatch.setattr(service.queries, "of_message", None)
        answers = [
            stub.Retrieve(pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3))
            for _ in range(20)
        ]
    assert all(answer.cache_hit for answer in answers) and service.admission.in_flight == 0


def test_fast_path_k_above_the_operators_limit_is_refused(small_store: SmallStore) -> None:
    """A search of 40 teaches the searcher what one of 60 costs; that does not let it in."""
    with (
        serving(small_store, shadow_fraction=0.0, limits=Limits(max_k=50)) as small,
        grpc.insecure_channel(small.address) as channel,
    ):
        stub = rpc.RetrievalStub(channel)
        for _ in range(3):
            assert (
                len(
                    stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=40)).hits
                )
                == 40
            )
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=60))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED), (RuntimeError, grpc.StatusCode.INTERNAL)],
)
def test_retrieve_error_of_the_index_fails_its_own_call_and_no_other(
    running: Running, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: grpc.StatusCode
) -> None:
    service = running.server.service
    search = EntityIndex.search

    def failing(self: EntityIndex, vector: np.ndarray, k: int, **options: Any) -> Any:
        if k == 7:
            raise error("broken")
        return search(self, vector, k, **options)

    monkeypatch.setattr(EntityIndex, "search", failing)
    expect_short(service, 7)
    content = pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=7)
    assert ask_fast_path(fast_path_of(service), content.SerializeToString()) is None
    with grpc.insecure_channel(running.address) as channel:
        stub = rpc.RetrievalStub(channel)
        waiting = stub.Retrieve.future(
            pb.RetrieveRequest(query=f"not asked before {error.__name__}", entity_type="pin", k=3),
            timeout=20,
        )
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(content, timeout=20)
        assert caught.value.code() is code
        assert len(waiting.result().hits) == 3


def fails(*args: Any, **options: Any) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "case", ["fast path", "too long for the event loop", "search of the fast path fails"]
)
def test_retrieve_one_request_is_one_hit_of_the_query_cache(
    running: Running, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    service = running.server.service
    cache = service.releases.active.encoder.cache
    expect_short(service, 3)
    if case == "too long for the event loop":
        monkeypatch.setattr(service.searches.searcher, "is_short", lambda key: False)
    elif case == "the short search fails":
        monkeypatch.setattr(EntityIndex, "search", fails)
    before = cache.hits, cache.misses
    with grpc.insecure_channel(running.address) as channel, contextlib.suppress(grpc.RpcError):
        answer = rpc.RetrievalStub(channel).Retrieve(
            pb.RetrieveRequest(query=f" {TEXTS[0]} ", entity_type="pin", k=3)
        )
        assert answer.cache_hit
    assert (cache.hits - before[0], cache.misses - before[1]) == (1, 0)
