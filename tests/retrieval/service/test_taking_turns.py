"""Long work of one caller does not hold up the others; measurements are about the answers given."""

import asyncio
import threading
import time
import unicodedata
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.service.admission import Admission
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Searcher, cost_key
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until


def unit_rows(count: int, dimension: int = 32) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(
    request: pytest.FixtureRequest,
    small_store: SmallStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    made = small_store.copy(tmp_path_factory.mktemp("turns") / "store")
    settings = {"transport": request.param, "shadow_fraction": 1.0, "shadow_cpu": 1.0}
    with serving(made, **settings) as found:
        yield found


def metrics(running: Running, name: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{running.http}/metrics", timeout=20).read().decode()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name))
    return {labels: float(value) for labels, value in rows}


SEARCHES = [  # a fast kind and a slow kind of search that must not be taken for each other
    ({"min_recall": 0.9}, {"min_recall": 1.0}),
    ({"exclude_ids": ("a",)}, {"exclude_ids": tuple(map(str, range(5000)))}),
    ({"filter": "sale"}, {"filter": "price < 3"}),
    ({}, {"exact": True}),
]


@pytest.mark.parametrize(("fast", "slow"), SEARCHES)
def test_searcher_slow_kind_of_search_never_runs_on_the_event_loop(
    fast: dict[str, Any], slow: dict[str, Any]
) -> None:
    searcher = Searcher(2e-4, 1)
    index: Any = SimpleNamespace(token=object())
    threads: list[int] = []

    def slow_search() -> None:
        threads.append(threading.get_ident())
        time.sleep(0.001)

    async def run() -> None:
        fast_key = cost_key(index, SearchRequest("pin", 10, **fast), 10)
        slow_key = cost_key(index, SearchRequest("pin", 10, **slow), 10)
        for _ in range(20):
            await searcher.run(fast_key, lambda: None)
            await searcher.run(slow_key, slow_search)

    asyncio.run(run())
    searcher.close()
    assert len(threads) == 20 and threading.get_ident() not in threads


def test_retrieve_batch_ready_vectors_take_as_many_places_as_texts(
    running: Running, stub: rpc.RetrievalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    enter = Admission.enter
    monkeypatch.setattr(
        Admission,
        "enter",
        lambda self, places=1, held=0: (seen.append(places), enter(self, places, held))[1],
    )
    target = pb.Target(entity_type="pin", k=2)
    stub.RetrieveBatch(
        pb.RetrieveBatchRequest(queries=[f"text {i}" for i in range(40)], target=target)
    )
    stub.RetrieveBatch(
        pb.RetrieveBatchRequest(
            embeddings=unit_rows(40).tobytes(), space_id=running.space_id, target=target
        )
    )
    assert seen == [1, 39, 1, 39], "one before the message is parsed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pb.Target(entity_type="pin", k=20, diversity=0.5),
        pb.Target(entity_type="pin", k=20, collapse_above=0.9),
    ],
)
def test_retrieve_batch_reranking_lets_others_be_answered(
    running: Running, stub: rpc.RetrievalStub, target: pb.Target
) -> None:
    request = pb.RetrieveBatchRequest(
        embeddings=unit_rows(1024).tobytes(), space_id=running.space_id, target=target
    )
    with grpc.insecure_channel(
        running.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as other:
        question = pb.RetrieveRequest(query="red cat", entity_type="pin", k=10)
        rpc.RetrievalStub(other).Retrieve(question)
        batch = stub.RetrieveBatch.future(request)
        answered = 0
        while not batch.done():
            rpc.RetrievalStub(other).Retrieve(question)
            answered += 1
        assert len(batch.result().answers) == 1024
    assert answered > 3


@pytest.mark.slow
def test_retrieve_of_a_new_text_is_encoded_before_the_texts_of_a_batch(
    running: Running, stub: rpc.RetrievalStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = running.server.releases.active
    assert active is not None
    encode = active.encoding.encode
    encoded: list[str] = []

    def slow(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        time.sleep(0.005 * len(texts))
        return encode(texts)

    monkeypatch.setattr(active.batcher, "_encode", slow)
    first = f"batch {time.time_ns()}"
    batch = pb.RetrieveBatchRequest(
        queries=[f"{first} {i}" for i in range(200)], target=pb.Target(entity_type="pin", k=2)
    )
    answer = stub.RetrieveBatch.future(batch)
    until(lambda: any(text.startswith(first) for text in encoded))
    asked = f"asked {time.time_ns()}"
    stub.Retrieve(pb.RetrieveRequest(query=asked, entity_type="pin", k=2))
    assert not answer.done()
    behind = sum(text.startswith(first) for text in encoded[encoded.index(asked) :])
    assert len(answer.result().answers) == 200
    assert len(encoded) == 201 and behind < 20


def test_retrieve_batch_past_its_deadline_ends_and_is_counted_so(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    name = 'omni_requests_total{code="DEADLINE_EXCEEDED",method="RetrieveBatch"}'
    before = metrics(running, "omni_requests_total").get(name, 0.0)
    target = pb.Target(entity_type="pin", k=20, diversity=0.5)
    request = pb.RetrieveBatchRequest(
        embeddings=unit_rows(1024).tobytes(), space_id=running.space_id, target=target
    )

    def is_counted() -> bool:
        """Call; a call whose time is over before it reaches its method counts elsewhere."""
        with pytest.raises(grpc.RpcError) as caught:
            stub.RetrieveBatch(request, timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return metrics(running, "omni_requests_total").get(name, 0.0) > before

    until(is_counted)


def test_retrieve_multi_counts_one_encoding_for_all_targets(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    name = 'omni_stage_seconds_count{stage="encode"}'
    before = metrics(running, name).get(name, 0.0)
    targets = [pb.Target(entity_type=entity_type, k=2) for entity_type in ("pin", "product", "ad")]
    stub.RetrieveMulti(pb.RetrieveMultiRequest(query="a text nobody sent before", targets=targets))
    assert metrics(running, name)[name] == before + 1


def test_ids_in_another_unicode_form_are_found(running: Running, stub: rpc.RetrievalStub) -> None:
    spelled = unicodedata.normalize("NFD", "café")
    vector = running.encoder.encode(["a river that no other entity is about"])[0].tobytes()
    with grpc.insecure_channel(running.address) as channel:
        entity = pb.Entity(id=spelled, embedding=vector)
        written = rpc.AdminStub(channel).Upsert(
            pb.UpsertRequest(entity_type="ad", space_id=running.space_id, entities=[entity])
        )
    follower = running.server.releases.resolve("").follower
    assert follower is not None and follower.wait_for("ad", written.sequence)
    ready = {"embedding": vector, "space_id": running.space_id, "entity_type": "ad"}
    assert stub.Retrieve(pb.RetrieveRequest(k=1, **ready)).hits[0].id == "café"
    assert "café" not in [
        hit.id
        for hit in stub.Retrieve(pb.RetrieveRequest(k=10, exclude_ids=[spelled], **ready)).hits
    ]
    assert stub.Score(pb.ScoreRequest(ids=[spelled], **ready)).missing == 0


def test_shadow_recall_judges_answers_by_the_entries_they_saw(
    small_store: SmallStore, tmp_path: Path
) -> None:
    made = small_store.copy(tmp_path / "store")
    settings = {"shadow_fraction": 1.0, "shadow_cpu": 0.01, "live_poll_seconds": 0.05}
    with (
        serving(made, **settings) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub, shadow = rpc.RetrievalStub(channel), running.server.service.recorder.shadow
        vector = stub.Embed(pb.EmbedRequest(queries=["red cat"])).embeddings
        for _ in range(5):
            stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=3, exact=True))
        assert shadow.done == 0 and shadow._queue.empty(), (
            "an exact answer says nothing about the graph"
        )
        for _ in range(12):
            stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=3))
        new = [pb.Entity(id=f"n{i}", embedding=vector) for i in range(3)]
        written = rpc.AdminStub(channel).Upsert(
            pb.UpsertRequest(entity_type="pin", space_id=running.space_id, entities=new)
        )
        assert running.server.releases.resolve("").follower.wait_for("pin", written.sequence)
        until(lambda: shadow.done >= 12)
        assert [found.recall for found in shadow.estimates().values()] == [1.0]
