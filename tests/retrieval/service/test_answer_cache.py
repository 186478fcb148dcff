"""Cached answers: the same as searched ones, bounded, gone with whatever could change them."""

import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.small_releases import entity_texts, small_release
from index_builder.search.entity_index import SearchResult
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.config import Limits
from retrieval.service.answer_cache import (
    ENTRY_OVERHEAD_BYTES,
    AnswerCache,
    CachedAnswer,
    CacheKey,
    cache_key,
)
from retrieval.service.search_request import SearchRequest
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until

TEXTS = entity_texts(30)


def found(*ids: str) -> SearchResult:
    return SearchResult(
        list(ids), np.linspace(0.9, 0.1, len(ids), dtype=np.float32), "graph", 32, 0.97, None
    )


def key(text: str, k: int = 3, version: object = None) -> CacheKey:
    return (version, k, "", None, None, (), text)


def test_answer_cache_find_returns_what_was_put() -> None:
    cache = AnswerCache(10_000)
    cache.put(key("red cat"), CachedAnswer(found("a", "é", "c")))
    cached = cache.find(key("red cat"))
    assert cached is not None and cached.is_cached and cached.search_ns == 0
    result = cached.result
    assert result.ids == ["a", "é", "c"] and result.scores.dtype == np.float32
    np.testing.assert_array_equal(result.scores, found("a", "b", "c").scores)
    assert (result.plan, result.ef) == ("graph", 32)
    assert (result.estimated_recall, result.selectivity) == (0.97, None)
    assert cache.find(key("red cat", k=4)) is None
    assert cache.find(key("red cat", version=object())) is None
    assert (cache.hits, cache.misses) == (1, 1)


def test_cached_answer_hits_are_the_same_field_in_both_messages() -> None:
    result = found("a", "b")
    result.scores = np.array([0.5, 0.25], np.float32)
    serialized = CachedAnswer(result).hits
    assert pb.RetrieveResponse.FromString(serialized).hits == pb.Answer.FromString(serialized).hits
    hits = [(hit.id, hit.score) for hit in pb.Answer.FromString(serialized).hits]
    assert hits == [("a", 0.5), ("b", 0.25)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=8), st.integers(0, 40)), max_size=60), st.integers(0, 8000)
)
def test_answer_cache_bound_holds_and_last_used_stay(
    entries: list[tuple[str, int]], bound: int
) -> None:
    cache = AnswerCache(bound)
    for text, count in entries:
        cache.put(key(text), CachedAnswer(found(*(f"id-{i}" for i in range(count)))))
        assert cache.size_bytes <= bound
    largest = len(CachedAnswer(found(*["id-00"] * 40)).hits) + 200 + ENTRY_OVERHEAD_BYTES
    if entries and bound >= largest:
        assert cache.find(key(entries[-1][0])) is not None


def test_answer_cache_of_no_bytes_holds_nothing() -> None:
    cache = AnswerCache(0)
    cache.put(key("red cat"), CachedAnswer(found("a")))
    assert cache.find(key("red cat")) is None
    assert (len(cache), cache.size_bytes, cache.misses) == (0, 0, 0)


