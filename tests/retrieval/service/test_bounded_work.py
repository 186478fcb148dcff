"""What one call may cost: its message before it is parsed, its work after its caller has gone."""

import asyncio
import gc
import gzip
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.bounds.messages import (
    MessageBounds,
    bounds_of,
    nested_messages,
    require_bounded,
)
from retrieval.bounds.work_threads import WorkThreads
from retrieval.config import Limits
from retrieval.encoding.batcher import Batcher
from retrieval.errors import DeadlinePassed, InvalidRequest, MessageTooLarge, RequestTooLarge
from retrieval.http2.calls import Call
from retrieval.observability.metrics import Metrics
from retrieval.service.admission import Admission
from retrieval.service.calls import CallGate, CallInfo
from retrieval.service.handlers import Method, MethodHandler
from retrieval.service.query_vectors import Query
from retrieval.service.search_request import SearchRequest
from retrieval.service.searcher import Searcher
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until

Code = grpc.StatusCode
MULTI = nested_messages(pb.RetrieveMultiRequest.DESCRIPTOR)


def bounded(message: pb.RetrieveMultiRequest, fields: int) -> None:
    require_bounded(message.SerializeToString(), MessageBounds(2**30, fields), MULTI)


# --- messages ---


@given(st.lists(st.integers(0, 300), max_size=30), st.text(max_size=2000))
def test_fields_are_counted_as_they_are(counts: list[int], text: str) -> None:
    message = pb.RetrieveMultiRequest(query=text, release_id="r" * 5000)
    for count in counts:
        message.targets.add(k=count, exclude_ids=[""] * count, min_score=0.5, exact=True)
    fields = 1 + bool(text)
    for target in message.targets:
        fields += 1 + bool(target.k) + len(target.exclude_ids) + 2
    bounded(message, fields)
    with pytest.raises(RequestTooLarge):
        bounded(message, fields - 1)


def test_fields_beyond_the_limit_are_refused_at_once() -> None:
    content = b"\x22\x00" * 4_000_000
    began = time.perf_counter()
    with pytest.raises(RequestTooLarge):
        require_bounded(content, MessageBounds(2**30, 1000), MULTI)
    assert time.perf_counter() - began < 0.1


@pytest.mark.parametrize("unit", [b"\x22\x05", b"\xff" * 11, b"\x26\x00", b"\x22"])
def test_message_that_is_no_message_is_invalid(unit: bytes) -> None:
    with pytest.raises(InvalidRequest):
        require_bounded(unit * 5000 + unit, MessageBounds(2**30, 10**6), MULTI)


def test_items_of_the_message_itself_have_a_bound_of_their_own() -> None:
    bounds = MessageBounds(2**30, 10**6, 1000)
    targets = pb.RetrieveMultiRequest(targets=[pb.Target()] * 5000).SerializeToString()
    with pytest.raises(RequestTooLarge, match="1000"):
        require_bounded(targets, bounds, MULTI)
    ids = pb.RetrieveMultiRequest(targets=[pb.Target(exclude_ids=["x"] * 5000)])
    require_bounded(ids.SerializeToString(), bounds, MULTI)


async def test_work_threads_error_holds_nothing_in_a_cycle() -> None:
    class Held:
        """What the work has read."""

    alive: list[weakref.ref[Held]] = []

    def work() -> None:
        held = Held()
        alive.append(weakref.ref(held))
        raise ValueError("too large")

    threads = WorkThreads(1, "test")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError):
            await threads.run(work)
        until = time.monotonic() + 20  # the thread itself may be the last to let go
        while alive[0]() is not None and time.monotonic() < until:
            await asyncio.sleep(0.01)
        assert alive[0]() is None
    finally:
        gc.enable()
        threads.close()


