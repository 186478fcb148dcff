"""Releases: whole or refused, published at once, rolled back, collected only when nobody needs
them.
"""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import OmniError
from index_builder.building.build import build_release
from index_builder.building.sources import scratch_folder
from index_builder.errors import (
    NotWritable,
    PublisherBusy,
    PublishError,
    ReleaseCorrupt,
    ReleaseError,
    ReleaseNotFound,
    ReleaseVersionError,
    UnsupportedCpu,
)
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.diff import describe_release, diff_releases
from index_builder.releases.manifest import MANIFEST_NAME, Manifest
from index_builder.releases.release import Release, read_manifest
from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from index_builder.releases.verification import check_cpu
from retrieval.releases.manager import previous_release
from tests.helpers.child_process import ending_in_child
from tests.helpers.release_makers import SPACE, make_bundle, make_input, quick, unit_vectors


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three releases, the third active."""
    root = tmp_path_factory.mktemp("built")
    bundle, store = make_bundle(root / "bundle"), ReleaseStore(root / "store")
    for number, kind in enumerate(("hnsw", "int8-graph", "hnsw")):
        count = 2200 if kind == "int8-graph" else 300
        build_release(
            {"pin": make_input("pin", count, seed=number), "ad": make_input("ad", 20, seed=9)},
            bundle,
            store,
            quick(kind, release_id=f"r{number + 1}"),
        )
    return root


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Iterator[ReleaseStore]:
    shutil.copytree(built, tmp_path / "copy")
    yield ReleaseStore(tmp_path / "copy" / "store")


def test_release_active_opens_answers_and_replays(store: ReleaseStore) -> None:
    assert store.current() == "r3"
    with store.open_current() as release:
        assert (release.release_id, release.space_id, release.dimension) == ("r3", SPACE, 64)
        assert release.query_encoder_path.joinpath("weights.bin").is_file()
        replayed = release.replay_golden()
        assert {name: r.queries for name, r in replayed.items()} == {"pin": 8, "ad": 8}
        query = unit_vectors(300, 2)[7]
        assert release.entity("pin").search(query, 3).ids[0] == "pin-7"


def test_manifest_lists_every_file_with_checksum(store: ReleaseStore) -> None:
    path = store.path_of("r2")
    manifest = read_manifest(path)
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {
        MANIFEST_NAME
    }
    assert set(manifest.files) == on_disk
    for name, record in manifest.files.items():
        content = (path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            record.size_bytes,
            record.sha256,
        )


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_open_damaged_release_raises_typed_error(built: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = ReleaseStore(built / "store")
    path = store.path_of(rng.choice(["r1", "r2"]))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    victim, other = rng.sample(files, 2)
    content, other_content = victim.read_bytes(), other.read_bytes()
    try:
        kind = rng.choice(["flip", "cut", "swap", "remove", "extra"])
        if kind == "flip":
            changed = bytearray(content)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            victim.write_bytes(bytes(changed))
        elif kind == "cut":
            victim.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "swap" and content != other_content:
            victim.write_bytes(other_content)
            other.write_bytes(content)
        elif kind == "remove":
            victim.unlink()
        else:
            (path / "extra.bin").write_bytes(b"x")
        with pytest.raises(ReleaseError):
            Release.open(path)
        assert store.current() == "r3"
        store.verify("r3")
        with pytest.raises(ReleaseError):
            store.activate(path.name)
        assert store.current() == "r3"
    finally:
        victim.write_bytes(content)
        other.write_bytes(other_content)
        (path / "extra.bin").unlink(missing_ok=True)
    store.verify(path.name)


def test_open_swapped_files_are_refused(store: ReleaseStore) -> None:
    one, other = store.path_of("r1"), store.path_of("r3")
    shutil.copyfile(one / "pin" / "index.hnsw", other / "pin" / "index.hnsw")
    with pytest.raises(ReleaseCorrupt, match=r"index.hnsw"):
        store.open_current()
    shutil.rmtree(other)
    shutil.copytree(one, other)  # a whole release under another's name
    with pytest.raises(ReleaseCorrupt, match="belongs to 'r1'"):
        store.open_current()


def test_open_current_rewritten_manifest_is_refused(
    store: ReleaseStore,
) -> None:
    path = store.path_of("r3")
    forged = replace(read_manifest(path), space_id="00" * 32)
    (path / MANIFEST_NAME).write_bytes(forged.to_bytes())
    with pytest.raises(ReleaseCorrupt, match="not the one that was activated"):
        store.open_current()


def test_open_release_with_link_is_refused(store: ReleaseStore) -> None:
    path = store.path_of("r3") / "pin" / "golden.parquet"
    shutil.copyfile(path, store.root / "elsewhere")
    path.unlink()
    path.symlink_to(store.root / "elsewhere")
    with pytest.raises(ReleaseCorrupt, match="link"):
        store.open_current()


def test_open_manifest_pointing_outside_is_refused(store: ReleaseStore) -> None:
    path = store.path_of("r1")
    manifest = read_manifest(path)
    forged = replace(
        manifest, files={**manifest.files, "../../secret": next(iter(manifest.files.values()))}
    )
    (path / MANIFEST_NAME).write_bytes(forged.to_bytes())
    with pytest.raises(ReleaseCorrupt, match="not a plain path"):
        store.open("r1")


def test_open_newer_format_is_refused_by_version(store: ReleaseStore) -> None:
    path = store.path_of("r3")
    (path / MANIFEST_NAME).write_bytes(replace(read_manifest(path), format_version=2).to_bytes())
    with pytest.raises(ReleaseVersionError, match="format 1, but the release is format 2"):
        store.open("r3")


@pytest.mark.slow
def test_open_missing_cpu_features_are_named(store: ReleaseStore) -> None:
    inputs, bundle = {"pin": make_input("pin", 2200)}, store.root.parent / "bundle"
    build_release(inputs, bundle, store, quick("symqg", release_id="r4"))
    manifest = read_manifest(store.path_of("r4"))
    assert "avx2" in manifest.entities["pin"].cpu_features
    with pytest.raises(UnsupportedCpu, match="avx2"):
        check_cpu(manifest, frozenset({"sse2"}))
    check_cpu(manifest, frozenset({"avx2", "fma"}))


def test_rollback_repeated_goes_back_one_at_a_time(store: ReleaseStore) -> None:
    assert store.rollback() == "r2"
    assert store.rollback() == "r1"
    with pytest.raises(ReleaseNotFound, match="no earlier release"):
        store.rollback()
    assert store.activate("r3") == "r1"
    assert store.rollback() == "r1"


@pytest.mark.parametrize("content", [b"", b"r3", b"{}", b'{"release_id": "r1"}'])
def test_current_damaged_is_refused_until_activated_again(
    store: ReleaseStore, content: bytes
) -> None:
    (store.releases / CURRENT_NAME).write_bytes(content)
    with pytest.raises(ReleaseCorrupt, match="omni release activate"):
        store.current()
    assert len(store.list()) == 3
    store.activate("r2")
    assert store.current() == "r2"


@settings(max_examples=40, deadline=None)
@given(position=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_current_any_flipped_bit_is_refused(built: Path, position: float, bit: int) -> None:
    store = ReleaseStore(built / "store")
    path = store.releases / CURRENT_NAME
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(position * len(content))] ^= 1 << bit
    try:
        path.write_bytes(bytes(changed))
        with pytest.raises(ReleaseCorrupt):
            store.current()
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("release_id", ["", "..", "../r1", "a/b", ".hidden", "x" * 200, "a\n"])
def test_check_release_id_impossible_folder_is_refused(
    store: ReleaseStore, release_id: str
) -> None:
    with pytest.raises(ReleaseError, match="release id"):
        store.open(release_id)


def test_current_damaged_and_activated_again_knows_its_history(store: ReleaseStore) -> None:
    (store.releases / CURRENT_NAME).write_bytes(b"{}")
    store.activate("r3")
    assert store.earlier() == ["r2", "r1"]
    assert store.rollback() == "r2"


def test_ids_release_published_after_clock_was_set_back_is_the_newest(store: ReleaseStore) -> None:
    publish_copy(store, "r0-late", created="2001-01-01T00:00:00.000+00:00", activate=False)
    assert store.ids() == ["r1", "r2", "r3", "r0-late"]
    assert list(store.gc(keep=1)) == ["r1"]  # r3 is active, r2 its predecessor
    publish_copy(store, "r5", created="1999-01-01T00:00:00.000+00:00")
    assert store.ids()[-1] == "r5"


def test_ids_releases_of_before_the_counter_come_first_by_time(store: ReleaseStore) -> None:
    for name, created in (("r3", "2020-01-01"), ("r1", "2021-01-01")):
        path = store.path_of(name) / MANIFEST_NAME
        manifest = read_manifest(store.path_of(name))
        path.write_bytes(replace(manifest, measured={"created": created}).to_bytes())
    assert store.ids() == ["r3", "r1", "r2"]


def publish_copy(
    store: ReleaseStore, release_id: str, *, created: str = "2026-01-01", activate: bool = True
) -> None:
    """Publish the files of ``r3`` under another id."""
    staging = store.staging(release_id) / "content"
    shutil.copytree(store.path_of("r3"), staging, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    manifest = read_manifest(store.path_of("r3"))
    measured = {**manifest.measured, "created": created}
    new = replace(manifest, release_id=release_id, parent=store.current(), measured=measured)
    store.publish(staging, new, activate=activate)


def test_rollback_target_is_what_every_part_goes_by(store: ReleaseStore) -> None:
    (store.path_of("r2") / MANIFEST_NAME).unlink()
    assert store.earlier() == ["r1"]
    assert store.rollback_target() == previous_release(store) == "r1"
    with pytest.raises(PublishError, match="to r1 now"):
        store.rollback(to="r2")
    assert store.current() == "r3"
    assert list(store.gc(keep=1)) == []
    assert store.rollback(to="r1") == "r1"


@pytest.mark.parametrize("name", ["../pin", "a/b", "", ".", "pin\n", "x" * 65])
def test_manifest_entity_type_that_is_no_folder_name_is_refused(
    store: ReleaseStore, name: str
) -> None:
    path = store.path_of("r1")
    manifest = read_manifest(path)
    forged = replace(manifest, entities={name: manifest.entities["pin"]})
    (path / MANIFEST_NAME).write_bytes(forged.to_bytes())
    with pytest.raises(ReleaseCorrupt, match="entity type"):
        store.open("r1")


def test_open_unknown_release_is_not_found(store: ReleaseStore) -> None:
    with pytest.raises(ReleaseNotFound, match="no release at"):
        store.open("nope")
    with pytest.raises(ReleaseNotFound):
        store.activate("nope")
    with pytest.raises(ReleaseNotFound, match="no release is active"):
        ReleaseStore(store.root / "empty").open_current()


def test_gc_keeps_active_predecessor_and_open_releases(store: ReleaseStore) -> None:
    store.activate("r1")
    held = store.open("r2")
    assert list(store.gc(keep=1)) == []  # r1 active, r3 newest and predecessor, r2 open
    held.close()
    assert list(store.gc(keep=1, dry_run=True)) == ["r2"]
    assert list(store.gc(keep=1)) == ["r2"]
    assert store.ids() == ["r1", "r3"]
    store.open_current().close()
    with pytest.raises(ReleaseError, match="at least 1"):
        store.gc(keep=0)


def test_gc_removes_leftovers_but_no_running_build(store: ReleaseStore) -> None:
    staging = store.staging("dead")
    (store.releases / ".trash-old").mkdir()
    with store.lock("build"):
        child = os.fork()
        if child == 0:
            store.gc()
            os._exit(0)
        os.waitpid(child, 0)
        assert staging.exists()
    store.gc()
    assert not staging.exists()
    assert not (store.releases / ".trash-old").exists()


def test_gc_after_killed_gc_finishes_despite_republished_id(
    store: ReleaseStore,
) -> None:
    """A deterministic rebuild gives an id again, whose former folder a killed gc has moved away."""
    shutil.copytree(store.path_of("r1"), store.releases / ".trash-r1")
    assert list(store.gc(keep=1, dry_run=True)) == ["r1"]
    assert (store.releases / ".trash-r1").exists()
    assert list(store.gc(keep=1)) == ["r1"]
    assert not list(store.releases.glob(".trash-*"))
    assert store.ids() == ["r2", "r3"]


def test_gc_linked_release_loses_its_link_only(store: ReleaseStore, tmp_path: Path) -> None:
    os.rename(store.path_of("r1"), tmp_path / "r1")
    store.path_of("r1").symlink_to(tmp_path / "r1")
    assert list(store.gc(keep=1)) == ["r1"]
    assert list(store.gc(keep=1)) == []
    assert (tmp_path / "r1" / MANIFEST_NAME).is_file()
    assert not list(store.releases.glob(".trash-*"))


def test_gc_entry_that_cannot_be_removed_holds_nothing_else_up(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (store.releases / ".trash-stuck").mkdir()
    (store.releases / ".trash-old").mkdir()
    staging = store.staging("dead")
    remove = shutil.rmtree

    def stuck(path: Path, *rest: object, **options: object) -> None:
        if path.name in (".trash-stuck", ".trash-r1"):
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *rest, **options)  # type: ignore[arg-type]

    publish_copy(store, "r4")
    monkeypatch.setattr(shutil, "rmtree", stuck)
    assert list(store.gc(keep=1)) == ["r1", "r2"]
    assert not staging.exists()
    left = sorted(path.name for path in store.releases.glob(".trash-*"))
    assert left == [".trash-r1", ".trash-stuck"]
    assert "could not be removed" in caplog.text
    assert list(store.gc(keep=1)) == []


def test_gc_damaged_release_keeps_the_whole_live_log(store: ReleaseStore) -> None:
    (store.path_of("r1") / MANIFEST_NAME).write_bytes(b"{}")
    with LiveLogWriter(store.live_root, "pin", 64, file_bytes=1) as writer:
        for number in range(3):
            writer.write([LiveEntry(id=f"n{number}")])
    files = sorted((store.live_root / "pin").glob("log-*.bin"))
    store.gc(keep=3, drop_folded_log=True)
    assert sorted((store.live_root / "pin").glob("log-*.bin")) == files


def become_other_user() -> None:
    """Go on as a user without rights."""
    os.setgroups([])
    os.setgid(4242)
    os.setuid(4242)


def make_reachable(folder: Path) -> None:
    """Let other users pass the folders on the way: pytest's are private."""
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)


