"""Attributes of hits: cached with the answer, bounded together with all else, read at once."""

import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from benchmarks.small_releases import entity_texts
from index_builder.search.entity_index import SearchResult
from index_builder.search.live_segments import LiveSegment
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.config import Limits
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.answer_cache import AttributeCache, fill_attributes, serialize_hits
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until

TEXTS = entity_texts(40)


@pytest.fixture(scope="module")
def running(small_store: SmallStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = small_store.copy(tmp_path_factory.mktemp("attributes") / "store")
    with serving(made, shadow_fraction=0.0) as found:
        yield found


def ask(stub: rpc.RetrievalStub, text: str, k: int = 10, names: tuple[str, ...] = ("*",)) -> object:
    return stub.Retrieve(
        pb.RetrieveRequest(query=text, entity_type="pin", k=k, attributes=names), timeout=60
    )


@pytest.mark.parametrize("k", [5, 200])
def test_answer_with_attributes_is_cached(stub: rpc.RetrievalStub, k: int) -> None:
    first, second = ask(stub, TEXTS[0], k), ask(stub, TEXTS[0], k)
    assert not first.answer_cached and second.answer_cached
    assert list(first.hits) == list(second.hits)
    assert len(first.hits) == k and all("price" in hit.attributes for hit in first.hits)
    plain = ask(stub, TEXTS[0], k, ())
    assert not plain.answer_cached and not plain.hits[0].attributes
    titles = ask(stub, TEXTS[0], k, ("title",))
    assert not titles.answer_cached and set(titles.hits[0].attributes) == {"title"}


def test_cached_answer_with_attributes_is_gone_after_a_live_write(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    text = TEXTS[3]
    before = ask(stub, text, 3)
    entity = pb.Entity(
        id=before.hits[0].id,
        embedding=running.encoder.encode([text])[0].astype("<f4").tobytes(),
        attributes={"price": pb.Value(double_value=1234.5)},
    )
    with grpc.insecure_channel(running.address) as channel:
        rpc.AdminStub(channel).Upsert(
            pb.UpsertRequest(entity_type="pin", space_id=running.space_id, entities=[entity])
        )
    until(lambda: ask(stub, text, 3).hits[0].attributes["price"].double_value == 1234.5)


def test_attribute_cache_beyond_its_bound_starts_anew() -> None:
    cache = AttributeCache(max_bytes=5_000)
    version = object()
    rows = cache.rows(version, ["title"])
    cache.put(rows, {"a": b"1"})
    assert cache.rows(version, ["title"]) is rows and cache.rows(object(), ["title"]) == {}
    assert 0 < cache.size_bytes <= 5_000
    cache.put(rows, {"b": b"2" * 4_900})
    assert rows["b"] and "a" in rows, "an answer that is being written keeps its rows"
    assert cache.rows(version, ["title"]) == {} and cache.size_bytes <= 6_000


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, 20_000])
def test_serialized_hits_are_read_back_whatever_their_length(length: int) -> None:
    result = SearchResult(["a", "b"], np.array([0.5, 0.0], np.float32), "graph", 1, None, None)
    rows = []
    for id_, text in (("a", "x" * length), ("b", "")):
        hit = pb.Hit(id=id_)
        fill_attributes(hit.attributes, {"title": text, "new": True, "n": 3, "no": None})
        rows.append(hit.SerializeToString())
    hits = pb.Answer.FromString(serialize_hits(result, rows)).hits
    assert [(hit.id, hit.score) for hit in hits] == [("a", 0.5), ("b", 0.0)]
    assert hits[0].attributes["title"].string_value == "x" * length
    assert hits[1].attributes["new"].bool_value and hits[1].attributes["n"].int_value == 3
    assert set(hits[0].attributes) == {"title", "new", "n"}


def test_batch_and_multi_carry_the_attributes_of_single_calls(stub: rpc.RetrievalStub) -> None:
    singles = [ask(stub, text, 4) for text in TEXTS[10:20]]
    target = pb.Target(entity_type="pin", k=4, attributes=["*"])
    fresh = [*TEXTS[10:15], "never asked before", *TEXTS[15:20]]
    batch = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=fresh, target=target), timeout=60)
    answers = [*batch.answers[:5], *batch.answers[6:]]
    assert [list(a.hits) for a in answers] == [list(s.hits) for s in singles]
    assert len(batch.answers[5].hits) == 4 and batch.answers[5].hits[0].attributes
    multi = stub.RetrieveMulti(
        pb.RetrieveMultiRequest(query=TEXTS[10], targets=[target, target]), timeout=60
    )
    assert [list(a.hits) for a in multi.answers] == [list(singles[0].hits)] * 2