def test_message_bounds_hold_every_request_that_the_limits_allow() -> None:
    limits = Limits()
    bounds = bounds_of(limits)
    ids = [f"entity:{number:032x}" for number in range(limits.max_exclude_ids)]
    target = pb.Target(entity_type="pin", k=9, exclude_ids=ids, filter="f" * 4096)
    texts = ["q" * limits.max_query_bytes] * limits.max_batch
    largest: dict[str, Any] = {
        "Retrieve": pb.RetrieveRequest(
            query="q" * 2048, filter="f" * 4096, exclude_ids=ids, attributes=["*"]
        ),
        "RetrieveMulti": pb.RetrieveMultiRequest(targets=[target] * limits.max_targets),
        "RetrieveBatch": pb.RetrieveBatchRequest(queries=texts, target=target),
        "Embed": pb.EmbedRequest(queries=texts),
        "Score": pb.ScoreRequest(ids=ids, embedding=bytes(8192)),
        "Delete": pb.DeleteRequest(ids=ids[:1024]),
    }
    vectors = pb.RetrieveBatchRequest(embeddings=bytes(1024 * 4 * 1024), target=target)
    for name, message in [*largest.items(), ("RetrieveBatch", vectors)]:
        nested = nested_messages(message.DESCRIPTOR)
        require_bounded(message.SerializeToString(), bounds[name], nested)
    with pytest.raises(MessageTooLarge):
        require_bounded(bytes(2**20), bounds["DescribeRelease"], {})


# --- work in threads ---


def test_work_threads_cancelled_caller_waits_for_begun_work_alone() -> None:
    release = threading.Event()
    done: list[str] = []

    def work(name: str) -> None:
        release.wait(10)
        done.append(name)

    async def run() -> None:
        threads = WorkThreads(1, "test")
        first = asyncio.ensure_future(threads.run(lambda: work("begun")))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(threads.run(lambda: work("waiting")))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()
        await asyncio.sleep(0.05)
        assert second.done() and not first.done(), "its work holds the thread"
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert done == ["begun"]
        assert await threads.run(lambda: 5) == 5
        threads.close()

    asyncio.run(run())


@pytest.mark.slow
def test_work_threads_do_not_hold_up_the_end_of_the_process() -> None:
    script = (
        "import asyncio, time\n"
        "from retrieval.bounds.work_threads import WorkThreads\n"
        "async def main():\n"
        "    threads = WorkThreads(1, 'w')\n"
        "    task = asyncio.ensure_future(threads.run(lambda: time.sleep(60)))\n"
        "    await asyncio.sleep(0.1)\n"
        "    loop = asyncio.get_running_loop()\n"
        "    loop.call_later(0.1, loop.stop)\n"
        "loop = asyncio.new_event_loop()\n"
        "loop.run_until_complete(main())\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script], timeout=50, check=False, capture_output=True)
    assert time.monotonic() - began < 30


class SlowIndex:
    """An index whose search takes 5 ms a row."""

    def __init__(self) -> None:
        self.rows = 0
        self.running = 0

    def search_batch(self, vectors: np.ndarray, k: int, **options: object) -> list[str]:
        self.running += 1
        time.sleep(0.005 * len(vectors))
        self.rows += len(vectors)
        self.running -= 1
        return ["found"] * len(vectors)


def batch_of(searcher: Searcher, index: SlowIndex, remaining: float | None = None) -> Any:
    began = time.monotonic()
    context: Any = SimpleNamespace(
        time_remaining=lambda: None if remaining is None else began + remaining - time.monotonic()
    )
    target: Any = SimpleNamespace(entity_index=index, legs=None)
    queries = [Query(np.zeros(4, dtype=np.float32))] * 1000
    return searcher.search_batch(target, queries, SearchRequest("pin", 3), context)


def test_batch_given_up_stops_within_a_slice() -> None:
    index = SlowIndex()

    async def run() -> None:
        searcher = Searcher(1e-4, 2)
        batch = asyncio.ensure_future(batch_of(searcher, index))
        await asyncio.sleep(0.1)
        batch.cancel()
        began = time.monotonic()
        await asyncio.wait((batch,))
        assert time.monotonic() - began < 0.2, "it waits for its slice alone"
        assert not index.running, "places are given back when the work ends"
        rows = index.rows
        await asyncio.sleep(0.1)
        assert index.rows == rows < 100
        searcher.close()

    asyncio.run(run())


def test_batch_past_its_deadline_stops_within_a_slice() -> None:
    index = SlowIndex()

    async def run() -> None:
        searcher = Searcher(1e-4, 2)
        with pytest.raises(DeadlinePassed):
            await batch_of(searcher, index, 0.1)
        assert index.rows < 100
        searcher.close()

    asyncio.run(run())


def test_batches_leave_threads_to_single_searches() -> None:
    async def run() -> None:
        searcher = Searcher(1e-4, 1)
        batches = [asyncio.ensure_future(batch_of(searcher, SlowIndex())) for _ in range(3)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await searcher.in_thread(lambda: None)
        assert time.monotonic() - began < 0.2
        for batch in batches:
            batch.cancel()
        await asyncio.wait(batches)
        searcher.close()

    asyncio.run(run())


# --- errors ---


class Stranger:
    """The context of a call without deadline; its abort raises."""

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: Code, details: str = "", trailing: object = ()) -> NoReturn:
        raise RuntimeError(code)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux's")
def test_threads_of_batches_yield_to_those_of_single_searches() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def run() -> tuple[int, int]:
        single, _ = await searcher.in_thread(niceness)
        bulk, _ = await searcher.in_thread(niceness, bulk=True)
        return single, bulk

    searcher = Searcher(1.0, 1)
    single, bulk = asyncio.run(run())
    searcher.close()
    assert bulk > single == niceness()


def test_error_of_one_text_leaves_the_others_of_its_batch_to_be_answered() -> None:
    """The handler that forgets what failed must not end the task that encodes for all."""
    vector = np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32)

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.stack([vector * (np.nan if text == "bad" else 1.0) for text in texts])

    async def run() -> None:
        batcher = Batcher(encode, executor, 4)

        async def answer(message: pb.RetrieveRequest, call: CallInfo) -> pb.RetrieveResponse:
            await batcher.submit(message.query)
            return pb.RetrieveResponse(request_id=message.query)

        gate = CallGate(Admission(9), Metrics(), None, None, parsing)
        method = Method("Retrieve", pb.RetrieveRequest, answer, MessageBounds(2**20, 100))
        handler = MethodHandler(method, gate)
        calls = [
            handler.handle(pb.RetrieveRequest(query=text).SerializeToString(), Stranger())
            for text in ("bad", "one", "two", "three")
        ]
        async with asyncio.timeout(5):
            bad, *others = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(bad, RuntimeError)
        answers = [pb.RetrieveResponse.FromString(other).request_id for other in others]
        assert answers == ["one", "two", "three"]

    parsing = WorkThreads(1, "parse")
    with ThreadPoolExecutor(1) as executor:
        asyncio.run(run())
    parsing.close()