def share(folder: Path) -> None:
    """Give a tree to the other user's group, as the error message advises."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, 4242)
        path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@needs_root
def test_store_another_users_is_refused_with_a_typed_error(store: ReleaseStore) -> None:
    make_reachable(store.root)
    for action in (
        lambda: store.activate("r1"),
        store.rollback,
        store.gc,
        lambda: LiveLogWriter(store.live_root, "pin", 64),
        lambda: scratch_folder(store).__enter__(),
    ):
        assert ending_in_child(become_other_user, action).startswith("NotWritable: "), action
    assert store.current() == "r3"


@needs_root
def test_store_shared_with_a_group_works_for_its_members(store: ReleaseStore) -> None:
    make_reachable(store.root)
    share(store.root)
    os.umask(0o022)
    with store.lock("publish"), LiveLogWriter(store.live_root, "pin", 64) as writer:
        writer.write([LiveEntry(id="mine")])

    def work() -> None:
        os.umask(0o022)
        store.activate("r1")
        with LiveLogWriter(store.live_root, "pin", 64) as theirs:
            theirs.write([LiveEntry(id="theirs")])
        with scratch_folder(store) as scratch:
            (scratch / "pin.f32").write_bytes(b"x")

    assert ending_in_child(become_other_user, work) == "done"
    assert store.activate("r2") == "r1"
    with LiveLogWriter(store.live_root, "pin", 64) as writer:
        assert writer.write([LiveEntry(id="again")]) == 3


def test_gc_on_a_file_system_that_locks_by_write_access_removes_releases(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks exclusively only what is open for writing; nothing is written to a manifest."""
    flock = fcntl.flock

    def as_on_nfs(descriptor: int, kind: int) -> None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if kind & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    manifest = store.path_of("r1") / MANIFEST_NAME
    content = manifest.read_bytes()
    assert list(store.gc(keep=1, dry_run=True)) == ["r1"]
    assert manifest.read_bytes() == content
    assert list(store.gc(keep=1)) == ["r1"]