def test_limits_compose_at_the_door(stub: rpc.RetrievalStub) -> None:
    queries = [f"query {i}" for i in range(1024)]
    target = pb.Target(entity_type="pin", k=1000, attributes=["*"])
    wanted = pb.RetrieveBatchRequest(queries=queries, target=target)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as refused:
        stub.RetrieveBatch(wanted, timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "1048576 values" in refused.value.details()
    assert time.monotonic() - began < 10, "before any work"
    many = pb.RetrieveRequest(
        query="x", entity_type="pin", k=200, attributes=[f"a{i}" for i in range(1000)]
    )
    with pytest.raises(grpc.RpcError) as refused:
        stub.Retrieve(many, timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "attributes: expected at most 64 names" in refused.value.details()


def test_long_labels_are_refused_on_every_call(stub: rpc.RetrievalStub) -> None:
    long = "x" * 2**20
    target = pb.Target(entity_type="pin", k=1)
    for call, message in (
        (stub.Retrieve, pb.RetrieveRequest(query=TEXTS[0], entity_type="pin", k=1)),
        (stub.RetrieveMulti, pb.RetrieveMultiRequest(query=TEXTS[0], targets=[target])),
        (stub.RetrieveBatch, pb.RetrieveBatchRequest(queries=TEXTS[:2], target=target)),
    ):
        call(message, timeout=60)
        for field in ("request_id", "language", "country"):
            copy = type(message)()
            copy.CopyFrom(message)
            setattr(copy, field, long)
            with pytest.raises(grpc.RpcError) as refused:
                call(copy, timeout=60)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"{field}: expected at most 256 bytes" in refused.value.details()


def test_batch_beyond_the_answers_limit_ends_early_with_advice(small_store: SmallStore) -> None:
    with (
        serving(small_store, limits=Limits(max_message_bytes=20_000)) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        target = pb.Target(entity_type="pin", k=300, attributes=["*"])
        wanted = pb.RetrieveBatchRequest(queries=TEXTS[:30], target=target)
        with pytest.raises(grpc.RpcError) as refused:
            rpc.RetrievalStub(channel).RetrieveBatch(wanted, timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the answer has more than 80000 bytes" in refused.value.details()


def test_live_attributes_are_read_once_per_segment(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = running.encoder.encode([f"live {i}" for i in range(100)]).astype("<f4")
    entities = [
        pb.Entity(
            id=f"live-{i}",
            embedding=vector.tobytes(),
            attributes={"price": pb.Value(double_value=float(i))},
        )
        for i, vector in enumerate(vectors)
    ]
    with grpc.insecure_channel(running.address) as channel:
        rpc.AdminStub(channel).Upsert(
            pb.UpsertRequest(entity_type="pin", space_id=running.space_id, entities=entities)
        )
    active = running.server.releases.active
    assert active is not None
    index = active.entities["pin"]
    until(lambda: index.vector("live-99") is not None)
    reads = []
    read = LiveSegment.attributes.fget
    assert read is not None
    counted = property(lambda self: (reads.append(self), read(self))[1])
    monkeypatch.setattr(LiveSegment, "attributes", counted)
    ids = [name for i in range(100) for name in (f"live-{i}", f"pin-{i}", "nobody")]
    found = index.attributes(ids, ["price", "title", "price"])
    assert [row.get("price") for row in found[::3]] == [float(i) for i in range(100)]
    assert all("price" in row for row in found[1::3]) and found[2::3] == [{}] * 100
    assert len(reads) <= 2


def test_cached_answers_count_towards_the_bytes_of_an_answer(
    running: Running, stub: rpc.RetrievalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches and of several targets; a single answer has its bound, too."""
    size = ask(stub, TEXTS[1], 50).ByteSize()
    searches = running.server.service.searches
    monkeypatch.setattr(searches, "_max_answer_bytes", 3 * size)
    target = pb.Target(entity_type="pin", k=50, attributes=["*"])

    def batch(rows: int) -> object:
        request = pb.RetrieveBatchRequest(queries=[TEXTS[1]] * rows, target=target)
        return stub.RetrieveBatch(request, timeout=60)

    def multi(targets: int) -> object:
        request = pb.RetrieveMultiRequest(query=TEXTS[1], targets=[target] * targets)
        return stub.RetrieveMulti(request, timeout=60)

    assert batch(2).answers[1].answer_cached and len(multi(2).answers) == 2
    for call in (lambda: batch(4), lambda: multi(4)):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"more than {3 * size} bytes" in refused.value.details()
    monkeypatch.setattr(searches, "_max_answer_bytes", size // 2)
    with pytest.raises(grpc.RpcError) as refused:
        ask(stub, TEXTS[2], 50)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_single_answer_of_too_many_values_is_refused(small_store: SmallStore) -> None:
    with (
        serving(small_store, limits=Limits(max_answer_values=100)) as running,
        grpc.insecure_channel(running.address) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        ask(rpc.RetrievalStub(channel), TEXTS[0], 60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "searches x k x (1 + attributes)" in refused.value.details()


def test_batch_reads_unknown_shares_in_the_threads_of_batches(
    running: Running, stub: rpc.RetrievalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To split a thousand texts into tokens takes long; the event loop has others to serve."""
    names: set[str] = set()

    def share(self: ServingRelease, text: str) -> float:
        names.add(threading.current_thread().name)
        return 0.25

    monkeypatch.setattr(ServingRelease, "unknown_share", share)
    target = pb.Target(entity_type="pin", k=2)
    request = pb.RetrieveBatchRequest(queries=TEXTS[:5] * 50, target=target)
    answers = stub.RetrieveBatch(request, timeout=60).answers
    assert [answer.unknown_share for answer in answers] == [0.25] * 250
    assert names and all(name.startswith("bulk-search") for name in names)