def test_large_messages_of_calls_given_up_are_parsed_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor are places given back while the thread still works."""
    running: list[int] = []
    most: list[int] = []
    parsing = WorkThreads(1, "parse")
    admissions = [Admission(9), Admission(9)]

    def parsed(self: MethodHandler, content: bytes) -> pb.RetrieveRequest:
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        return pb.RetrieveRequest()

    async def answer(message: pb.RetrieveRequest, call: CallInfo) -> pb.RetrieveResponse:
        return pb.RetrieveResponse()

    async def run() -> None:
        method = Method("Retrieve", pb.RetrieveRequest, answer, MessageBounds(2**20, 100))
        handlers = [
            MethodHandler(method, CallGate(one, Metrics(), None, None, parsing))
            for one in admissions
        ]
        calls = [
            asyncio.ensure_future(handler.handle(bytes(2**19), Stranger())) for handler in handlers
        ]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.sleep(0)
        assert len(running) == 1 and admissions[0].in_flight
        again = [handler.handle(bytes(2**19), Stranger()) for handler in handlers]
        await asyncio.gather(*calls, *again, return_exceptions=True)
        assert max(most) == 1 and not any(one.in_flight for one in admissions)

    monkeypatch.setattr(MethodHandler, "_parsed_now", parsed)
    asyncio.run(run())
    parsing.close()


# --- a real server ---


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(request: pytest.FixtureRequest, small_store: SmallStore) -> Iterator[Running]:
    with serving(small_store, transport=request.param, max_in_flight=8) as found:
        yield found


@pytest.fixture
def channel(running: Running) -> Iterator[grpc.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(running.address, options=options) as found:
        yield found


QUESTION = pb.RetrieveRequest(query="red cat", entity_type="pin", k=5)
BOMBS = {
    "RetrieveMulti": b"\x22\x00",
    "RetrieveMulti, nested": b"\x22\x02\x2a\x00",
    "RetrieveBatch": b"\x0a\x00",
    "Retrieve": b"\x82\x01\x00",
    "Embed": b"\x0a\x00",
    "Score": b"\x2a\x00",
    "/omnisearchsage.v1.Admin/Upsert": b"\x1a\x00",
    "/omnisearchsage.v1.Admin/Upsert, nested": b"\x1a\x02\x1a\x00",
    "/omnisearchsage.v1.Admin/Delete": b"\x12\x00",
}


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("bomb", BOMBS)
def test_message_of_many_fields_is_refused_and_its_neighbour_served(
    channel: grpc.Channel, running: Running, bomb: str, compression: grpc.Compression
) -> None:
    method = bomb.split(",")[0]
    path = method if method[0] == "/" else f"/omnisearchsage.v1.Retrieval/{method}"
    content = BOMBS[bomb] * (2_000_000 // len(BOMBS[bomb]))
    slowest = 0.0
    with grpc.insecure_channel(
        running.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as other:
        ask = rpc.RetrievalStub(other).Retrieve
        ask(QUESTION, timeout=20)
        call = channel.unary_unary(path).future(content, timeout=20, compression=compression)
        while not call.done():
            began = time.perf_counter()
            ask(QUESTION, timeout=20)
            slowest = max(slowest, time.perf_counter() - began)
    expected = {Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
    if compression is grpc.Compression.Gzip and running.server.config.transport == "grpcio":
        expected = {Code.UNIMPLEMENTED}
    assert call.code() in expected
    assert "retry-after-ms" not in dict(call.trailing_metadata())
    assert slowest < 3.0, "the client shares this process, the machine many others"


def held_calls() -> dict[int, object]:
    """Return the calls and the requests of several targets that are alive, by identity."""
    kinds = (Call, pb.RetrieveMultiRequest, pb.RetrieveBatchRequest)
    return {id(item): item for item in gc.get_objects() if isinstance(item, kinds)}


@pytest.mark.slow
def test_failed_calls_leave_nothing_behind(running: Running, channel: grpc.Channel) -> None:
    """No collection is needed to free what a failed call held."""
    stub = rpc.RetrievalStub(channel)
    stub.Retrieve(QUESTION, timeout=20)
    gc.collect()
    # Other test modules of this process may hold messages of their own.
    before = held_calls()
    gc.disable()
    try:
        for _ in range(20):
            with pytest.raises(grpc.RpcError):
                stub.RetrieveMulti(pb.RetrieveMultiRequest(query="x"), timeout=20)
            with pytest.raises(grpc.RpcError):
                stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=[""]), timeout=20)
        until(lambda: not running.server.service.admission.in_flight)
        time.sleep(0.1)
        assert [held for id, held in held_calls().items() if id not in before] == []
    finally:
        gc.enable()


def test_full_server_answers_what_is_cached(running: Running, channel: grpc.Channel) -> None:
    stub = rpc.RetrievalStub(channel)
    stub.Retrieve(QUESTION, timeout=20)
    admission = running.server.service.admission
    admission.enter(8)
    try:
        assert stub.Retrieve(QUESTION, timeout=20).answer_cached
        with pytest.raises(grpc.RpcError) as caught:
            stub.Retrieve(pb.RetrieveRequest(query="new", entity_type="pin", k=5), timeout=20)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    finally:
        admission.leave(8, 0.001)


def test_bulk_calls_take_no_places_from_single_ones(
    running: Running, channel: grpc.Channel
) -> None:
    stub = rpc.RetrievalStub(channel)
    bulk = running.server.service.bulk_admission
    bulk.enter(8)
    try:
        new = pb.RetrieveRequest(query="not asked before", entity_type="pin", k=5, exact=True)
        assert stub.Retrieve(new, timeout=20).hits
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(pb.EmbedRequest(queries=["a"]), timeout=20)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    finally:
        bulk.leave(8, 0.001)


def test_batches_given_up_hold_up_nobody(running: Running, channel: grpc.Channel) -> None:
    stub = rpc.RetrievalStub(channel)
    rows = np.random.default_rng(0).normal(size=(1024, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    target = pb.Target(entity_type="pin", k=300, exact=True)
    request = pb.RetrieveBatchRequest(
        embeddings=rows.tobytes(), space_id=running.space_id, target=target
    )
    calls = [stub.RetrieveBatch.future(request, timeout=30) for _ in range(2)]
    time.sleep(0.05)
    for call in calls:
        call.cancel()
    began = time.monotonic()
    until(lambda: not running.server.service.bulk_admission.in_flight)
    assert time.monotonic() - began < 2
    filtered = pb.RetrieveRequest(query="red cat", entity_type="pin", k=5, filter="price < 7")
    assert stub.Retrieve(filtered, timeout=5) is not None


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_callers_without_a_token_take_no_places(
    small_store: SmallStore, tmp_path: Any, transport: str
) -> None:
    import hashlib

    tokens = tmp_path / "tokens.toml"
    digest = hashlib.sha256(b"web").hexdigest()
    tokens.write_text(f'[[token]]\nname = "web"\nsha256 = "{digest}"\n')
    with (
        serving(small_store, transport=transport, tokens=tokens, max_in_flight=2) as running,
        grpc.insecure_channel(running.address) as channel,
        ThreadPoolExecutor(16) as pool,
    ):
        stub = rpc.RetrievalStub(channel)
        peaks = (running.server.service.admission, running.server.service.bulk_admission)

        def stranger(number: int) -> set[Code]:
            big = pb.RetrieveRequest(query="q", entity_type="pin", exclude_ids=["x" * 99] * 500)
            codes = set()
            for call, request in (
                (stub.Retrieve, QUESTION),
                (stub.Retrieve, big),
                (stub.RetrieveBatch, pb.RetrieveBatchRequest(queries=["a"])),
                (stub.Score, pb.ScoreRequest(query="a")),
            ):
                try:
                    call(request, timeout=20)
                except grpc.RpcError as error:
                    codes.add(error.code())
            return codes

        known = (("authorization", "Bearer web"),)
        stub.Retrieve(QUESTION, timeout=20, metadata=known)
        before = [admission.accepted for admission in peaks]
        answers = [pool.submit(stranger, number) for number in range(40)]
        while not all(answer.done() for answer in answers):
            new = pb.RetrieveRequest(query=f"{time.time()}", entity_type="pin", k=1)
            assert stub.Retrieve(new, timeout=20, metadata=known).hits
            before[0] += 1
        assert {code for answer in answers for code in answer.result()} == {Code.UNAUTHENTICATED}
        assert [admission.accepted for admission in peaks] == before


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_gzip_bomb_of_a_real_message_limit_is_refused_before_it_is_inflated(
    small_store: SmallStore, transport: str
) -> None:
    content = gzip.compress(b"\x22\x00" * 4_000_000, 9)
    assert len(content) < 20_000
    with (
        serving(small_store, transport=transport) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        call = channel.unary_unary("/omnisearchsage.v1.Retrieval/RetrieveMulti")
        began = time.perf_counter()
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\x22\x00" * 4_000_000, timeout=20, compression=grpc.Compression.Gzip)
        if transport == "http2":
            assert caught.value.code() in (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)
        else:  # whose library inflates before anybody can look
            assert caught.value.code() is Code.UNIMPLEMENTED
        assert time.perf_counter() - began < 5


@pytest.mark.slow
def test_grpcio_writes_no_line_for_each_message_that_it_refuses(small_store: SmallStore) -> None:
    command = [sys.executable, "-m", "retrieval.cli", "serve", "--store", small_store.store.root]
    command += ["--transport", "grpcio", "--port", "0", "--metrics-port", "0", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            port = json.loads(process.stdout.readline())["port"]
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary("/omnisearchsage.v1.Retrieval/Retrieve")
                for _ in range(5):
                    with pytest.raises(grpc.RpcError):
                        call(bytes(1000), timeout=20, compression=grpc.Compression.Gzip)
        finally:
            process.terminate()
        written = process.communicate(timeout=60)[1]
    assert "Compression algorithm" not in written, written
