"""Every call of the contract against a real server on a real release."""

import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.small_releases import entity_texts
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until

Code = grpc.StatusCode


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def running(
    request: pytest.FixtureRequest,
    small_store: SmallStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    made = small_store.copy(folder / "store")
    settings = {"transport": request.param, "shadow_fraction": 1.0, "shadow_cpu": 1.0}
    with serving(made, impression_log=folder / "impressions", **settings) as found:
        yield found


def fails(call, request, code: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    assert caught.value.code() is code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


def test_retrieve_text_finds_its_own_entity_and_reports_how(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    text = entity_texts(20)[7]
    request = pb.RetrieveRequest(
        query=f"  {text} ",
        entity_type="pin",
        k=5,
        attributes=["title", "price", "nonsense"],
        request_id="r-1",
    )
    first, second = stub.Retrieve(request), stub.Retrieve(request)
    assert first.hits[0].id == "pin-7" and first.hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert (
        first.hits[0].attributes["title"].string_value == text
        and first.hits[0].attributes["price"].double_value == 7.0
    )
    assert set(first.hits[0].attributes) == {"title", "price"}
    assert [h.score for h in first.hits] == sorted((h.score for h in first.hits), reverse=True)
    assert (
        not first.cache_hit
        and second.cache_hit
        and second.timings.encode_ns == 0 < first.timings.encode_ns
    )
    assert (first.release_id, first.space_id, first.request_id) == (
        running.release_id,
        running.space_id,
        "r-1",
    )
    assert 0 < first.timings.search_ns < first.timings.total_ns
    assert list(first.hits) == list(second.hits)


def test_retrieve_attribute_named_twice_comes_once(stub: rpc.RetrievalStub) -> None:
    """A column that is selected twice is an error of polars, and must not become INTERNAL."""
    fields = {
        "entity_type": "pin",
        "k": 2,
        "attributes": ["title", "price", "title", "no such", "no such"],
    }
    target = pb.Target(**fields)
    single = stub.Retrieve(pb.RetrieveRequest(query="red cat", **fields))
    batch = stub.RetrieveBatch(pb.RetrieveBatchRequest(queries=["red cat"], target=target))
    for answer in (single, *batch.answers):
        assert [set(hit.attributes) for hit in answer.hits] == [{"title", "price"}] * 2


def test_batch_and_multi_answer_as_single_calls_do(stub: rpc.RetrievalStub) -> None:
    queries = ["red cat", "blue whale", "silver lamp", "red cat"]
    single = [
        stub.Retrieve(pb.RetrieveRequest(query=q, entity_type="product", k=4)) for q in queries
    ]
    batch = stub.RetrieveBatch(
        pb.RetrieveBatchRequest(queries=queries, target=pb.Target(entity_type="product", k=4))
    )
    assert [[h.id for h in a.hits] for a in batch.answers] == [
        [h.id for h in s.hits] for s in single
    ]
    assert all(a.cache_hit for a in batch.answers)
    targets = [
        pb.Target(entity_type="product", k=4),
        pb.Target(entity_type="ad", k=2),
        pb.Target(entity_type="pin", k=3, filter="price < 5"),
    ]
    multi = stub.RetrieveMulti(pb.RetrieveMultiRequest(query="red cat", targets=targets))
    assert [a.entity_type for a in multi.answers] == ["product", "ad", "pin"] and [
        len(a.hits) for a in multi.answers
    ] == [4, 2, 3]
    assert [h.id for h in multi.answers[0].hits] == [h.id for h in single[0].hits]
    assert multi.answers[2].HasField("selectivity") and not multi.answers[0].HasField("selectivity")


def test_embed_score_and_ready_vectors_agree_with_text(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    embedded = stub.Embed(pb.EmbedRequest(queries=["red cat", "blue whale"]))
    vectors = np.frombuffer(embedded.embeddings, dtype="<f4").reshape(2, embedded.dimension)
    np.testing.assert_allclose(
        vectors, running.encoder.encode(["red cat", "blue whale"]), atol=1e-4
    )
    ready = dict(embedding=vectors[0].tobytes(), space_id=embedded.space_id)
    by_text = stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=6))
    by_vector = stub.Retrieve(pb.RetrieveRequest(entity_type="pin", k=6, **ready))
    assert [h.id for h in by_text.hits] == [h.id for h in by_vector.hits]
    ids = [h.id for h in by_text.hits]
    scored = stub.Score(pb.ScoreRequest(query="red cat", entity_type="pin", ids=[*ids, "missing"]))
    np.testing.assert_allclose(scored.scores[:6], [h.score for h in by_text.hits], atol=1e-4)
    assert np.isnan(scored.scores[6]) and scored.missing == 1
    batch = stub.RetrieveBatch(
        pb.RetrieveBatchRequest(
            embeddings=embedded.embeddings,
            space_id=embedded.space_id,
            target=pb.Target(entity_type="pin", k=6),
        )
    )
    assert [h.id for h in batch.answers[0].hits] == ids


def test_retrieve_each_option_changes_the_answer_as_documented(stub: rpc.RetrievalStub) -> None:
    plain = stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=10))
    exact = stub.Retrieve(pb.RetrieveRequest(query="red cat", entity_type="pin", k=10, exact=True))
    assert (
        exact.plan == "exact"
        and exact.estimated_recall == 1.0
        and exact.hits[0].id == plain.hits[0].id
    )
    top = [h.id for h in exact.hits]
    without = stub.Retrieve(
        pb.RetrieveRequest(
            query="red cat", entity_type="pin", k=10, exact=True, exclude_ids=top[:3]
        )
    )
    assert [h.id for h in without.hits][:7] == top[3:]
    cheap = stub.Retrieve(
        pb.RetrieveRequest(
            query="red cat",
            entity_type="pin",
            k=1000,
            filter="price < 3 and sale == true",
            attributes=["*"],
        )
    )
    assert cheap.hits and all(
        h.attributes["price"].double_value < 3 and h.attributes["sale"].bool_value
        for h in cheap.hits
    )
    assert len(cheap.hits) == sum(i % 50 < 3 and i % 3 == 0 for i in range(300)), (
        "fewer than k match: all that match come back"
    )
    floor = exact.hits[4].score
    above = stub.Retrieve(
        pb.RetrieveRequest(query="red cat", entity_type="pin", k=10, exact=True, min_score=floor)
    )
    assert len(above.hits) == 5
    sure = stub.Retrieve(
        pb.RetrieveRequest(query="red cat", entity_type="pin", k=10, min_recall=1.0)
    )
    assert [h.id for h in sure.hits] == top and sure.estimated_recall == 1.0
    varied = stub.Retrieve(
        pb.RetrieveRequest(query="red cat", entity_type="pin", k=10, diversity=0.3)
    )
    assert varied.hits[0].id == top[0] and len(varied.hits) == 10 and varied.timings.rerank_ns > 0
    collapsed = stub.Retrieve(
        pb.RetrieveRequest(query="red cat", entity_type="pin", k=10, collapse_above=0.5)
    )
    assert 0 < len(collapsed.hits) <= 10


