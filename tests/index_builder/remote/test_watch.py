"""A cache that follows a URL: what is active here stays, whatever happens there or to the disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from index_builder.building.build import build_release
from index_builder.errors import DiskFull, ReleaseError
from index_builder.releases.store import ReleaseStore
from index_builder.remote import watch
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.pull import pull_release
from index_builder.remote.push import push_release
from index_builder.remote.watch import RemoteFollower, claim_cache, read_status
from tests.helpers.release_makers import make_bundle, make_input, quick
from tests.helpers.waiting import until


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


@pytest.fixture
def follower(url: str, tmp_path: Path) -> RemoteFollower:
    claim_cache(tmp_path / "cache", url)
    return RemoteFollower(url, tmp_path / "cache", keep=2)


def start(
    url: str, cache: Path, limit: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "index_builder.remote.watch", url, str(cache), "0.1", "2"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=limit,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))


def test_follower_takes_changes_and_keeps_what_is_active_through_damage(
    store: ReleaseStore, url: str, follower: RemoteFollower, tmp_path: Path
) -> None:
    remote = ObjectStore(url)
    assert follower.look().error == "" and follower.store.current() is None
    push_release(store, "r0", remote)
    assert follower.look().error == "" and follower.store.current() == "r0"
    push_release(store, "r1", remote)
    whole = remote.get("releases/r1")
    remote.put("releases/r1", whole[:-1])
    assert "changed or cut" in follower.look().error
    assert follower.store.current() == "r0"
    remote.put("releases/r1", whole)
    assert follower.look().error == "" and follower.store.current() == "r1"
    follower.store.activate("r0")
    assert follower.look().error == "" and follower.store.current() == "r0", "only changes count"
    shutil.rmtree(tmp_path / "remote")
    status = follower.look()
    assert "moved or emptied" in status.error and status.reached > 0
    assert follower.store.current() == "r0"
    assert read_status(follower.store.root, url) == status


def test_follower_release_lost_from_the_cache_is_pulled_again(
    store: ReleaseStore, url: str, follower: RemoteFollower
) -> None:
    push_release(store, "r1", ObjectStore(url))
    follower.look()
    shutil.rmtree(follower.store.path_of("r1"))
    assert follower.look().error == "" and follower.store.verify("r1")
    (follower.store.releases / "CURRENT").write_bytes(b"{")
    assert follower.look().error == "" and follower.store.current() == "r1"


def test_follower_keeps_no_more_releases_than_told(
    store: ReleaseStore, url: str, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    build_release({"pin": make_input("pin", 50, seed=5)}, bundle, store, quick(release_id="r2"))
    follower = RemoteFollower(url, tmp_path / "cache", keep=1)
    for release_id in ("r0", "r1", "r2"):
        push_release(store, release_id, ObjectStore(url))
        follower.look()
    assert follower.store.ids() == ["r1", "r2"], "the active one and the one before it"


def test_follower_that_cannot_write_its_status_goes_on(
    store: ReleaseStore, url: str, follower: RemoteFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_release(store, "r0", ObjectStore(url))
    follower.look()

    def refuse(path: Path, content: bytes) -> None:
        raise DiskFull("no room", path)

    with monkeypatch.context() as patch:
        patch.setattr(watch, "write_durably", refuse)
        assert "DiskFull" in follower.look().error and follower.store.current() == "r0"
    assert follower.look().error == ""


def test_cache_of_another_url_or_a_store_is_refused(
    store: ReleaseStore, url: str, tmp_path: Path
) -> None:
    with pytest.raises(ReleaseError, match="is a store, not the cache"):
        claim_cache(store.root, url)
    for _ in range(2):
        claim_cache(tmp_path / "cache", url)
    with pytest.raises(ReleaseError, match="expected the cache of s3://a/b, but got that of file"):
        claim_cache(tmp_path / "cache", "s3://a/b")


def test_pull_leaves_no_room_to_a_pull_of_what_is_wanted_no_more(
    store: ReleaseStore, url: str, follower: RemoteFollower
) -> None:
    left = follower.store.staging("pull-r9")
    push_release(store, "r1", ObjectStore(url))
    pull_release(follower.store, ObjectStore(url))
    assert not left.exists()


@pytest.mark.slow
def test_watch_full_disk_keeps_what_is_active(
    store: ReleaseStore, url: str, follower: RemoteFollower
) -> None:
    push_release(store, "r0", ObjectStore(url))
    follower.look()
    push_release(store, "r1", ObjectStore(url))
    cache = follower.store.root
    process = start(url, cache, small_files_only)
    until(lambda: "DiskFull" in read_status(cache, url).error)
    end(process)
    assert follower.store.current() == "r0" and follower.store.verify("r0")
    assert follower.look().error == "" and follower.store.current() == "r1"


@pytest.mark.slow
def test_watch_twice_on_one_cache_pulls_each_release_once(
    store: ReleaseStore, url: str, follower: RemoteFollower
) -> None:
    cache = follower.store.root
    processes = [start(url, cache) for _ in range(2)]

    def is_active(release_id: str) -> bool:
        return follower.store.current() == release_id

    for release_id in ("r0", "r1", "r0"):
        push_release(store, release_id, ObjectStore(url))
        until(partial(is_active, release_id))
        assert read_status(cache, url).error == ""
    for process in processes:
        end(process)
    assert follower.store.ids() == ["r0", "r1"] and all(map(follower.store.verify, ("r0", "r1")))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_watch_killed_in_the_middle_of_a_pull_shows_nothing_half_and_goes_on(
    store: ReleaseStore, url: str, follower: RemoteFollower, tmp_path: Path
) -> None:
    push_release(store, "r0", ObjectStore(url))
    follower.look()
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "entity_encoder" / "more.bin").write_bytes(os.urandom(48 * 2**20))
    build_release({"pin": make_input("pin", 300)}, bundle, store, quick(release_id="r2"))
    push_release(store, "r2", ObjectStore(url))
    here = follower.store
    killed = 0
    for way in ("kill", "close", "kill"):
        process = start(url, here.root)
        until(
            lambda: list(here.releases.glob(".staging-pull-r2/**/*.part")) or here.current() == "r2"
        )
        if way == "kill":
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            end(process)
        killed += here.current() == "r0"
        assert here.current() in ("r0", "r2") and all(here.verify(name) for name in here.ids())
    assert killed, "a pull was under way"
    assert follower.look().error == "" and here.current() == "r2" and here.verify("r2")
