"""Releases that come, go, break and come back while a real server answers."""

import asyncio
import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.config import ServeConfig
from retrieval.errors import AddressInUse
from retrieval.process_tuning import freeze_start_up_objects
from retrieval.server.server import Server, create_server
from tests.helpers.serving.real_server import start_server
from tests.helpers.waiting import until_async


async def start(
    store: ReleaseStore, **settings
) -> tuple[Server, rpc.RetrievalStub, rpc.AdminStub, grpc.aio.Channel]:
    usual = {"metrics_port": None, "poll_seconds": 0.05, "shadow_fraction": 0}
    server = await start_server(store, **usual, **settings)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
    return server, rpc.RetrievalStub(channel), rpc.AdminStub(channel), channel


def ask(query: str = "red cat", **fields) -> pb.RetrieveRequest:
    return pb.RetrieveRequest(query=query, entity_type="pin", k=5, **fields)


def whole(answer: pb.RetrieveResponse) -> bool:
    """Whether every id belongs to the release that the answer names."""
    return bool(answer.hits) and all(
        hit.id.startswith(answer.release_id + ":") for hit in answer.hits
    )


@pytest.mark.slow
async def test_swap_under_load_loses_and_mixes_no_answers(
    store: ReleaseStore,
) -> None:
    server, stub, admin, channel = await start(store)
    answers: list[pb.RetrieveResponse] = []
    stop = False

    async def client(number: int) -> None:
        step = 0
        while not stop:
            step += 1
            answers.append(await stub.Retrieve(ask(f"red cat {number} {step % 7}"), timeout=60))

    clients = [asyncio.ensure_future(client(i)) for i in range(4)]
    for release_id in ("a2", "b1", "a1"):
        store.activate(release_id)
        await until_async(
            lambda wanted=release_id: (
                server.releases.active and server.releases.active.release_id == wanted
            )
        )
    assert (await admin.Activate(pb.ActivateRequest(release_id="b1"))).previous_release_id == "a1"
    rolled = await admin.Rollback(pb.RollbackRequest())
    assert (rolled.release_id, rolled.previous_release_id) == (
        "a1",
        "b1",
    ) and store.current() == "a1"
    stop = True
    await asyncio.gather(*clients)
    assert all(map(whole, answers)) and {a.release_id for a in answers} >= {"a1", "a2"}
    assert len({(a.release_id[0], a.space_id) for a in answers}) <= 2
    assert list(server.releases.loaded) == ["b1", "a1"], "no more than keep_releases"
    pinned = await stub.Retrieve(ask(release_id="b1"))
    assert pinned.release_id == "b1" and whole(pinned)
    await channel.close()
    await server.stop(0)


async def test_swap_keeps_the_query_cache_or_prewarms_it_for_another_space(
    store: ReleaseStore,
) -> None:
    server, stub, admin, channel = await start(store)
    for text in ("red cat", "blue whale", "silver lamp"):
        await stub.Retrieve(ask(text))
    await admin.Activate(pb.ActivateRequest(release_id="a2"))
    assert (await stub.Retrieve(ask("blue whale"))).cache_hit
    await admin.Activate(pb.ActivateRequest(release_id="b1"))
    again = await stub.Retrieve(ask("blue whale"))
    assert again.cache_hit and again.release_id == "b1" and whole(again)
    assert server.metrics.value("omni_prewarmed_queries") == 3
    await channel.close()
    await server.stop(0)


def damage_vectors(folder: Path) -> None:
    path = folder / "pin" / "vectors.npy"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_a_file(folder: Path) -> None:
    path = folder / "pin" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-100])


def remove_a_file(folder: Path) -> None:
    (folder / "pin" / "attributes.parquet").unlink()


def edit_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"dimension": 32', '"dimension": 64'))


def swap_the_encoder(folder: Path) -> None:
    """An attacker's or a copying mistake: another encoder under a manifest made to fit. Only the
    golden queries can notice.
    """
    from index_builder.releases.manifest import Manifest
    from index_builder.releases.verification import record_files

    other = folder.parent / "b1" / "query_encoder"
    shutil.rmtree(folder / "query_encoder")
    shutil.copytree(other, folder / "query_encoder")
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), folder.name)
    (folder / "manifest.json").unlink()
    object.__setattr__(manifest, "files", record_files(folder))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())