def test_answer_cache_estimated_size_covers_what_an_entry_takes() -> None:
    version = object()
    results = [found(*(f"entity-{i}-{n}" for n in range(10))) for i in range(2000)]
    cache = AnswerCache(100_000_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i, result in enumerate(results):
        cache.put(key(f"query number {i}", 10, version), CachedAnswer(result))
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.7 * cache.size_bytes < taken <= cache.size_bytes, taken / len(results)
    assert sys.getsizeof("query number 1") < cache.size_bytes / len(results)


def test_answer_cache_counts_filters_and_attribute_names() -> None:
    cache = AnswerCache(100_000)
    for i in range(100):
        filtered = (None, 1, f"title != '{i:04d}{'x' * 3900}'", None, None, (), "lamp")
        cache.put(filtered, CachedAnswer(found("a")))
        named = (None, 1, "", None, None, (f"{i:04d}{'x' * 3900}",), "lamp")
        cache.put(named, CachedAnswer(found("a")))
        assert cache.size_bytes <= 100_000
    assert len(cache) < 100_000 / 3900


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 4},
        {"filter": "price < 5"},
        {"min_score": 0.0},
        {"min_recall": 0.9},
        {"attributes": ["*"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_cache_key_other_search_has_another_key(fields: dict[str, Any]) -> None:
    index: Any = SimpleNamespace(version=object())
    plain, other, same = (
        SearchRequest.parse(message, Limits())
        for message in (
            pb.RetrieveRequest(k=3),
            pb.RetrieveRequest(**{"k": 3, **fields}),
            pb.Target(**{"k": 3, **fields}),
        )
    )
    assert cache_key(index, plain, "a") != cache_key(index, other, "a")
    assert cache_key(index, other, "a") == cache_key(index, same, "a")


# --- in a server ---


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(
    request: pytest.FixtureRequest,
    small_store: SmallStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    made = small_store.copy(tmp_path_factory.mktemp("answers") / "store")
    with serving(made, transport=request.param, shadow_fraction=0.0) as found:
        yield found


def hits(answer: Any) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in answer.hits]


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    k=st.integers(1, 200),
    expression=st.sampled_from(["", "price < 20", "sale == true and price >= 3"]),
    min_score=st.sampled_from([None, 0.2]),
    min_recall=st.sampled_from([None, 0.9, 1.0]),
)
def test_retrieve_repeated_request_gets_the_searched_answer(
    running: Running,
    stub: rpc.RetrievalStub,
    text: str,
    k: int,
    expression: str,
    min_score: float | None,
    min_recall: float | None,
) -> None:
    fields = {"k": k, "filter": expression, "min_score": min_score, "min_recall": min_recall}
    request = pb.RetrieveRequest(query=text, entity_type="pin", **fields)
    stub.Retrieve(request)
    again = stub.Retrieve(request)
    assert (
        again.answer_cached
        and again.cache_hit
        and again.timings.search_ns == 0 < again.timings.total_ns
    )
    vector = np.frombuffer(stub.Embed(pb.EmbedRequest(queries=[text])).embeddings, "<f4")
    searched = stub.Retrieve(
        pb.RetrieveRequest(
            embedding=vector.tobytes(), space_id=running.space_id, entity_type="pin", **fields
        )
    )
    assert not searched.answer_cached and searched.timings.search_ns > 0
    assert hits(again) == hits(searched)
    for name in ("plan", "ef", "estimated_recall", "selectivity", "release_id", "space_id"):
        assert getattr(again, name) == getattr(searched, name), name
        if name in ("estimated_recall", "selectivity"):
            assert again.HasField(name) == searched.HasField(name)
    target = pb.Target(entity_type="pin", **fields)
    multi = stub.RetrieveMulti(pb.RetrieveMultiRequest(query=text, targets=[target]))
    batch = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=[text], target=target))
    for answer in (*multi.answers, *batch.answers):
        assert answer.answer_cached and answer.search_ns == 0 and hits(answer) == hits(searched)
        assert (
            answer.HasField("selectivity") == searched.HasField("selectivity")
            and answer.plan == searched.plan
        )


def test_retrieve_batch_searches_only_for_what_is_not_cached(stub: rpc.RetrievalStub) -> None:
    texts = [f"{text} again" for text in TEXTS[:8]]
    target = pb.Target(entity_type="product", k=5)
    single = [
        stub.Retrieve(pb.RetrieveRequest(query=text, entity_type="product", k=5))
        for text in texts[::2]
    ]
    batch = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=texts, target=target))
    assert [answer.answer_cached for answer in batch.answers] == [True, False] * 4
    assert [hits(answer) for answer in batch.answers[::2]] == [hits(answer) for answer in single]
    assert batch.timings.search_ns == sum(answer.search_ns for answer in batch.answers) > 0
    again = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=texts, target=target))
    assert all(answer.answer_cached for answer in again.answers) and again.timings.search_ns == 0
    assert [hits(answer) for answer in again.answers] == [hits(answer) for answer in batch.answers]


def test_cached_answer_after_live_write_is_searched_anew(
    running: Running, stub: rpc.RetrievalStub, channel: grpc.Channel
) -> None:
    admin = rpc.AdminStub(channel)
    text = "a silver lamp nobody wrote about"
    request = pb.RetrieveRequest(query=text, entity_type="ad", k=3)
    others = pb.RetrieveRequest(query=text, entity_type="pin", k=3)
    before = [stub.Retrieve(request) for _ in range(2)][1]
    stub.Retrieve(others)
    assert before.answer_cached and "new" not in [hit.id for hit in before.hits]
    vector = stub.Embed(pb.EmbedRequest(queries=[text])).embeddings
    admin.Upsert(
        pb.UpsertRequest(
            entity_type="ad",
            space_id=running.space_id,
            entities=[pb.Entity(id="new", embedding=vector)],
        )
    )
    until(lambda: stub.Retrieve(request).hits[0].id == "new")
    assert stub.Retrieve(request).answer_cached and stub.Retrieve(others).answer_cached, (
        "another type's answers stay"
    )
    admin.Delete(pb.DeleteRequest(entity_type="ad", ids=["new"]))
    until(lambda: stub.Retrieve(request).hits[0].id != "new")
    after = stub.Retrieve(request)
    assert after.answer_cached and hits(after) == hits(before)