def test_describe_release_reports_recall_attributes_and_limits(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    found = stub.DescribeRelease(pb.DescribeReleaseRequest())
    assert (found.release_id, found.space_id, found.dimension) == (
        running.release_id,
        running.space_id,
        32,
    )
    entities = {e.entity_type: e for e in found.entities}
    assert entities["ad"].count == 60 and "price" in entities["pin"].attributes
    assert 0.5 < entities["pin"].ann_recall_at_10 <= 1.0
    assert found.limits.max_k == 1000 and running.release_id in found.loaded_release_ids
    assert json.loads(found.manifest_json)["release_id"] == running.release_id


BAD = [
    (dict(query="", entity_type="pin", k=3), Code.INVALID_ARGUMENT, "query"),
    (dict(query=" \u200b", entity_type="pin", k=3), Code.INVALID_ARGUMENT, "visible"),
    (dict(query="a", entity_type="pin", k=0), Code.INVALID_ARGUMENT, "1 to 1000, but got 0"),
    (dict(query="a", entity_type="pin", k=1001), Code.INVALID_ARGUMENT, "1001"),
    (dict(query="a", entity_type="boards", k=3), Code.NOT_FOUND, "pin"),
    (dict(query="a", k=3), Code.NOT_FOUND, "product"),
    (dict(query="a", entity_type="pin", k=3, filter="price <"), Code.INVALID_ARGUMENT, "character"),
    (
        dict(query="a", entity_type="pin", k=3, filter="nothing == 1"),
        Code.INVALID_ARGUMENT,
        "nothing",
    ),
    (dict(query="a", entity_type="pin", k=3, filter="(" * 3000), Code.INVALID_ARGUMENT, ""),
    (dict(query="a", entity_type="pin", k=3, min_recall=2.0), Code.INVALID_ARGUMENT, "min_recall"),
    (
        dict(query="a", entity_type="pin", k=3, release_id="old"),
        Code.FAILED_PRECONDITION,
        "not loaded",
    ),
    (dict(query="x" * 5000, entity_type="pin", k=3), Code.INVALID_ARGUMENT, "2048"),
    (
        dict(embedding=b"123", space_id="s", entity_type="pin", k=3),
        Code.INVALID_ARGUMENT,
        "128 bytes",
    ),
    (
        dict(embedding=bytes(128), space_id="s", entity_type="pin", k=3),
        Code.FAILED_PRECONDITION,
        "space",
    ),
    (dict(query="a", embedding=bytes(128), entity_type="pin", k=3), Code.INVALID_ARGUMENT, "both"),
]


@pytest.mark.parametrize(("fields", "code", "word"), BAD, ids=range(len(BAD)))
def test_retrieve_bad_request_gets_a_typed_error_with_the_way_out(
    stub: rpc.RetrievalStub, fields: dict, code: Code, word: str
) -> None:
    fails(stub.Retrieve, pb.RetrieveRequest(**fields), code, word)


def test_other_calls_bad_request_gets_a_typed_error(
    running: Running, stub: rpc.RetrievalStub, channel: grpc.Channel
) -> None:
    admin = rpc.AdminStub(channel)
    fails(
        stub.RetrieveBatch,
        pb.RetrieveBatchRequest(target=pb.Target(entity_type="pin", k=1)),
        Code.INVALID_ARGUMENT,
        "queries",
    )
    fails(
        stub.RetrieveBatch,
        pb.RetrieveBatchRequest(queries=["a"] * 1025, target=pb.Target(entity_type="pin", k=1)),
        Code.INVALID_ARGUMENT,
        "1024",
    )
    fails(stub.RetrieveMulti, pb.RetrieveMultiRequest(query="a"), Code.INVALID_ARGUMENT, "targets")
    fails(stub.Embed, pb.EmbedRequest(queries=["a", ""]), Code.INVALID_ARGUMENT, "queries[1]")
    fails(stub.Score, pb.ScoreRequest(query="a", entity_type="pin"), Code.INVALID_ARGUMENT, "ids")
    fails(admin.Activate, pb.ActivateRequest(), Code.INVALID_ARGUMENT, "release_id")
    fails(admin.Activate, pb.ActivateRequest(release_id="nope"), Code.NOT_FOUND, "nope")
    fails(
        admin.Activate,
        pb.ActivateRequest(release_id="../../etc"),
        Code.INVALID_ARGUMENT,
        "release id",
    )
    fails(admin.Rollback, pb.RollbackRequest(), Code.FAILED_PRECONDITION, "no earlier release")
    vector = running.encoder.encode(["x"])[0]
    good = pb.Entity(id="u", embedding=vector.tobytes())
    space = running.space_id
    fails(
        admin.Upsert,
        pb.UpsertRequest(entity_type="nope", space_id=space, entities=[good]),
        Code.NOT_FOUND,
    )
    fails(
        admin.Upsert,
        pb.UpsertRequest(entity_type="pin", space_id="f" * 64, entities=[good]),
        Code.FAILED_PRECONDITION,
        "space",
    )
    fails(
        admin.Upsert,
        pb.UpsertRequest(entity_type="pin", space_id=space),
        Code.INVALID_ARGUMENT,
        "entities",
    )
    nan = np.full(32, np.nan, dtype=np.float32).tobytes()
    for bad in (
        pb.Entity(id="", embedding=vector.tobytes()),
        pb.Entity(id="x", embedding=nan),
        pb.Entity(id="x", embedding=(vector * 2).tobytes()),
        pb.Entity(
            id="x", embedding=vector.tobytes(), attributes={"price": pb.Value(string_value="cheap")}
        ),
        pb.Entity(
            id="x",
            embedding=vector.tobytes(),
            attributes={"price": pb.Value(double_value=float("nan"))},
        ),
        pb.Entity(
            id="x", embedding=vector.tobytes(), attributes={"two words": pb.Value(int_value=1)}
        ),
    ):
        fails(
            admin.Upsert,
            pb.UpsertRequest(entity_type="pin", space_id=space, entities=[good, bad]),
            Code.INVALID_ARGUMENT,
            "entities[1]",
        )
    assert stub.Score(pb.ScoreRequest(query="x", entity_type="pin", ids=["u"])).missing == 1, (
        "a refused upsert leaves nothing behind"
    )


def test_upsert_and_delete_become_visible(
    running: Running, stub: rpc.RetrievalStub, channel: grpc.Channel
) -> None:
    admin = rpc.AdminStub(channel)
    vector = running.encoder.encode(["purple dragon"])[0]
    entity = pb.Entity(
        id="dragon",
        embedding=vector.tobytes(),
        attributes={"price": pb.Value(double_value=1.5), "title": pb.Value(string_value="D")},
    )
    written = admin.Upsert(
        pb.UpsertRequest(entity_type="ad", space_id=running.space_id, entities=[entity])
    )
    assert written.sequence >= 1 and written.applied == 1
    serving_release = running.server.releases.resolve("")
    assert serving_release.follower.wait_for("ad", written.sequence)
    found = stub.Retrieve(
        pb.RetrieveRequest(query="purple dragon", entity_type="ad", k=1, attributes=["*"])
    )
    assert found.hits[0].id == "dragon" and found.hits[0].attributes["price"].double_value == 1.5
    gone = admin.Delete(pb.DeleteRequest(entity_type="ad", ids=["dragon", "ad-3", "never-there"]))
    assert serving_release.follower.wait_for("ad", gone.sequence)
    left = stub.Retrieve(pb.RetrieveRequest(query="purple dragon", entity_type="ad", k=1000))
    assert len(left.hits) == 59 and not {"dragon", "ad-3"} & {h.id for h in left.hits}


def test_upsert_new_attribute_keeps_the_type_it_was_first_written_with(
    running: Running, stub: rpc.RetrievalStub, channel: grpc.Channel
) -> None:
    admin = rpc.AdminStub(channel)
    vector = running.encoder.encode(["green dragon"])[0].tobytes()

    def entity(id_: str, value: pb.Value) -> pb.Entity:
        return pb.Entity(id=id_, embedding=vector, attributes={"mood": value})

    def request(*entities: pb.Entity) -> pb.UpsertRequest:
        return pb.UpsertRequest(entity_type="ad", space_id=running.space_id, entities=entities)

    number, text = pb.Value(int_value=3), pb.Value(string_value="glad")
    fails(admin.Upsert, request(entity("m1", number), entity("m2", text)), Code.INVALID_ARGUMENT)
    admin.Upsert(request(entity("m1", text)))
    refused = ("attribute 'mood' is string in this index", "got 3")
    # At once, while only this server knows, and when the entry is visible
    fails(admin.Upsert, request(entity("m2", number)), Code.INVALID_ARGUMENT, *refused)
    written = admin.Upsert(request(entity("m3", text)))
    follower = running.server.releases.resolve("").follower
    assert follower.wait_for("ad", written.sequence)
    fails(admin.Upsert, request(entity("m2", number)), Code.INVALID_ARGUMENT, "mood")
    gone = admin.Delete(pb.DeleteRequest(entity_type="ad", ids=["m1", "m3"]))
    assert follower.wait_for("ad", gone.sequence)


def test_health_and_reflection_know_services_and_entity_types(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "omnisearchsage.v1.Retrieval", "pin", "ad"):
        assert (
            health.Check(health_pb2.HealthCheckRequest(service=name)).status
            == health_pb2.HealthCheckResponse.SERVING
        )
    with pytest.raises(grpc.RpcError):
        health.Check(health_pb2.HealthCheckRequest(service="board"))
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(
        file_containing_symbol="omnisearchsage.v1.Retrieval"
    )
    answer = next(iter(reflection.ServerReflectionInfo(iter([asked]))))
    described = FileDescriptorProto.FromString(
        answer.file_descriptor_response.file_descriptor_proto[0]
    )
    assert {service.name for service in described.service} == {"Retrieval", "Admin"}


def test_health_watch_streams_on_both_transports(channel: grpc.Channel) -> None:
    """The one method of ours that streams answers to a single message."""
    watching = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="pin"), timeout=20
    )
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()