def test_store_on_a_file_system_without_locks_says_so(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with store.open("r1"):
        assert "r1 is open without a lock" in caplog.text
        assert "file system of the store must hold locks" in caplog.text
    with pytest.raises(NotWritable, match="must hold locks"):
        store.gc()


@needs_root
def test_gc_leaves_what_a_user_who_may_only_read_has_open(store: ReleaseStore) -> None:
    make_reachable(store.root)
    store.activate("r3")
    opened, close = os.pipe(), os.pipe()

    def hold() -> None:
        lease = store._leased("r1")  # `open` would wait for polars' threads, which a fork loses
        os.write(opened[1], b"x" if lease is not None else b"-")
        os.read(close[0], 1)

    child = os.fork()
    if child == 0:
        become_other_user()
        try:
            hold()
        finally:
            os._exit(0)
    os.close(opened[1])
    assert os.read(opened[0], 1) == b"x"
    assert list(store.gc(keep=1)) == []
    os.write(close[1], b"x")
    os.waitpid(child, 0)
    assert list(store.gc(keep=1)) == ["r1"]


def test_list_release_without_manifest_is_damaged(store: ReleaseStore) -> None:
    (store.path_of("r1") / MANIFEST_NAME).unlink()
    (store.path_of("r3") / MANIFEST_NAME).unlink()
    listed = {s.release_id: s for s in store.list()}
    assert {name for name, s in listed.items() if s.error} == {"r1", "r3"}
    assert listed["r3"].active
    assert MANIFEST_NAME in str(listed["r3"].error)
    shutil.rmtree(store.path_of("r3"))
    assert store.damaged_ids() == ["r1", "r3"]
    assert store.ids() == ["r2"]


def _hold(store: ReleaseStore, ready: object, done: object) -> None:
    with store.lock("build"):
        ready.set()
        done.wait(30)


def test_build_second_in_same_store_is_refused(store: ReleaseStore) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(store, ready, done))
    process.start()
    assert ready.wait(30)
    bundle = store.root.parent / "bundle"
    with pytest.raises(PublisherBusy, match=str(process.pid)):
        build_release(
            {"pin": make_input("pin"), "ad": make_input("ad", 20)}, bundle, store, quick()
        )
    assert store.current() == "r3"
    done.set()
    process.join()