@pytest.mark.slow
def test_cached_answers_random_writes_give_what_a_search_gives(
    running: Running, stub: rpc.RetrievalStub, channel: grpc.Channel
) -> None:
    """Each text's answer, cached or not, beside a search for its vector right after it."""
    admin, rng = rpc.AdminStub(channel), np.random.default_rng(7)
    texts = [f"{text} in the rain" for text in TEXTS[:4]]
    packed = stub.Embed(pb.EmbedRequest(queries=texts)).embeddings
    vectors = [packed[i : i + len(packed) // 4] for i in range(0, len(packed), len(packed) // 4)]
    follower = running.server.releases.resolve("").follower
    cached = 0
    for _ in range(120):
        which, action = int(rng.integers(4)), rng.random()
        if action < 0.2:
            entity = pb.Entity(id=f"rain-{rng.integers(6)}", embedding=vectors[which])
            written = admin.Upsert(
                pb.UpsertRequest(
                    entity_type="product", space_id=running.space_id, entities=[entity]
                )
            )
            assert follower.wait_for("product", written.sequence)
        elif action < 0.3:
            written = admin.Delete(
                pb.DeleteRequest(
                    entity_type="product",
                    ids=[f"rain-{rng.integers(6)}", f"product-{rng.integers(120)}"],
                )
            )
            assert follower.wait_for("product", written.sequence)
        answer = stub.Retrieve(pb.RetrieveRequest(query=texts[which], entity_type="product", k=8))
        ready = pb.RetrieveRequest(
            embedding=vectors[which], space_id=running.space_id, entity_type="product", k=8
        )
        assert hits(answer) == hits(stub.Retrieve(ready))
        cached += answer.answer_cached
    assert 20 < cached < 110


def test_metrics_count_cached_answers(running: Running, stub: rpc.RetrievalStub) -> None:
    answers = running.server.service.searches.answers
    before = answers.hits, answers.misses
    request = pb.RetrieveRequest(query="counted once and found twice", entity_type="pin", k=3)
    for _ in range(3):
        stub.Retrieve(request)
    assert (answers.hits - before[0], answers.misses - before[1]) == (2, 1)
    rows = {name: value for name, _, value in running.server.service._measurements()}
    assert rows["omni_cached_answers_hits"] == answers.hits
    assert rows["omni_cached_answers"] == len(answers) > 0


def test_cached_answer_of_another_release_is_never_given(
    small_store: SmallStore, tmp_path: Path
) -> None:
    """Two releases of one space whose ids tell them apart, activated in turns while one text is
    asked.
    """
    made = small_store.copy(tmp_path / "store")
    bundle = made.bundle
    with (
        serving(made, shadow_fraction=0.0) as first,
        grpc.insecure_channel(first.address) as channel,
    ):
        stub, admin = rpc.RetrievalStub(channel), rpc.AdminStub(channel)
        other = small_release(
            first.store, bundle.folder, bundle.encoder, counts={"pin": 40}, activate=False
        )
        request = pb.RetrieveRequest(query="red cat", entity_type="pin", k=100)
        counts = {first.release_id: 100, other: 40}
        for _ in range(3):
            for release_id, count in counts.items():
                if stub.Retrieve(request).release_id != release_id:
                    admin.Activate(pb.ActivateRequest(release_id=release_id), timeout=60)
                answers = [stub.Retrieve(request) for _ in range(2)]
                assert all(
                    answer.release_id == release_id and len(answer.hits) == count
                    for answer in answers
                )
                assert answers[1].answer_cached


def test_cached_answers_are_logged_and_sampled_like_others(
    small_store: SmallStore, tmp_path: Path
) -> None:
    with serving(
        small_store, shadow_fraction=1.0, shadow_cpu=1.0, impression_log=tmp_path / "log"
    ) as running:
        service = running.server.service
        with grpc.insecure_channel(running.address) as channel:
            stub = rpc.RetrievalStub(channel)
            request = pb.RetrieveRequest(query="red cat", entity_type="pin", k=4)
            answers = [stub.Retrieve(request) for _ in range(3)]
            batch = stub.RetrieveBatch(
                pb.RetrieveBatchRequest(
                    queries=["red cat"] * 2, target=pb.Target(entity_type="pin", k=4)
                )
            )
        assert [answer.answer_cached for answer in (*answers, *batch.answers)] == [
            False,
            True,
            True,
            True,
            True,
        ]
        assert all(answer.request_id for answer in (*answers, batch))
        until(lambda: service.recorder.shadow.done == 5)
        assert all(
            estimate.recall > 0.9 for estimate in service.recorder.shadow.estimates().values()
        )

    lines = [
        line
        for path in (tmp_path / "log").rglob("*")
        if path.is_file()
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 5 * 4


def test_fast_path_cached_answer_needs_no_search(
    running: Running, stub: rpc.RetrievalStub, monkeypatch: Any
) -> None:
    """Also with a filter and a large k, for which a new search would take the full path."""
    service = running.server.service
    request = pb.RetrieveRequest(
        query="small glass boat", entity_type="pin", k=150, filter="price < 30", request_id="r-9"
    )
    first = stub.Retrieve(request)
    monkeypatch.setattr(service.queries, "of_message", None)  # the full path is broken
    monkeypatch.setattr(service.searches.searcher, "is_short", lambda key: False)
    again = stub.Retrieve(request)
    assert again.answer_cached and hits(again) == hits(first) and again.request_id == "r-9"


def test_index_version_changes_with_the_live_entries_only() -> None:
    from index_builder.search.entity_index import EntityIndex, IndexConfig

    vectors = np.eye(8, dtype=np.float32)
    index = EntityIndex.build(
        "pin", [str(i) for i in range(8)], vectors, None, IndexConfig(kind="exact")
    )
    version = index.version
    index.set_live(None)
    assert index.version is version
    view: Any = SimpleNamespace()
    index.set_live(view)
    assert index.version is not version
