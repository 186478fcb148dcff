"""The client against real gRPC servers: a scripted one for failures, a real service for answers."""

import asyncio
import dataclasses
import inspect
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, InvalidVectors, OmniError
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as pb_grpc
from retrieval.client import (
    AsyncRetrievalClient,
    ClientConfig,
    EntityWrite,
    RetrievalClient,
    RetryPolicy,
    Target,
    TlsConfig,
    requests,
)
from retrieval.client import errors as client_errors
from retrieval.client.config import PROXY_VARIABLES
from retrieval.client.errors import (
    BY_CODE,
    CallError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Precondition,
    Unavailable,
)
from retrieval.client.requests import value_to_proto, vector_bytes
from retrieval.client.results import value_to_python
from retrieval.client.retries import RetryBudget, wait_before_retry
from tests.helpers.serving.real_server import Running, SmallStore, serving

Step = Callable[[Any], Any]
PATIENT = ClientConfig(deadline_seconds=50)
ONCE = RetryPolicy(max_attempts=1)
FAST = RetryPolicy(first_backoff_seconds=0.001, max_backoff_seconds=0.002)


def fails(
    code: grpc.StatusCode, message: str = "scripted", retry_after_ms: int | None = None
) -> Step:
    def step(context: Any) -> None:
        if retry_after_ms is not None:
            context.set_trailing_metadata((("retry-after-ms", str(retry_after_ms)),))
        context.abort(code, message)

    return step


