"""The short way of Retrieve against the general one: the same answers, and it declines whatever it
may not answer.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
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
from retrieval.service.answer_cache import AnswerCache
from retrieval.service.fast_path import ReadyAnswers
from tests.helpers.real_server import Running, serving

TEXTS = entity_texts(30)


class Caller:
    """A context without deadline and metadata."""

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        raise RuntimeError(code)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("ready"), shadow_fraction=0.0) as found:
        with grpc.insecure_channel(found.address) as channel:
            for text in TEXTS:
                rpc.RetrievalStub(channel).Retrieve(
                    pb.RetrieveRequest(query=text, entity_type="pin", k=3)
                )
        yield found


def asked(ready: ReadyAnswers, content: bytes) -> Any:
    """What the short way says, on a loop of its own."""

    async def ask() -> Any:
        return ready(content, Caller())

    return asyncio.run(ask())


def both_ways(
    running: Running, request: pb.RetrieveRequest, kept: bool = False
) -> tuple[pb.RetrieveResponse | None, pb.RetrieveResponse]:
    """What the short way and the general way answer; both run on the server's loop, and both search
    unless answers may be kept.
    """
    service = running.server.service
    answers = service.answers
    ready = ReadyAnswers(service)

    async def ask() -> tuple[pb.RetrieveResponse | None, pb.RetrieveResponse]:
        if not kept:
            service.answers = ready.answers = AnswerCache(0)
        service.searcher.learn(
            service.searcher.plain_key(
                service.releases.active.entities["pin"],
                request.k,
                request.min_recall if request.HasField("min_recall") else None,
            ),
            1e-5,
        )
        content = request.SerializeToString()
        short = ready(content, Caller())
        general = await service.handler("Retrieve", pb.RetrieveRequest, service.retrieve)(
            content, Caller()
        )
        return (
            pb.RetrieveResponse.FromString(short) if short is not None else None
        ), pb.RetrieveResponse.FromString(general)

    try:
        return asyncio.run_coroutine_threadsafe(ask(), running.loop).result(30)
    finally:
        service.answers = answers


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
def test_it_answers_as_the_general_way_does(
    running: Running,
    text: str,
    k: int,
    min_recall: float | None,
    request_id: str,
    pinned: bool,
    ready_vector: bool,
    kept: bool,
) -> None:
    request = pb.RetrieveRequest(
        entity_type="pin", k=k, request_id=request_id, min_recall=min_recall
    )
    if pinned:
        request.release_id = running.release_id
    if ready_vector:
        request.embedding, request.space_id = (
            running.encoder.encode([text])[0].astype("<f4").tobytes(),
            running.space_id,
        )
    else:
        request.query = f"  {text}\t"  # not yet normalised
    if kept:
        both_ways(running, request, kept)
    short, general = both_ways(running, request, kept)
    assert short is not None and short.answer_cached == (kept and not ready_vector)
    for answer in (short, general):
        assert answer.timings.total_ns > 0
        answer.ClearField("timings")
    assert short == general


@pytest.mark.parametrize(
    "fields",
    [
        {"filter": "price < 5"},
        {"exclude_ids": ["pin-1"]},
        {"min_score": 0.1},
        {"diversity": 0.5},
        {"collapse_above": 0.9},
        {"exact": True},
        {"attributes": ["title"]},
        {"k": 101},
        {"query": "never asked before"},
    ],
)
def test_what_is_not_plain_is_left_to_the_general_way(running: Running, fields: dict) -> None:
    short, general = both_ways(
        running, pb.RetrieveRequest(**{"query": TEXTS[0], "entity_type": "pin", "k": 3, **fields})
    )
    assert short is None and general.hits


def test_it_never_raises_and_never_answers_a_mistake(running: Running) -> None:
    ready = ReadyAnswers(running.server.service)
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
        assert asked(ready, request.SerializeToString()) is None
    assert asked(ready, b"\xff\xff\xff") is None


def test_plain_cached_calls_take_the_short_way(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general way is broken on purpose once the search is known to be short; nobody notices."""
    service = running.server.service
    with grpc.insecure_channel(running.address) as channel:
        stub = rpc.RetrievalStub(channel)
        for _ in range(20):
            assert stub.Retrieve(
                pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3)
            ).cache_hit
        monkeypatch.setattr(service, "_query", None)
        answers = [
            stub.Retrieve(pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=3))
            for _ in range(20)
        ]
    assert all(answer.cache_hit for answer in answers) and service.admission.in_flight == 0


def test_the_operators_limit_of_k_holds_on_the_short_way(tmp_path: Path) -> None:
    """A search of 40 teaches the searcher what one of 60 costs; that does not let it in."""
    with (
        serving(tmp_path, shadow_fraction=0.0, limits=Limits(max_k=50)) as small,
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
def test_an_error_of_the_index_fails_its_own_call_and_no_other(
    running: Running, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: grpc.StatusCode
) -> None:
    service = running.server.service
    search = EntityIndex.search

    def failing(self: EntityIndex, vector: np.ndarray, k: int, **options: Any) -> Any:
        if k == 7:
            raise error("broken")
        return search(self, vector, k, **options)

    monkeypatch.setattr(EntityIndex, "search", failing)
    service.searcher.learn(
        service.searcher.plain_key(service.releases.active.entities["pin"], 7, None), 1e-5
    )
    content = pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=7)
    assert asked(ReadyAnswers(service), content.SerializeToString()) is None
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


@pytest.mark.parametrize("way", ["short", "too long for the event loop", "the short search fails"])
def test_one_request_is_one_hit_of_the_cache(
    running: Running, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    service = running.server.service
    cache, index = service.releases.active.encoder.cache, service.releases.active.entities["pin"]
    service.searcher.learn(service.searcher.plain_key(index, 3, None), 1e-5)
    if way == "too long for the event loop":
        monkeypatch.setattr(service.searcher, "is_short", lambda key: False)
    elif way == "the short search fails":
        monkeypatch.setattr(EntityIndex, "search", fails)
    before = cache.hits, cache.misses
    with grpc.insecure_channel(running.address) as channel, contextlib.suppress(grpc.RpcError):
        answer = rpc.RetrievalStub(channel).Retrieve(
            pb.RetrieveRequest(query=f" {TEXTS[0]} ", entity_type="pin", k=3)
        )
        assert answer.cache_hit
    assert (cache.hits - before[0], cache.misses - before[1]) == (1, 0)
