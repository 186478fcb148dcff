"""A newer query tower takes over the indexes that are served: only where it was declared, with
proof, and with a rollback.
"""

import asyncio
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.small_releases import WORDS, entity_texts, small_release, write_small_bundle
from encoders.compatibility.adapter import SpaceAdapter
from encoders.compatibility.declaration import FOLDER, declare
from encoders.errors import BundleError, ConfigError, SpaceMismatch
from encoders.towers.bundle import compute_space_id
from encoders.towers.query_tower import QueryEncoder
from index_builder.building.build import build_release
from index_builder.building.plan import RebuildConfig
from index_builder.building.query_upgrade import upgrade_query_tower
from index_builder.building.sources import from_release
from index_builder.commands.rebuild import command
from index_builder.errors import GateFailed, PublishError, ReleaseNotFound
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from tests.helpers.serving.real_server import start_server

COUNTS = {"pin": 300, "product": 120}
EASY = RebuildConfig(min_recall=0.5, golden_queries=8)
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(32, 32)))[0].astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one release, its bundle, and a newer bundle whose query tower is the old one
    turned.
    """
    root = tmp_path_factory.mktemp("upgrade")
    encoder = write_small_bundle(root / "old", 1)
    (root / "old" / "entity_encoder" / "weights.bin").write_bytes(b"entity weights")
    small_release(
        ReleaseStore(root / "store"), root / "old", encoder, release_id="first", counts=COUNTS
    )
    SpaceAdapter(TURN).fold(encoder).save(root / "new" / "query_encoder")
    shutil.copytree(root / "old" / "entity_encoder", root / "new" / "entity_encoder")
    shutil.copyfile(root / "old" / "config.json", root / "new" / "config.json")
    space = {"space_id": compute_space_id(root / "new"), "dimension": 32, "compatible": []}
    (root / "new" / "space.json").write_text(json.dumps(space))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> ReleaseStore:
    return ReleaseStore(root / "store")


def space_of(folder: Path) -> str:
    return str(json.loads((folder / "space.json").read_text())["space_id"])


def allow(root: Path) -> None:
    declare(
        root / "new",
        space_of(root / "old"),
        32,
        SpaceAdapter(TURN.T.copy()),
        {"pin": {"through": {"recall@10": 0.4}}},
    )


def test_upgrade_undeclared_tower_is_refused_and_nothing_is_published(
    root: Path, store: ReleaseStore
) -> None:
    with pytest.raises(SpaceMismatch, match="declares no compatibility"):
        upgrade_query_tower(store, root / "new", WORDS, EASY)
    assert store.ids() == ["first"] and store.current() == "first"
    assert not list(store.releases.glob(".staging-*"))


def test_upgrade_shares_the_indexes_and_changes_no_answer(root: Path, store: ReleaseStore) -> None:
    allow(root)
    upgraded = upgrade_query_tower(store, root / "new", WORDS, EASY)
    assert store.current() == upgraded.release_id != "first"
    store.verify(upgraded.release_id)
    before, after = store.path_of("first"), store.path_of(upgraded.release_id)
    vectors = next((before / "pin").glob("vectors*"))
    assert os.stat(vectors).st_ino == os.stat(after / "pin" / vectors.name).st_ino
    store.verify("first")  # what the new release wrote did not reach the old one through a link
    manifest = read_manifest(after)
    assert manifest.space_id == space_of(root / "old") and manifest.parent == "first"
    assert manifest.query_upgrade is not None and manifest.query_upgrade["space_id"] == space_of(
        root / "new"
    )
    assert manifest.entities["pin"].carried_from == "first"
    assert manifest.measured["peak_private_mib"] > 0
    tower = QueryEncoder.load(root / "new" / "query_encoder")
    with store.open("first") as old, store.open_current() as new:
        new.replay_golden()
        assert new.query_space_id == space_of(root / "new") and old.query_space_id == old.space_id
        assert new.query_vectors_id not in (old.query_vectors_id, new.query_space_id)
        texts = entity_texts(40, seed=0)
        adapted = QueryEncoder.load(new.query_encoder_path).encode(texts)
        np.testing.assert_allclose(adapted, tower.encode(texts) @ TURN, atol=1e-4)
        old_vectors = QueryEncoder.load(old.query_encoder_path).encode(texts)
        for mine, theirs in zip(adapted, old_vectors, strict=True):
            assert new.entity("pin").search(mine, 5).ids == old.entity("pin").search(theirs, 5).ids


def test_rebuild_of_an_upgraded_release_keeps_the_upgrade(root: Path, store: ReleaseStore) -> None:
    allow(root)
    first = upgrade_query_tower(store, root / "new", WORDS, EASY).release_id
    inputs, folder = from_release(store, ())
    again = build_release(inputs, folder, store, EASY)
    assert (
        read_manifest(store.path_of(again)).query_upgrade
        == read_manifest(store.path_of(first)).query_upgrade
    )
    inputs, _ = from_release(store, ("pin",))
    with pytest.raises(PublishError, match="another query tower"):
        build_release(inputs, root / "old", store, EASY)


def test_upgrade_that_cannot_be_proven_is_not_published(root: Path, store: ReleaseStore) -> None:
    allow(root)
    with pytest.raises(GateFailed):
        upgrade_query_tower(store, root / "new", WORDS, replace(EASY, min_recall=0.9999))
    adapter = next((root / "new" / FOLDER).iterdir())
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x07")
    with pytest.raises(BundleError, match="SHA-256"):
        upgrade_query_tower(store, root / "new", WORDS, EASY)
    with pytest.raises(ReleaseNotFound, match="no release is active"):
        upgrade_query_tower(ReleaseStore(root / "empty"), root / "new", WORDS, EASY)
    assert store.ids() == ["first"]


@pytest.mark.slow
def test_upgraded_answers_name_both_spaces_and_rollback_works(
    root: Path, store: ReleaseStore
) -> None:
    allow(root)
    upgraded = upgrade_query_tower(
        store, root / "new", WORDS, replace(EASY, activate=False)
    ).release_id
    text = entity_texts(10, seed=0)[3]

    async def ask() -> None:
        usual = {"metrics_port": None, "poll_seconds": 0.05, "shadow_fraction": 0}
        server = await start_server(store, **usual)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        retrieval, admin = rpc.RetrievalStub(channel), rpc.AdminStub(channel)
        request = pb.RetrieveRequest(query=text, entity_type="pin", k=5)
        old = await retrieval.Retrieve(request)
        assert old.query_space_id == ""
        await admin.Activate(pb.ActivateRequest(release_id=upgraded))
        for _ in range(2):  # encoded or prewarmed, then from the cache
            new = await retrieval.Retrieve(request)
            assert new.release_id == upgraded
            assert (new.space_id, new.query_space_id) == (
                space_of(root / "old"),
                space_of(root / "new"),
            )
            assert [hit.id for hit in new.hits] == [hit.id for hit in old.hits]
        embedded = await retrieval.Embed(pb.EmbedRequest(queries=[text]))
        assert embedded.query_space_id == space_of(root / "new")
        ready = pb.RetrieveRequest(
            embedding=embedded.embeddings, space_id=embedded.space_id, entity_type="pin", k=5
        )
        assert [hit.id for hit in (await retrieval.Retrieve(ready)).hits] == [
            hit.id for hit in old.hits
        ]
        ready.space_id = space_of(
            root / "new"
        )  # vectors of the newer space itself went through no adapter
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await retrieval.Retrieve(ready)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        described = await retrieval.DescribeRelease(pb.DescribeReleaseRequest())
        assert described.query_space_id == space_of(root / "new")
        await admin.Rollback(pb.RollbackRequest())
        assert (await retrieval.Retrieve(request)).query_space_id == ""
        await channel.close()
        await server.stop()

    asyncio.run(ask())


def test_rebuild_command_shows_the_recall_before_the_switch(
    root: Path, store: ReleaseStore
) -> None:
    arguments = [
        "--store",
        str(store.root),
        "--query-tower",
        str(root / "new"),
        "--min-recall",
        "0.5",
    ]
    refused = CliRunner().invoke(command, arguments)
    assert refused.exit_code == 1 and "declares no compatibility" in " ".join(
        refused.output.split()
    )
    allow(root)
    planned = CliRunner().invoke(command, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and "0.4" in planned.output and store.ids() == ["first"]
    (root / "queries.txt").write_text("\n".join(WORDS))
    done = CliRunner().invoke(
        command, [*arguments, "--queries", str(root / "queries.txt"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert store.current() == json.loads(done.stdout)["release_id"] != "first"
    wrong = CliRunner().invoke(command, [*arguments, "--from-active"])
    assert wrong.exit_code == 2 and "leave --from-active out" in " ".join(wrong.output.split())


def test_upgrade_without_real_golden_queries_is_refused(root: Path, store: ReleaseStore) -> None:
    allow(root)
    inputs, folder = from_release(store, ())
    build_release(inputs, folder, store, EASY)  # without queries: perturbed entities stand in
    with pytest.raises(ConfigError, match="--queries"):
        upgrade_query_tower(store, root / "new", (), EASY)
