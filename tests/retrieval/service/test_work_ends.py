"""Work ends with its caller, and gives its places back, for every kind of call and every end."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.bounds.work_threads import WorkThreads
from retrieval.encoding.batcher import Batcher
from retrieval.service.service import RetrievalService
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import PATIENCE_SECONDS, until

Code = grpc.StatusCode
FUSED = pb.Fusion(enabled=True, weights=[1, 1, 0])
FILTER = "price < 40"
TEXTS = ["red cat", "blue fish", "old lamp", "green door"] * 8


def search(**fields: Any) -> pb.RetrieveRequest:
    return pb.RetrieveRequest(**{"query": "red cat", "entity_type": "pin", "k": 5, **fields})


def batch(**fields: Any) -> pb.RetrieveBatchRequest:
    target = pb.Target(**{"entity_type": "pin", "k": 300, **fields})
    return pb.RetrieveBatchRequest(queries=TEXTS, target=target)


KINDS: dict[str, tuple[str, Any]] = {
    "exact": ("Retrieve", search(exact=True)),
    "filtered": ("Retrieve", search(filter=FILTER)),
    "fused": ("Retrieve", search(fusion=FUSED)),
    "re-ranked": ("Retrieve", search(diversity=0.5, k=100)),
    "attributes": ("Retrieve", search(attributes=["*"], k=300)),
    "multi": (
        "RetrieveMulti",
        pb.RetrieveMultiRequest(
            query="red cat", targets=[pb.Target(entity_type="pin", k=300, exact=True)] * 16
        ),
    ),
    "batch": ("RetrieveBatch", batch()),
    "batch exact": ("RetrieveBatch", batch(exact=True)),
    "batch filtered": ("RetrieveBatch", batch(filter=FILTER)),
    "batch fused": ("RetrieveBatch", batch(fusion=FUSED)),
    "batch re-ranked": ("RetrieveBatch", batch(diversity=0.5, k=50)),
    "batch attributes": ("RetrieveBatch", batch(attributes=["*"])),
    "score": (
        "Score",
        pb.ScoreRequest(query="red cat", entity_type="pin", ids=[f"pin-{i}" for i in range(200)]),
    ),
}


@dataclass
class Pieces:
    """What the threads of a server have begun; the first piece waits until it may end."""

    begun: int = 0
    may_end: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def run(self, work: Callable[[], Any]) -> Any:
        self.begun += 1
        assert self.may_end.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        return work()


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    found = Pieces()
    run = WorkThreads.run

    async def counted(self: WorkThreads, work: Callable[[], Any]) -> Any:
        return await run(self, lambda: found.run(work))

    monkeypatch.setattr(WorkThreads, "run", counted)
    return found


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(request: pytest.FixtureRequest, small_store: SmallStore) -> Iterator[Running]:
    """A server whose searches all run in threads, and that caches no answer."""
    settings = {"inline_search_us": 0.0, "answer_cache_bytes": 0, "transport": request.param}
    with serving(small_store, **settings) as found:
        with grpc.insecure_channel(found.address) as channel:
            texts = pb.EmbedRequest(queries=TEXTS)
            rpc.RetrievalStub(channel).Embed(texts, timeout=60)  # cached: no call waits for them
        yield found


@pytest.fixture
def stub(running: Running) -> Iterator[rpc.RetrievalStub]:
    with grpc.insecure_channel(running.address) as channel:
        yield rpc.RetrievalStub(channel)


def places(running: Running) -> int:
    service: RetrievalService = running.server.service
    kinds = (service.admission, service.bulk_admission, service.control_admission)
    return sum(kind.in_flight + kind.requests for kind in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["cancelled", "deadline"])
@pytest.mark.parametrize("kind", KINDS)
def test_work_nothing_begins_once_its_caller_has_gone(
    running: Running, stub: rpc.RetrievalStub, pieces: Pieces, kind: str, end: str
) -> None:
    method, message = KINDS[kind]
    call = getattr(stub, method).future(message, timeout=2.0 if end == "deadline" else 60.0)
    until(lambda: pieces.begun)
    assert places(running) > 0, "held as long as the work runs"
    if end == "cancelled":
        call.cancel()
        stub.DescribeRelease(pb.DescribeReleaseRequest(), timeout=60)  # comes after the reset
    else:
        assert call.code() is Code.DEADLINE_EXCEEDED
        time.sleep(0.3)  # the server's own clock
    pieces.may_end.set()
    until(lambda: not places(running))
    time.sleep(0.05)
    assert pieces.begun == 1


@pytest.mark.parametrize("kind", KINDS)
def test_work_that_fails_gives_its_places_back(
    running: Running, stub: rpc.RetrievalStub, pieces: Pieces, kind: str
) -> None:
    method, message = KINDS[kind]
    pieces.error = RuntimeError("a bug")
    pieces.may_end.set()
    with pytest.raises(grpc.RpcError) as raised:
        getattr(stub, method)(message, timeout=60)
    assert raised.value.code() is Code.INTERNAL
    until(lambda: not places(running))


MISTAKES: dict[str, tuple[str, Any]] = {
    "k": ("Retrieve", search(k=0)),
    "type": ("Retrieve", search(entity_type="nothing")),
    "filter": ("Retrieve", search(filter="price <")),
    "release": ("Retrieve", search(release_id="nobody")),
    "embedding": ("Retrieve", search(query="", embedding=b"1234")),
    "targets": ("RetrieveMulti", pb.RetrieveMultiRequest(query="red cat")),
    "batch of nothing": ("RetrieveBatch", pb.RetrieveBatchRequest()),
    "batch filter": ("RetrieveBatch", batch(filter="price <")),
    "too many texts": ("RetrieveBatch", pb.RetrieveBatchRequest(queries=["a"] * 2000)),
    "empty text": ("Embed", pb.EmbedRequest(queries=["red cat", " "])),
    "ids": ("Score", pb.ScoreRequest(query="red cat", entity_type="pin")),
    "description": ("DescribeRelease", pb.DescribeReleaseRequest(release_id="nobody")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_take_no_places(running: Running, stub: rpc.RetrievalStub, mistake: str) -> None:
    method, message = MISTAKES[mistake]
    with pytest.raises(grpc.RpcError) as raised:
        getattr(stub, method)(message, timeout=60)
    assert raised.value.code() in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION)
    until(lambda: not places(running))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Embed", "RetrieveBatch", "Retrieve"])
@pytest.mark.parametrize("end", ["cancelled", "deadline", "fails"])
def test_embedding_encodes_no_text_once_its_caller_has_gone(
    running: Running,
    stub: rpc.RetrievalStub,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    end: str,
) -> None:
    begun: list[int] = []
    may_end = threading.Event()
    active = running.server.releases.active
    assert active is not None
    batcher: Batcher = active.batcher
    encode = batcher._encode

    def waiting(texts: Any) -> Any:
        begun.append(len(texts))
        assert may_end.wait(PATIENCE_SECONDS)
        if end == "fails":
            raise RuntimeError("a bug")
        return encode(texts)

    monkeypatch.setattr(batcher, "_encode", waiting)
    name = f"{running.server.config.transport} {method} {end}"
    texts = [f"{name} {number}" for number in range(400)]
    target = pb.Target(entity_type="pin", k=5)
    message = {
        "Embed": pb.EmbedRequest(queries=texts),
        "RetrieveBatch": pb.RetrieveBatchRequest(queries=texts, target=target),
        "Retrieve": search(query=name),
    }[method]
    call = getattr(stub, method).future(message, timeout=2.0 if end == "deadline" else 60.0)
    until(lambda: begun)
    if end == "cancelled":
        call.cancel()
        stub.DescribeRelease(pb.DescribeReleaseRequest(), timeout=60)
    elif end == "deadline":
        assert call.code() is Code.DEADLINE_EXCEEDED
        time.sleep(0.3)
    may_end.set()
    until(lambda: not places(running) and not batcher.waiting)
    if end == "fails":
        assert call.code() is Code.INTERNAL
    else:
        assert len(begun) == 1
