"""Releases travel: whole or not at all, only what changed, every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.registry import _registry as remembered_classes

from encoders.errors import MissingDependency
from index_builder.building.build import build_release
from index_builder.commands import release as release_commands
from index_builder.errors import (
    PublisherBusy,
    ReleaseCorrupt,
    ReleaseNotFound,
    RemoteUnreachable,
)
from index_builder.releases.manifest import MANIFEST_NAME
from index_builder.releases.store import ReleaseStore
from index_builder.remote import push
from index_builder.remote.collection import collect_remote, list_remote
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.pull import pull_release
from index_builder.remote.push import push_release
from index_builder.remote.recipe import PACKS, RELEASES, Recipe, read_current
from tests.helpers.release_makers import make_bundle, make_input, quick
from tests.helpers.run_command import run
from tests.helpers.serving.s3_server import BUCKET, s3_server


@pytest.fixture
def remote(tmp_path: Path) -> ObjectStore:
    return ObjectStore(f"file://{tmp_path}/remote")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


def content_of(store: ReleaseStore, release_id: str) -> dict[str, bytes]:
    folder = store.path_of(release_id)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pack_path(remote: ObjectStore) -> Path:
    (name,) = remote.sizes(PACKS)
    return Path(remote.url.removeprefix("file://")) / PACKS / name


def test_pull_what_was_pushed_is_the_same_to_the_byte(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    pushed = push_release(store, "r1", remote)
    here = ReleaseStore(tmp_path / "here")
    pulled = pull_release(here, remote)
    assert content_of(here, "r1") == content_of(store, "r1")
    assert here.current() == "r1" and here.verify("r1").release_id == "r1"
    assert pulled.moved_bytes >= pushed.moved_bytes > 0
    again = pull_release(here, remote)
    assert again.moved_bytes == 0 and push_release(store, "r1", remote).moved_bytes == 0
    assert not list(here.releases.glob(".staging-*"))


def test_pull_next_release_moves_only_what_changed(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    here = ReleaseStore(tmp_path / "here")
    push_release(store, "r0", remote)
    pull_release(here, remote)
    sizes = {name: len(content) for name, content in content_of(store, "r1").items()}
    pushed = push_release(store, "r1", remote)
    pulled = pull_release(here, remote)
    of_pins = sum(size for name, size in sizes.items() if name.startswith("pin/"))
    assert 0 < pulled.moved_bytes <= pushed.moved_bytes <= of_pins + 8192, "ads are the same"
    assert content_of(here, "r1") == content_of(store, "r1") and here.current() == "r1"
    assert here.earlier() == ["r0"]


def test_pull_one_percent_of_rows_changed_moves_the_blocks_around_them(
    remote: ObjectStore, tmp_path: Path
) -> None:
    store, here = ReleaseStore(tmp_path / "store"), ReleaseStore(tmp_path / "here")
    bundle = make_bundle(tmp_path / "bundle")
    before = make_input("pin", 8000)
    vectors = before.vectors.copy()
    rows = random.Random(3).sample(range(8000), 80)
    vectors[rows] = -vectors[rows]
    for release_id, rows_of in (("r0", before.vectors), ("r1", vectors)):
        entities = {"pin": make_input("pin", 8000, vectors=rows_of)}
        build_release(entities, bundle, store, quick("exact", release_id=release_id))
        push_release(store, release_id, remote)
        moved = pull_release(here, remote)
    assert moved.total_bytes > 2**21
    assert moved.moved_bytes < 0.3 * moved.total_bytes, "16 rows of 256 bytes share a block"


def test_push_and_pull_without_activation_leave_what_is_active(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    here = ReleaseStore(tmp_path / "here")
    push_release(store, "r0", remote)
    push_release(store, "r1", remote, activate=False)
    current = read_current(remote)
    assert current is not None and current.release_id == "r0"
    pull_release(here, remote)
    pull_release(here, remote, "r1", activate=False)
    assert here.current() == "r0" and here.ids() == ["r0", "r1"]


def test_pull_damaged_pack_publishes_nothing(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    here = ReleaseStore(tmp_path / "here")
    push_release(store, "r1", remote)
    pack = pack_path(remote)
    whole = pack.read_bytes()
    for damaged in (whole[:99] + bytes([whole[99] ^ 1]) + whole[100:], whole[:-1]):
        pack.write_bytes(damaged)
        with pytest.raises(ReleaseCorrupt, match="push"):
            pull_release(here, remote)
        assert here.ids() == [] and here.current() is None
    pack.unlink()
    with pytest.raises(ReleaseCorrupt, match="gone"):
        pull_release(here, remote)
    pack.write_bytes(whole)
    pull_release(here, remote)
    assert content_of(here, "r1") == content_of(store, "r1")


def test_pull_damaged_recipe_or_current_is_refused(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    here = ReleaseStore(tmp_path / "here")
    push_release(store, "r1", remote)
    recipe = remote.get(f"{RELEASES}/r1")
    for place in range(0, len(recipe), len(recipe) // 40):
        remote.put(
            f"{RELEASES}/r1", recipe[:place] + bytes([recipe[place] ^ 1]) + recipe[place + 1 :]
        )
        with pytest.raises(ReleaseCorrupt):
            pull_release(here, remote)
    remote.put(f"{RELEASES}/r1", recipe)
    current = remote.get("CURRENT")
    remote.put("CURRENT", current.replace(b"r1", b"r0"))
    with pytest.raises(ReleaseCorrupt):
        pull_release(here, remote)
    assert here.ids() == []
    push_release(store, "r1", remote)  # naming it again repairs CURRENT
    assert pull_release(here, remote).release_id == "r1"


def test_pull_local_file_damaged_is_fetched_again(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    here = ReleaseStore(tmp_path / "here")
    push_release(store, "r0", remote)
    pull_release(here, remote)
    victim = here.path_of("r0") / "ad" / "vectors.npy"
    victim.write_bytes(b"\0" * victim.stat().st_size)
    push_release(store, "r1", remote)
    pull_release(here, remote)
    assert content_of(here, "r1") == content_of(store, "r1")


def test_push_same_id_with_other_content_is_refused(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    push_release(store, "r1", remote)
    other = ReleaseStore(tmp_path / "other")
    bundle = make_bundle(tmp_path / "bundle")
    build_release({"pin": make_input("pin", 30)}, bundle, other, quick(release_id="r1"))
    with pytest.raises(PublisherBusy, match="other content"):
        push_release(other, "r1", remote)
    with pytest.raises(PublisherBusy, match="other content"):
        pull_release(other, remote)


def test_pull_nothing_there_says_so(remote: ObjectStore, tmp_path: Path) -> None:
    here = ReleaseStore(tmp_path / "here")
    with pytest.raises(ReleaseNotFound, match="push one"):
        pull_release(here, remote)
    with pytest.raises(ReleaseNotFound, match="no release 'r9'"):
        pull_release(here, remote, "r9")


def test_push_of_several_packs_pulls_whole(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "PACK_BYTES", 10_000)
    push_release(store, "r0", remote)
    push_release(store, "r1", remote)
    assert len(remote.sizes(PACKS)) > 5
    here = ReleaseStore(tmp_path / "here")
    pull_release(here, remote)
    assert content_of(here, "r1") == content_of(store, "r1")


def test_collect_remote_packs_in_use_stay_and_others_wait_for_a_day(
    store: ReleaseStore, remote: ObjectStore, tmp_path: Path
) -> None:
    for release_id in ("r0", "r1"):
        push_release(store, release_id, remote)
    bundle = make_bundle(tmp_path / "bundle")
    build_release({"pin": make_input("pin", 50, seed=5)}, bundle, store, quick(release_id="r2"))
    push_release(store, "r2", remote)
    before = remote.sizes(PACKS)
    dry = collect_remote(remote, 1, dry_run=True, grace_seconds=0)
    assert dry.releases == ("r0",) and remote.sizes(PACKS) == before
    first = collect_remote(remote, 1)
    assert first.releases == ("r0",), "r1 was active before"
    assert first.packs == () and remote.sizes(PACKS) == before
    assert [summary.release_id for summary in list_remote(remote)] == ["r1", "r2"]
    collect_remote(remote, 1, grace_seconds=0)
    here = ReleaseStore(tmp_path / "here")
    for release_id in ("r1", "r2"):
        pull_release(here, remote, release_id)
        assert content_of(here, release_id) == content_of(store, release_id)


def test_collect_remote_unused_packs_go_after_the_grace(
    store: ReleaseStore, remote: ObjectStore
) -> None:
    push_release(store, "r1", remote)
    remote.put(f"{PACKS}/{'0' * 64}", b"of a push that was killed")
    assert collect_remote(remote, 1).waiting_packs == 1
    assert collect_remote(remote, 1).packs == (), "the grace runs"
    noted = json.loads(remote.get("garbage"))
    remote.put("garbage", json.dumps({name: time.time() - 90_000 for name in noted}).encode())
    done = collect_remote(remote, 1)
    assert done.packs == ("0" * 64,) and done.freed_bytes == 25
    assert len(remote.sizes(PACKS)) == 1 and json.loads(remote.get("garbage")) == {}


def test_recipe_written_is_read_back(store: ReleaseStore, remote: ObjectStore) -> None:
    push_release(store, "r1", remote)
    content = remote.get(f"{RELEASES}/r1")
    assert Recipe.from_bytes(content, "here").to_bytes() == content


def test_commands_push_pull_list_and_gc_of_a_url(store: ReleaseStore, tmp_path: Path) -> None:
    url, here = f"file://{tmp_path}/remote", tmp_path / "here"
    group = release_commands.group
    pushed = json.loads(run(group, "push", url, "--store", store.root, "--json").stdout)
    assert (pushed["release_id"], pushed["active"]) == ("r1", True)
    assert "r1: 0.0 of" in run(group, "push", url, "--store", store.root).stdout
    result = run(group, "pull", url, "--store", here)
    assert (result.exit_code, "MiB moved; active" in result.stdout) == (0, True), result.output
    listed = json.loads(run(group, "list", "--store", url, "--json").stdout)
    assert [(s["release_id"], s["active"]) for s in listed] == [("r1", True)]
    collected = json.loads(run(group, "gc", "--store", url, "--json").stdout)
    assert (collected["removed"], collected["packs"]) == ([], 0)
    refused = run(group, "gc", "--store", url, "--drop-folded-log")
    assert refused.exit_code == 2 and "no live log" in refused.output
    no_folder = run(group, "verify", "--store", url)
    assert no_folder.exit_code == 2 and "omni release pull" in no_folder.output
    unknown = run(group, "pull", "gopher://nowhere", "--store", here)
    assert unknown.exit_code == 1 and "unknown kind" in unknown.output


def test_store_without_network_is_one_typed_error(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, remote: ObjectStore
) -> None:
    def refuse(*arguments: object, **options: object) -> bytes:
        raise TimeoutError("no route")

    monkeypatch.setattr(remote._files, "cat_file", refuse)
    with pytest.raises(RemoteUnreachable, match="What is active stays"):
        pull_release(store, remote)
    assert store.current() == "r1"


@pytest.mark.parametrize(
    ("module", "url", "wanted"),
    [
        ("fsspec", "file:///tmp/x", "'fsspec'.*omnisearchsage\\[remote\\]"),
        ("s3fs", "s3://bucket/x", "'s3fs'.*omnisearchsage\\[remote\\]"),
        ("gcsfs", "gs://bucket/x", "gs://bucket/x: .*gcsfs"),
    ],
)
def test_store_without_its_library_names_it(
    module: str, url: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    # fsspec remembers the classes that another test of this process has used.
    monkeypatch.delitem(remembered_classes, url.partition(":")[0], raising=False)
    with pytest.raises((MissingDependency, RemoteUnreachable), match=wanted):
        ObjectStore(url)


@pytest.mark.slow
def test_s3_push_and_pull_are_the_same_to_the_byte(
    s3: str, store: ReleaseStore, tmp_path: Path
) -> None:
    remote = ObjectStore(f"s3://{BUCKET}/same")
    here = ReleaseStore(tmp_path / "here")
    for release_id in ("r0", "r1"):
        push_release(store, release_id, remote)
        pull_release(here, remote)
        assert content_of(here, release_id) == content_of(store, release_id)
    assert [summary.release_id for summary in list_remote(remote)] == ["r0", "r1"]
    with pytest.raises(ReleaseNotFound):
        pull_release(here, ObjectStore(f"s3://{BUCKET}/elsewhere"))
    with pytest.raises(RemoteUnreachable):
        push_release(store, "r1", ObjectStore("s3://no-such-bucket/x"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_s3_killed_at_random_moments_nothing_is_half_visible(s3: str, tmp_path: Path) -> None:
    """Push and pull are killed -9; run again, they end with every byte right."""
    store = ReleaseStore(tmp_path / "store")
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "entity_encoder" / "more.bin").write_bytes(os.urandom(24 * 2**20))
    build_release({"pin": make_input("pin", 300)}, bundle, store, quick(release_id="r0"))
    url = f"s3://{BUCKET}/killed"
    dice = random.Random(5)
    here = ReleaseStore(tmp_path / "here")
    for command, target in (("push", store), ("pull", here)):
        killed = 0
        for _ in range(3):
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "index_builder", "release", command, url),
                    *("--store", str(target.root)),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(dice.uniform(1.5, 4.0))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
            if command == "pull":
                assert here.current() in (None, "r0") and all(here.verify(x) for x in here.ids())
        remote = ObjectStore(url)
        if command == "push":
            push_release(store, "r0", remote)
        else:
            pull_release(here, remote)
    assert content_of(here, "r0") == content_of(store, "r0")
    manifest = (here.path_of("r0") / MANIFEST_NAME).read_bytes()
    current = here.current_record()
    assert current is not None
    assert current.manifest_sha256 == hashlib.sha256(manifest).hexdigest()