@pytest.mark.parametrize(
    "damage",
    [damage_vectors, cut_a_file, remove_a_file, edit_the_manifest, swap_the_encoder],
    ids=lambda f: f.__name__,
)
async def test_swap_broken_release_is_refused_and_the_old_one_keeps_serving(
    store: ReleaseStore, damage
) -> None:
    server, stub, admin, channel = await start(store)
    damage(store.path_of("a2"))
    with pytest.raises(grpc.RpcError) as refused:
        await admin.Activate(pb.ActivateRequest(release_id="a2"))
    assert (
        refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        and "a2" in refused.value.details()
    )
    assert store.current() == "a1"
    if damage is not edit_the_manifest:
        store.activate("a2", verify=False)
        await until_async(
            lambda: sum(server.metrics.snapshot().get("omni_releases_refused", {}).values()) >= 2
        )
    answer = await stub.Retrieve(ask())
    assert answer.release_id == "a1" and whole(answer)
    store.activate("b1")
    await until_async(lambda: server.releases.active.release_id == "b1")
    await channel.close()
    await server.stop(0)


@pytest.mark.slow
async def test_start_without_a_release_waits_and_serves_when_one_appears(
    store: ReleaseStore,
) -> None:
    current = store.releases / "CURRENT"
    content = current.read_bytes()
    current.unlink()
    server, stub, _, channel = await start(store)
    assert "omni rebuild" in server.releases.reason_not_ready
    with pytest.raises(grpc.RpcError) as unready:
        await stub.Retrieve(ask())
    assert unready.value.code() is grpc.StatusCode.UNAVAILABLE, "nobody listens yet"
    waiting = asyncio.ensure_future(stub.Retrieve(ask(), wait_for_ready=True, timeout=120))
    current.write_bytes(content[: len(content) // 2])
    await asyncio.sleep(0.2)
    assert server.releases.active is None
    current.write_bytes(content)
    await until_async(lambda: server.releases.active is not None)
    assert whole(await waiting), "a call that waits for ready is answered by the first release"
    assert whole(await stub.Retrieve(ask()))
    await channel.close()
    await server.stop(0)


async def test_create_server_port_in_use_is_refused_by_name(store: ReleaseStore) -> None:
    server, _, _, channel = await start(store)
    config = ServeConfig(releases=store.root, host="127.0.0.1", port=server.port, metrics_port=None)
    with pytest.raises(AddressInUse, match=f"cannot listen on 127.0.0.1:{server.port}.*--port"):
        await create_server(config)
    await channel.close()
    await server.stop(0)


async def test_tokens_guard_calls_and_entity_types(store: ReleaseStore, tmp_path: Path) -> None:
    def entry(name: str, extra: str) -> str:
        return (
            f'[[token]]\nname = "{name}"\nsha256 ='
            f' "{hashlib.sha256(name.encode()).hexdigest()}"\n{extra}\n'
        )

    (tmp_path / "tokens.toml").write_text(
        entry("web", 'entity_types = ["product"]') + entry("ops", "admin = true")
    )
    server, stub, admin, channel = await start(store, tokens=tmp_path / "tokens.toml")

    async def code(call, request, token: str | None) -> grpc.StatusCode:
        try:
            await call(request, metadata=(("authorization", f"Bearer {token}"),) if token else ())
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    assert await code(stub.Retrieve, ask(), None) is grpc.StatusCode.UNAUTHENTICATED
    assert await code(stub.Retrieve, ask(), "guess") is grpc.StatusCode.UNAUTHENTICATED
    assert await code(stub.Retrieve, ask(), "web") is grpc.StatusCode.PERMISSION_DENIED
    assert await code(stub.Retrieve, ask(), "ops") is grpc.StatusCode.OK
    assert (
        await code(admin.Activate, pb.ActivateRequest(release_id="a2"), "web")
        is grpc.StatusCode.PERMISSION_DENIED
    )
    assert (
        await code(admin.Activate, pb.ActivateRequest(release_id="a2"), "ops") is grpc.StatusCode.OK
    )
    await channel.close()
    await server.stop(0)


async def test_overload_is_refused_early_and_cancelled_calls_cost_nothing(
    store: ReleaseStore,
) -> None:
    import threading

    server, stub, _, channel = await start(store, max_in_flight=8, max_encode_queue=4)
    serving = server.releases.resolve("")
    gate, encode, encoded = threading.Event(), serving.encoding.encode, []

    def slow(texts):
        gate.wait(60)
        encoded.extend(texts)
        return encode(texts)

    serving.batcher._encode = slow
    first = asyncio.ensure_future(stub.Retrieve(ask("first words"), timeout=60))
    admission, batcher = server.service.admission, serving.batcher
    await until_async(lambda: admission.in_flight == 1 and not batcher.waiting)
    gone = asyncio.ensure_future(stub.Retrieve(ask("nobody waits for this")))
    await until_async(lambda: batcher.waiting == 1)
    calls = [
        asyncio.ensure_future(stub.Retrieve(ask(f"query number {i}"), timeout=60))
        for i in range(12)
    ]
    await until_async(lambda: batcher.waiting == 4 and admission.in_flight == 5)
    gone.cancel()
    # The client knows first. Once the server knows too, the first call and the three others that
    # found a place in the queue of four are left.
    await until_async(lambda: admission.in_flight == 4)
    gate.set()
    results = await asyncio.gather(first, *calls, return_exceptions=True)
    refused = [r for r in results if isinstance(r, grpc.RpcError)]
    assert refused and all(r.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for r in refused)
    assert all(int(dict(r.trailing_metadata())["retry-after-ms"]) >= 5 for r in refused)
    assert sum(not isinstance(r, BaseException) for r in results) >= 3
    assert "nobody waits for this" not in encoded
    assert server.service.admission.in_flight == 0
    assert whole(await stub.Retrieve(ask("afterwards")))
    await channel.close()
    await server.stop(0)


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
async def test_overload_refuses_searches_and_not_admin_calls(
    store: ReleaseStore, transport: str
) -> None:
    server, stub, admin, channel = await start(store, max_in_flight=4, transport=transport)
    service = server.service
    try:
        await stub.Retrieve(ask("red cat"))
        places = (service.admission, service.bulk_admission)
        for admission in places:
            admission.enter(4)  # as four requests inside would
        assert (await stub.Retrieve(ask("red cat"))).answer_cached
        error = await refused(stub.Retrieve(ask("green dog"), timeout=60))
        assert error.details().startswith("server: all 4 places are taken")
        assert int(dict(error.trailing_metadata())["retry-after-ms"]) >= 5
        target = pb.Target(entity_type="pin", k=3)
        await refused(
            stub.RetrieveBatch(
                pb.RetrieveBatchRequest(queries=["red cat"], target=target), timeout=30
            )
        )
        await refused(
            stub.RetrieveMulti(
                pb.RetrieveMultiRequest(query="red cat", targets=[target]), timeout=30
            )
        )
        await refused(stub.Embed(pb.EmbedRequest(queries=["red cat"]), timeout=60))
        assert (await stub.DescribeRelease(pb.DescribeReleaseRequest())).release_id == "a1"
        assert (
            await admin.Activate(pb.ActivateRequest(release_id="a2"), timeout=60)
        ).release_id == "a2"
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            await health.Check(health_pb2.HealthCheckRequest())
        ).status == health_pb2.HealthCheckResponse.SERVING
        assert [admission.refused for admission in places] == [2, 2]
        assert server.metrics.value("omni_refused") == 4
        assert server.metrics.value("omni_requests", ("Retrieve", "RESOURCE_EXHAUSTED")) == 1
        assert server.metrics.value("omni_requests", ("Embed", "RESOURCE_EXHAUSTED")) == 1
        for admission in places:
            admission.leave(4, 0.1)
        assert whole(await stub.Retrieve(ask("green dog"))), "it takes questions again at once"
    finally:
        await channel.close()
        await server.stop(0)


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
async def test_full_encoder_refuses_only_what_must_be_encoded_or_would_be_late(
    store: ReleaseStore, transport: str
) -> None:
    import threading

    server, stub, _, channel = await start(store, max_encode_queue=2, transport=transport)
    batcher = server.releases.resolve("").batcher
    gate, encode = threading.Event(), batcher._encode
    for _ in range(2):
        await stub.Retrieve(ask("red cat"))
    batcher._encode = lambda texts: gate.wait(60) and encode(texts)
    text_seconds, batcher._text_seconds = batcher._text_seconds, 1000.0
    try:
        inside = [asyncio.ensure_future(stub.Retrieve(ask("in the encoder"), timeout=60))]
        await until_async(lambda: server.service.admission.in_flight == 1 and not batcher.waiting)
        error = await refused(stub.Retrieve(ask("no hope in a minute"), timeout=60))
        assert error.details().startswith("query encoder (within your deadline)")
        batcher._text_seconds = text_seconds
        inside += [
            asyncio.ensure_future(stub.Retrieve(ask(f"waits {i}"), timeout=60)) for i in range(2)
        ]
        await until_async(lambda: batcher.waiting == 2)
        error = await refused(stub.Retrieve(ask("one more"), timeout=60))
        assert error.details().startswith(
            "query encoder: all 2 places"
        ) and "retry-after-ms" in dict(error.trailing_metadata())
        inside.append(
            asyncio.ensure_future(stub.Retrieve(ask(" waits 1 "), timeout=60))
        )  # joins the one that waits
        assert whole(await stub.Retrieve(ask("red cat"), timeout=60)), (
            "what is cached needs no encoder"
        )
        assert server.metrics.value("omni_requests", ("Retrieve", "RESOURCE_EXHAUSTED")) == 2
        await until_async(lambda: server.service.admission.in_flight == 4)
        gate.set()
        assert all(whole(answer) for answer in await asyncio.gather(*inside))
    finally:
        gate.set()
        await channel.close()
        await server.stop(0)


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    return caught.value


async def test_stop_lets_calls_in_flight_finish(store: ReleaseStore) -> None:
    server, stub, _, channel = await start(store)
    serving = server.releases.resolve("")
    encode = serving.encoding.encode

    def slow(texts):
        import time

        time.sleep(0.5)
        return encode(texts)

    serving.batcher._encode = slow
    call = asyncio.ensure_future(stub.Retrieve(ask("slow words"), timeout=60))
    await until_async(lambda: server.service.admission.in_flight == 1)
    await asyncio.gather(server.stop(60), call)
    assert whole(call.result())
    await channel.close()


def test_published_fixture_has_a_real_manifest(published: Path) -> None:
    manifest = json.loads((published / "releases" / "a1" / "manifest.json").read_text())
    assert manifest["entities"]["pin"]["count"] == 60


@pytest.mark.slow
async def test_retired_release_is_freed_without_the_garbage_collector(store: ReleaseStore) -> None:
    """Objects of start-up, the first release among them, are frozen: no cycle may hold it."""
    gc.collect()
    gc.disable()
    try:
        config = ServeConfig(
            releases=store.root,
            host="127.0.0.1",
            port=0,
            metrics_port=None,
            poll_seconds=0.05,
            shadow_fraction=0,
        )
        server = await create_server(config)
        freeze_start_up_objects(server.releases.on_change)
        await server.start()
        assert gc.get_freeze_count() > 10_000
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        stub = rpc.RetrievalStub(channel)
        for text in ("red cat", "a text nobody asked before"):
            assert whole(await stub.Retrieve(ask(text)))
        first = server.releases.active
        pins = first.entities["pin"]
        held = {
            "serving release": weakref.ref(first),
            "pins": weakref.ref(pins),
            "graph": weakref.ref(pins.ann),
            "encoder": weakref.ref(first.encoding),
        }
        del first, pins
        for release_id in ("a2", "b1"):
            store.activate(release_id)
            await until_async(
                lambda wanted=release_id: (
                    server.releases.active and server.releases.active.release_id == wanted
                )
            )
            assert whole(await stub.Retrieve(ask()))
        await until_async(lambda: not server.releases._retiring)
        assert not [name for name, reference in held.items() if reference() is not None]
        await channel.close()
        await server.stop(0)
    finally:
        gc.unfreeze()
        gc.enable()