class Scripted(pb_grpc.RetrievalServicer, pb_grpc.AdminServicer):
    """Plays one step per call; after the last it answers."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = list(steps)
        self.times: list[float] = []
        self.metadata: list[dict[str, Any]] = []
        self.calls = 0
        self.lock = threading.Lock()

    def _play(self, context: Any) -> None:
        with self.lock:
            self.calls += 1
            self.times.append(time.monotonic())
            self.metadata.append(dict(context.invocation_metadata()))
            step = self.steps.pop(0) if self.steps else None
        if step:
            step(context)

    def Retrieve(self, request: Any, context: Any) -> Any:
        self._play(context)
        return pb.RetrieveResponse(hits=[pb.Hit(id="a", score=0.5)], release_id="r", plan="graph")

    def Rollback(self, request: Any, context: Any) -> Any:
        self._play(context)
        return pb.ActivateResponse(release_id="r0", previous_release_id="r1")


@contextmanager
def scripted(*steps: Step) -> Iterator[tuple[str, Scripted]]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    servicer = Scripted(list(steps))
    pb_grpc.add_RetrievalServicer_to_server(servicer, server)
    pb_grpc.add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        server.stop(0)


def both(address: str, config: ClientConfig, ask: Callable[[Any], Any]) -> list[Callable[[], Any]]:
    """The same call through the sync and the asyncio client."""

    def sync() -> Any:
        with RetrievalClient(address, config) as client:
            return ask(client)

    def run_async() -> Any:
        async def main() -> Any:
            async with AsyncRetrievalClient(address, config) as client:
                return await ask(client)

        return asyncio.run(main())

    return [sync, run_async]


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("code", "hint"), [(grpc.StatusCode.UNAVAILABLE, None), (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)]
)
def test_call_refused_with_hint_is_retried_until_answered(
    which: int, code: grpc.StatusCode, hint: int | None
) -> None:
    with scripted(fails(code, retry_after_ms=hint), fails(code, retry_after_ms=hint)) as (
        address,
        server,
    ):
        result = both(
            address, ClientConfig(retry=FAST, deadline_seconds=50), lambda c: c.retrieve("x")
        )[which]()
        assert result.ids == ["a"]
        assert server.calls == 3


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_call_resource_exhausted_without_hint_is_not_retried(which: int) -> None:
    with scripted(
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full. Free some space.")
    ) as (address, server):
        with pytest.raises(CallError, match=r"the disk is full\. Free some space") as caught:
            both(address, ClientConfig(retry=FAST, deadline_seconds=50), lambda c: c.retrieve("x"))[
                which
            ]()
        assert not isinstance(caught.value, Overloaded)
        assert caught.value.attempts == server.calls == 1


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_retry_wait_is_at_least_the_servers_hint(which: int) -> None:
    with scripted(fails(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=300)) as (
        address,
        server,
    ):
        both(address, ClientConfig(retry=FAST, deadline_seconds=50), lambda c: c.retrieve("x"))[
            which
        ]()
        assert server.times[1] - server.times[0] >= 0.3


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_retry_hint_beyond_deadline_raises_at_once(which: int) -> None:
    with scripted(fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=60_000)) as (
        address,
        server,
    ):
        started = time.monotonic()
        with pytest.raises(Overloaded) as caught:
            both(address, ClientConfig(retry=FAST, deadline_seconds=50), lambda c: c.retrieve("x"))[
                which
            ]()
        assert time.monotonic() - started < 50
        assert caught.value.retry_after_seconds == 60.0
        assert caught.value.attempts == server.calls == 1


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_retry_attempts_exhausted_error_says_how_many(which: int) -> None:
    with scripted(*[fails(grpc.StatusCode.UNAVAILABLE, "draining")] * 9) as (address, server):
        with pytest.raises(
            Unavailable, match=r"Retrieve on .* \(tried 4 times\): UNAVAILABLE: draining"
        ):
            both(address, ClientConfig(retry=FAST, deadline_seconds=50), lambda c: c.retrieve("x"))[
                which
            ]()
        assert server.calls == 4


@pytest.mark.parametrize(
    "code",
    sorted(set(grpc.StatusCode) - {grpc.StatusCode.OK}, key=lambda c: c.name),
    ids=lambda c: c.name,
)
def test_errors_every_status_raises_its_class(code: grpc.StatusCode) -> None:
    with (
        scripted(fails(code, "why", retry_after_ms=5)) as (address, _),
        RetrievalClient(address, dataclasses.replace(PATIENT, retry=ONCE)) as client,
    ):
        with pytest.raises(BY_CODE.get(code, client_errors.ServerFault)) as caught:
            client.retrieve("x")
        assert caught.value.code is code
        assert "why" in str(caught.value)
        assert isinstance(caught.value, OmniError)


def test_retry_permanent_error_and_rollback_are_sent_once() -> None:
    steps = (fails(grpc.StatusCode.INVALID_ARGUMENT), fails(grpc.StatusCode.UNAVAILABLE))
    with scripted(*steps) as (address, server), RetrievalClient(address, PATIENT) as client:
        with pytest.raises(InvalidRequest):
            client.retrieve("")
        assert server.calls == 1
        with pytest.raises(Unavailable):
            client.rollback()  # a second rollback would undo the first
        assert server.calls == 2


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
def test_deadline_slow_server_raises_deadline_exceeded(which: int) -> None:
    with scripted(lambda context: time.sleep(1.0)) as (address, _), pytest.raises(DeadlineExceeded):
        both(address, ClientConfig(), lambda c: c.retrieve("x", deadline_seconds=0.1))[which]()


@contextmanager
def slow_to_accept(address: str, seconds: float) -> Iterator[str]:
    """A relay to ``address`` that lets each new connection wait."""
    host, _, port = address.rpartition(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                sink.write(data)

        await asyncio.sleep(seconds)
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    started: futures.Future[tuple[int, asyncio.AbstractEventLoop]] = futures.Future()
    stop = asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        started.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop()))
        await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    listening, loop = started.result(10)
    try:
        yield f"127.0.0.1:{listening}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def test_client_slow_handshake_is_not_a_dead_server() -> None:
    config = ClientConfig(deadline_seconds=10, retry=RetryPolicy(max_attempts=1))
    with (
        scripted() as (address, _),
        slow_to_accept(address, 0.4) as slow,
        RetrievalClient(slow, config) as client,
    ):
        assert client.retrieve("x").ids == ["a"]


def test_client_nobody_listening_is_unavailable_and_not_ready() -> None:
    config = ClientConfig(retry=RetryPolicy(max_attempts=2, first_backoff_seconds=0.001))
    with RetrievalClient("127.0.0.1:9", config) as client:
        with pytest.raises(Unavailable):
            client.retrieve("x")
        assert not client.is_ready()
        with pytest.raises(Unavailable, match="not ready within"):
            client.wait_until_ready(0.1)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_proxy_of_the_environment_is_left_out_to_this_machine(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with scripted() as (address, _), RetrievalClient(address) as client:
        assert client.retrieve("x").ids == ["a"]


def test_unavailable_through_a_proxy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in PROXY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    config = ClientConfig(retry=RetryPolicy(max_attempts=1), deadline_seconds=60)
    target = "search.invalid:50051"
    with RetrievalClient(target, config) as client:
        with pytest.raises(Unavailable) as without:
            client.retrieve("x")
        assert "proxy" not in str(without.value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with (
        RetrievalClient(target, config) as client,
        pytest.raises(Unavailable, match=r"proxy that the variable http_proxy names.*no_proxy"),
    ):
        client.retrieve("x")


def test_token_is_sent_and_not_shown_in_repr() -> None:
    with (
        scripted() as (address, server),
        RetrievalClient(address, ClientConfig(token="secret")) as client,
    ):
        client.retrieve("x")
        assert server.metadata[0]["authorization"] == "Bearer secret"
    assert "secret" not in repr(ClientConfig(token="secret"))


@pytest.mark.parametrize(
    "target",
    [
        "search.example:50051",
        "localhost.evil.example:50051",
        "localhost-prod.example:443",
        "127.evil.example:50051",
        "127.0.0.1.evil.example",
        "[::1].evil.example:50051",
        "[::1",
        "[2001:db8::1]:50051",
        "localhost:50051:evil.example",
        "10.0.0.1:50051",
        "unix.evil.example:50051",
        "",
    ],
)
def test_token_plaintext_to_other_host_is_refused(
    target: str,
) -> None:
    with pytest.raises(ConfigError, match="unencrypted"):
        RetrievalClient(target, ClientConfig(token="secret"))
    RetrievalClient(target, ClientConfig(token="secret", allow_plaintext_token=True)).close()


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:50051",
        "127.8.8.8:50051",
        "[::1]:50051",
        "[::1]",
        "::1",
        "unix:/run/omni.sock",
    ],
)
def test_token_plaintext_to_loopback_is_allowed(target: str) -> None:
    RetrievalClient(target, ClientConfig(token="secret")).close()


def test_config_impossible_values_raise_config_error() -> None:
    for make in (
        lambda: ClientConfig(deadline_seconds=0),
        lambda: RetryPolicy(max_attempts=0),
        lambda: RetryPolicy(first_backoff_seconds=3.0, max_backoff_seconds=1.0),
        lambda: RetryPolicy(budget=0),
        lambda: TlsConfig(client_key=Path("key.pem")),
        lambda: RetrievalClient(
            "h:1", ClientConfig(tls=TlsConfig(root_certificates=Path("does-not-exist.pem")))
        ),
    ):
        with pytest.raises(ConfigError):
            make()


class _Failure(grpc.RpcError):
    def __init__(self, hint: str | None = None) -> None:
        self.hint = hint

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.hint is None else (("retry-after-ms", self.hint),)


@given(
    attempt=st.integers(1, 3),
    left=st.floats(0, 100),
    hint=st.none() | st.integers(0, 10_000),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_retry_wait_stays_within_bounds(
    attempt: int, left: float, hint: int | None, seed: int
) -> None:
    policy = RetryPolicy()
    wait = wait_before_retry(
        _Failure(None if hint is None else str(hint)),
        attempt,
        left,
        policy,
        RetryBudget(policy),
        random.Random(seed),
    )
    floor = (hint or 0) / 1000
    if wait is None:
        assert floor + policy.max_backoff_seconds >= left
    else:
        assert floor <= wait < left
        assert wait <= floor + min(
            policy.max_backoff_seconds, policy.first_backoff_seconds * 2 ** (attempt - 1)
        )


@pytest.mark.parametrize("hint", ["soon", "-5", "inf", "nan", ""])
def test_retry_hint_malformed_is_ignored(hint: str) -> None:
    assert client_errors.retry_after_seconds([("retry-after-ms", hint)]) is None


def test_retry_budget_failures_exhaust_and_successes_refill() -> None:
    policy = RetryPolicy(budget=10, budget_refill=1)
    budget = RetryBudget(policy)
    allowed = [budget.failure() for _ in range(20)]
    assert allowed == [True] * 4 + [False] * 16
    for _ in range(7):
        budget.success()
    assert budget.failure()


values = st.recursive(
    st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(values)
@settings(max_examples=80, deadline=None)
def test_attribute_value_round_trip_keeps_value_and_type(value: Any) -> None:
    back = value_to_python(pb.Value.FromString(value_to_proto(value).SerializeToString()))
    assert back == value
    assert type(back) is type(value)


def test_vector_bytes_packs_little_endian_and_refuses_bad_shapes() -> None:
    assert vector_bytes([1.0, -2.0], 1) == b"\x00\x00\x80?\x00\x00\x00\xc0"
    for bad, axes in (([[1.0]], 1), ([], 1), ([1.0], 2), ("text", 1), (np.zeros((2, 0)), 2)):
        with pytest.raises(InvalidVectors):
            vector_bytes(bad, axes)


def test_clients_sync_and_async_have_equal_signatures() -> None:
    def public(cls: type) -> dict[str, Any]:
        return {
            n: inspect.signature(f).parameters
            for n, f in inspect.getmembers(cls, inspect.isfunction)
            if not n.startswith("_")
        }

    sync, parallel = public(RetrievalClient), public(AsyncRetrievalClient)
    assert list(sync) == list(parallel)
    for name in sync:
        shape = [
            [(p.name, p.kind, p.default) for p in signatures[name].values()]
            for signatures in (sync, parallel)
        ]
        assert shape[0] == shape[1], name


@pytest.mark.parametrize(
    ("options", "message", "arguments"),
    [
        (requests.RetrieveOptions, pb.RetrieveRequest, {"query", "entity_type", "k"}),
        (requests.MultiOptions, pb.RetrieveMultiRequest, {"query", "targets"}),
        (requests.BatchOptions, pb.RetrieveBatchRequest, {"queries", "target"}),
        (requests.ScoreOptions, pb.ScoreRequest, {"query", "ids", "entity_type"}),
        (requests.SearchOptions, pb.Target, {"entity_type", "k", "deadline_seconds"}),
    ],
)
def test_options_cover_every_field_of_the_message(
    options: Any, message: Any, arguments: set[str]
) -> None:
    fields = {field.name for field in message.DESCRIPTOR.fields}
    if "fusion" in fields:
        fields.add("gate")  # of the message in that field
    assert fields | {"deadline_seconds"} == options.__optional_keys__ | arguments


def test_target_has_the_search_options() -> None:
    names = {field.name for field in dataclasses.fields(Target)}
    assert names == requests.SearchOptions.__optional_keys__ | {"entity_type", "k"}


@pytest.mark.parametrize("which", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("method", "keyword"),
    [
        ("retrieve", "filtr"),
        ("retrieve_multi", "filter"),
        ("retrieve_batch", "embedding"),
        ("score", "k"),
    ],
)
def test_options_unknown_keyword_raises_type_error(which: int, method: str, keyword: str) -> None:
    def ask(client: Any) -> Any:
        return getattr(client, method)("x", **{keyword: 1})

    with pytest.raises(TypeError, match=rf"{method}\(\) got an unexpected .* '{keyword}'"):
        both("127.0.0.1:9", ClientConfig(), ask)[which]()


@pytest.fixture(scope="module")
def running(running_server: Running) -> Running:
    return running_server


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[RetrievalClient]:
    with RetrievalClient(running.address, ClientConfig(deadline_seconds=20)) as found:
        found.wait_until_ready(20)
        yield found


def test_client_describe_release_names_what_is_served(
    client: RetrievalClient, running: Running
) -> None:
    release = client.describe_release()
    assert release.release_id == running.release_id
    assert (release.space_id, release.dimension) == (running.space_id, 32)
    assert release.entities["pin"].count == 300
    assert release.limits.max_k == 1000


def test_client_retrieve_by_text_and_by_vector_agree(
    client: RetrievalClient, running: Running
) -> None:
    vectors = client.embed(["red cat", "blue fish"]).vectors
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    by_text = client.retrieve("red cat", "pin", 5, attributes=["title", "tags", "sale"])
    by_vector = client.retrieve(
        embedding=vectors[0], space_id=running.space_id, entity_type="pin", k=5
    )
    assert by_text.ids == by_vector.ids
    assert by_text.cache_hit and not by_vector.cache_hit
    best = by_text.hits[0]
    assert best.attributes["tags"] == best.attributes["title"].split()
    assert isinstance(best.attributes["sale"], bool)
    assert by_vector.hits[0].attributes == {}


def test_client_retrieve_options_change_the_answer(client: RetrievalClient) -> None:
    plain = client.retrieve("red cat", "pin", 5)
    assert client.retrieve("red cat", "pin", 5, exact=True).plan == "exact"
    chosen = client.retrieve(
        "red cat",
        "pin",
        5,
        exclude_ids=plain.ids[:2],
        filter="price < 40",
        min_score=-1.0,
        min_recall=0.9,
    )
    assert not set(plain.ids[:2]) & set(chosen.ids)
    assert chosen.selectivity is not None
    varied = client.retrieve("red cat", "pin", 5, diversity=0.3, collapse_above=0.99)
    assert len(varied.hits) == 5


def test_client_multi_and_batch_equal_single_calls(
    client: RetrievalClient, running: Running
) -> None:
    single = client.retrieve("red cat", "pin", 5)
    pins = Target(entity_type="pin", k=5)
    multi = client.retrieve_multi("red cat", [pins, Target(entity_type="product", k=2)])
    assert [answer.entity_type for answer in multi.answers] == ["pin", "product"]
    assert multi.answers[0].ids == single.ids
    batch = client.retrieve_batch(["red cat", "blue fish"], pins)
    assert batch.answers[0].ids == single.ids
    vectors = client.embed(["red cat", "blue fish"]).vectors
    by_vectors = client.retrieve_batch(embeddings=vectors, space_id=running.space_id, target=pins)
    assert by_vectors.answers[1].ids == batch.answers[1].ids


def test_client_score_equals_hits_and_is_nan_for_unknown_ids(client: RetrievalClient) -> None:
    found = client.retrieve("red cat", "pin", 5)
    scores = client.score("red cat", [*found.ids, "nobody"], "pin")
    np.testing.assert_allclose(scores.scores[:-1], [hit.score for hit in found.hits], atol=1e-4)
    assert np.isnan(scores.scores[-1])
    assert scores.missing == 1


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"query": "   "}, InvalidRequest),
        ({"query": "x", "k": 0}, InvalidRequest),
        ({"query": "x", "entity_type": "video"}, NotFound),
        ({"query": "x", "release_id": "nobody"}, CallError),
        ({"embedding": [1.0] + [0.0] * 31, "space_id": "0" * 64}, Precondition),
    ],
)
def test_client_refused_request_raises_its_class(
    client: RetrievalClient, arguments: dict[str, Any], kind: type[CallError]
) -> None:
    with pytest.raises(kind):
        client.retrieve(**arguments)


def test_client_upserted_entity_is_found_and_deleted_one_is_not(
    small_store: SmallStore, tmp_path: Path
) -> None:
    async def main(running: Running) -> None:
        async with AsyncRetrievalClient(
            running.address, ClientConfig(deadline_seconds=20)
        ) as client:
            await client.wait_until_ready(20)
            vector = (await client.embed(["golden whale"])).vectors[0]
            entity = EntityWrite(
                id="new-1", vector=vector, attributes={"title": "new", "price": 1.5}
            )
            written = await client.upsert("ad", [entity], space_id=running.space_id)
            assert written.applied == 1
            await _until(
                lambda: client.retrieve("golden whale", "ad", 1), lambda r: r.ids == ["new-1"]
            )
            twice = await client.retrieve(
                "golden whale", "ad", 1, attributes=["title", "title", "nothing"]
            )
            assert twice.hits[0].attributes == {"title": "new"}, (
                "found by the fuzzer: a name asked for twice made live entities fail"
            )
            await client.delete("ad", ["new-1"])
            await _until(
                lambda: client.retrieve("golden whale", "ad", 1), lambda r: r.ids != ["new-1"]
            )
            with pytest.raises(Precondition):
                await client.upsert("ad", [entity], space_id="f" * 64)

    with serving(small_store.copy(tmp_path / "store")) as running:
        asyncio.run(main(running))


async def _until(ask: Callable[[], Any], holds: Callable[[Any], bool]) -> None:
    for _ in range(200):
        if holds(await ask()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the write did not become visible within ten seconds")


def test_client_shared_by_threads_keeps_answers_apart(running: Running) -> None:
    with (
        RetrievalClient(running.address, ClientConfig(deadline_seconds=30)) as client,
        futures.ThreadPoolExecutor(8) as pool,
    ):
        texts = [
            f"{a} {b}" for a in ("red", "blue", "old") for b in ("cat", "dog", "lamp", "door")
        ] * 4
        expected = {text: client.retrieve(text).ids for text in set(texts)}
        assert all(
            ids == expected[text]
            for text, ids in zip(texts, pool.map(lambda t: client.retrieve(t).ids, texts))
        )


@pytest.mark.slow
def test_client_restarted_server_is_found_again(tmp_path: Path) -> None:
    with scripted() as (address, _):
        client = RetrievalClient(
            address,
            ClientConfig(
                deadline_seconds=60,
                retry=RetryPolicy(max_attempts=60, budget=1000, max_backoff_seconds=0.2),
            ),
        )
        assert client.retrieve("x").ids == ["a"]
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_RetrievalServicer_to_server(Scripted([]), server)
    timer = threading.Timer(0.5, lambda: (server.add_insecure_port(address), server.start()))
    timer.start()
    assert client.retrieve("x").ids == ["a"]
    timer.join()
    server.stop(0)
    client.close()