def test_publish_partial_after_parent_changed_is_refused(store: ReleaseStore) -> None:
    staging = store.staging("partial") / "content"
    shutil.copytree(store.path_of("r3"), staging, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    manifest = replace(read_manifest(store.path_of("r3")), release_id="r4", parent="r3")
    store.activate("r1")
    with pytest.raises(PublishError, match="r1 became active meanwhile"):
        store.publish(staging, manifest, require_parent=True)
    assert store.ids() == ["r1", "r2", "r3"]


def test_publish_other_content_under_taken_id_is_refused(store: ReleaseStore) -> None:
    bundle = store.root.parent / "bundle"
    with pytest.raises(PublisherBusy, match="other content"):
        build_release(
            {"pin": make_input("pin", 50, seed=5), "ad": make_input("ad", 20)},
            bundle,
            store,
            quick(release_id="r1"),
        )


def test_list_damaged_release_shows_its_error(store: ReleaseStore) -> None:
    (store.path_of("r1") / MANIFEST_NAME).write_bytes(b"{}")
    listed = {s.release_id: s for s in store.list()}
    assert listed["r1"].error
    assert listed["r3"].active
    assert listed["r2"].entities == {"ad": 20, "pin": 2200}


def test_diff_releases_names_changes_and_overlap(store: ReleaseStore) -> None:
    result = diff_releases(store, "r1", "r2")
    assert result["same_space"]
    pin = result["entities"]["pin"]
    assert pin["added"]["count"] == 1900
    assert pin["removed"]["count"] == 0
    assert pin["golden"]["overlap_at_10"] < 0.5
    assert result["entities"]["ad"]["golden"] == {
        "queries": 8,
        "overlap_at_10": 1.0,
        "same_first_answer": 1.0,
        "score_drift_mean": 0.0,
        "score_drift_max": 0.0,
    }
    json.dumps(describe_release(store, "r2"))


@pytest.mark.slow
def test_store_many_processes_at_once_stays_whole(store: ReleaseStore) -> None:
    def publisher(number: int) -> None:
        for n in range(4):
            with store.lock("build", 30.0):
                staging = store.staging(f"{number}-{n}") / "content"
                shutil.copytree(
                    store.path_of("r3"), staging, ignore=shutil.ignore_patterns(MANIFEST_NAME)
                )
                store.publish(
                    staging,
                    replace(read_manifest(store.path_of("r3")), release_id=f"p{number}-{n}"),
                )

    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            try:
                publisher(number)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    opened = 0
    while children:
        current = store.current()
        assert current is not None
        store.verify(current)
        opened += 1
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            assert status == 0
            children.remove(child)
    assert opened > 0
    assert len(store.ids()) == 3 + 12
    assert len(store.current_record().history) == 14


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
        min_size=1,
        max_size=4,
    )
)
def test_manifest_any_unicode_round_trips(built: Path, names: list[str]) -> None:
    manifest = read_manifest(ReleaseStore(built / "store").path_of("r1"))
    changed = replace(manifest, measured={name: name for name in names})
    assert Manifest.from_bytes(changed.to_bytes(), "here") == changed


def test_errors_all_derive_from_one_root() -> None:
    for error in (ReleaseCorrupt, ReleaseNotFound, PublishError, PublisherBusy, UnsupportedCpu):
        assert issubclass(error, OmniError)