def test_malformed_bytes_get_typed_errors_and_the_server_lives(
    running: Running, channel: grpc.Channel, stub: rpc.RetrievalStub
) -> None:
    rng = random.Random(0)
    allowed = {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.FAILED_PRECONDITION,
        Code.RESOURCE_EXHAUSTED,
        Code.OK,
    }
    seeds = [
        pb.RetrieveRequest(
            query="red",
            entity_type="pin",
            k=3,
            filter="price < 3",
            exclude_ids=["a"],
            min_recall=0.9,
        ).SerializeToString(),
        pb.RetrieveBatchRequest(
            queries=["a"], target=pb.Target(entity_type="pin", k=3)
        ).SerializeToString(),
        pb.UpsertRequest(
            entity_type="pin", space_id="x", entities=[pb.Entity(id="a")]
        ).SerializeToString(),
    ]
    methods = [
        ("Retrieval", m)
        for m in ("Retrieve", "RetrieveMulti", "RetrieveBatch", "Embed", "Score", "DescribeRelease")
    ] + [("Admin", "Upsert")]
    seen = set()
    for _ in range(600):
        service, method = rng.choice(methods)
        content = bytearray(
            rng.choice(seeds) if rng.random() < 0.7 else rng.randbytes(rng.randrange(60))
        )
        for _ in range(rng.randrange(6)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        call = channel.unary_unary(f"/omnisearchsage.v1.{service}/{method}")
        try:
            call(bytes(content), timeout=20)
            code = Code.OK
        except grpc.RpcError as error:
            code = error.code()
        seen.add(code)
        assert code in allowed, (service, method, bytes(content), code)
    assert {Code.INVALID_ARGUMENT, Code.OK} <= seen
    assert stub.Retrieve(pb.RetrieveRequest(query="still here", entity_type="pin", k=1)).hits
    assert running.server.service.admission.in_flight == 0


def test_metrics_scrape_holds_counts_and_no_query_text(
    running: Running, stub: rpc.RetrievalStub
) -> None:
    stub.Retrieve(
        pb.RetrieveRequest(query="utterly private words", entity_type="pin", k=3, language="de")
    )
    text = urllib.request.urlopen(f"{running.http}/metrics").read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ok = sum(
        s.value
        for s in families["omni_requests"].samples
        if s.labels == {"method": "Retrieve", "code": "OK"}
    )
    assert ok >= 1 and families["omni_ready"].samples[0].value == 1
    assert "private" not in text
    health = json.loads(urllib.request.urlopen(f"{running.http}/healthz").read())
    assert health["ready"] and health["release_id"] == running.release_id
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{running.http}/nothing-here")
    assert missing.value.code == 404


def test_shadow_recall_agrees_with_exact_search(running: Running, stub: rpc.RetrievalStub) -> None:
    for word in entity_texts(40, seed=9):
        stub.Retrieve(pb.RetrieveRequest(query=word, entity_type="product", k=10, language="en"))
    shadow = running.server.service.recorder.shadow
    labels = ("product", "none", "en")
    until(lambda: labels in shadow.estimates() and shadow.estimates()[labels].samples >= 30)
    found = shadow.estimates()[labels]
    assert found.samples >= 30 and found.low <= found.recall <= found.high and found.recall > 0.9


def test_impressions_hold_ids_and_positions_but_no_query_text(
    running: Running, stub: rpc.RetrievalStub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    answer = stub.Retrieve(
        pb.RetrieveRequest(
            query="secret words", entity_type="pin", k=3, language="fr", country="FR"
        )
    )
    assert len(answer.request_id) == 32
    folder = Path(running.server.config.impression_log or "")

    def logged() -> list[dict]:
        text = "".join(path.read_text() for path in folder.glob("*.jsonl"))
        whole = text[: text.rfind("\n") + 1]
        return [
            row
            for row in map(json.loads, whole.splitlines())
            if row["request_id"] == answer.request_id
        ]

    until(lambda: len(logged()) == 3)
    lines = logged()
    assert [(row["position"], row["entity_id"]) for row in lines] == [
        (i + 1, h.id) for i, h in enumerate(answer.hits)
    ]
    assert (
        {row["query"] for row in lines} == {""}
        and lines[0]["action"] == "impression"
        and lines[0]["country"] == "FR"
    )


@pytest.mark.parametrize(("text", "share"), [("red cat", 0.0), ("שלום", 1.0), ("red שלום", 4 / 7)])
def test_answers_say_how_much_of_a_query_the_tower_does_not_know(
    stub: rpc.RetrievalStub, text: str, share: float
) -> None:
    for _ in range(2):  # encoded, then from the caches
        answer = stub.Retrieve(pb.RetrieveRequest(query=text, entity_type="pin", k=3))
        assert answer.unknown_share == pytest.approx(share)
    batch = stub.RetrieveBatch(
        pb.RetrieveBatchRequest(queries=[text], target=pb.Target(entity_type="pin", k=3))
    )
    assert batch.answers[0].unknown_share == pytest.approx(share)
    targets = [pb.Target(entity_type="pin", k=3)]
    multi = stub.RetrieveMulti(pb.RetrieveMultiRequest(query=text, targets=targets))
    assert multi.unknown_share == pytest.approx(share)
