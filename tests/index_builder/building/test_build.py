"""Rebuilding: bad input is named, live writes are folded in, interrupted builds are resumed, the
same input gives the same bytes.
"""

import os
import secrets
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from encoders.errors import (
    BundleError,
    ConfigError,
    InvalidVectors,
    MissingDependency,
    OmniError,
    SpaceMismatch,
)
from encoders.inference.signal_store import SignalStore
from index_builder.building import build as build_module
from index_builder.building.build import build_release
from index_builder.building.inputs import QuerySet
from index_builder.building.plan import estimate_mib, plan_release, read_bundle
from index_builder.building.sources import (
    from_release,
    from_signals,
    read_query_texts,
    scratch_folder,
)
from index_builder.errors import (
    DiskFull,
    DuplicateIds,
    GateFailed,
    LiveLogError,
    PublisherBusy,
    PublishError,
)
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.source_age import SourceAge
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.storage.durable_files import FileLock
from tests.helpers.release_makers import SPACE, D, make_bundle, make_input, quick, unit_vectors

OTHER = "0b" * 32


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "store")


def bad_row(row: int, value: float) -> np.ndarray:
    vectors = unit_vectors(30, 0)
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vectors": bad_row(7, np.nan)}, InvalidVectors, r"row 7 .*'pin-7'.*NaN"),
        ({"vectors": bad_row(7, np.inf)}, InvalidVectors, r"row 7"),
        ({"vectors": bad_row(7, 0.0)}, InvalidVectors, r"row 7 .*zeros"),
        ({"vectors": bad_row(7, 0.5)}, InvalidVectors, r"row 7 .*norm"),
        ({"vectors": unit_vectors(30, 0)[:, :32].copy()}, InvalidVectors, "64"),
        ({"vectors": unit_vectors(30, 0).astype(np.float64)}, InvalidVectors, "float64"),
        ({"vectors": unit_vectors(29, 0)}, InvalidVectors, "30 ids and 29 vectors"),
        ({"ids": ["same"] * 30}, DuplicateIds, "rows 0 and 1"),
        ({"ids": ["", *(f"p{i}" for i in range(29))]}, OmniError, "row 0"),
        ({"ids": ["e\u0301", *(f"p{i}" for i in range(29))]}, OmniError, "row 0"),
        ({"attributes": pl.DataFrame({"a": [1]})}, InvalidVectors, "1 rows for 30 ids"),
        ({"space_id": OTHER}, SpaceMismatch, OTHER[:16]),
    ],
)
def test_build_bad_input_is_named_and_not_published(
    bundle: Path, store: ReleaseStore, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_release({"pin": make_input("pin", 30, **changes)}, bundle, store, quick())
    assert store.ids() == []
    assert store.current() is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_build_tiny_corpus_answers(bundle: Path, store: ReleaseStore, count: int) -> None:
    build_release({"pin": make_input("pin", count)}, bundle, store, quick("auto"))
    with store.open_current() as release:
        release.replay_golden()
        assert len(release.entity("pin").search(unit_vectors(1, 1)[0], 10).ids) == count


def test_build_ids_of_any_unicode_come_back(bundle: Path, store: ReleaseStore) -> None:
    ids = ["日本語", "👩‍🚀", "a b\tc\n", "é", "\u202eright", "\x00zero", "'quote\"", "x" * 1000]
    build_release({"pin": make_input("pin", 8, ids=ids)}, bundle, store, quick())
    with store.open_current() as release:
        assert set(release.entity("pin").search(unit_vectors(1, 1)[0], 10).ids) == set(ids)


def test_build_folder_without_bundle_is_refused(tmp_path: Path, store: ReleaseStore) -> None:
    with pytest.raises(BundleError, match=r"space\.json"):
        build_release({"pin": make_input("pin", 10)}, tmp_path, store, quick())
    with pytest.raises(ConfigError, match="at least one entity type"):
        plan_release({}, read_bundle(make_bundle(tmp_path / "b")), store, quick())


def test_build_recall_below_gate_is_not_published(bundle: Path, store: ReleaseStore) -> None:
    with pytest.raises(
        GateFailed, match=r"below the target 1\.00.*--ef-construction.*more queries"
    ):
        build_release({"pin": make_input("pin", 300)}, bundle, store, quick(min_recall=0.9999))
    assert store.ids() == []


def test_build_partial_carries_others_unless_bundle_differs(
    tmp_path: Path, bundle: Path, store: ReleaseStore
) -> None:
    first = build_release(
        {"pin": make_input("pin"), "ad": make_input("ad", 20)}, bundle, store, quick()
    )
    second = build_release({"pin": make_input("pin", 100, seed=4)}, bundle, store, quick())
    manifest = read_manifest(store.path_of(second))
    assert manifest.entities["ad"].carried_from == first
    store.verify(second)
    assert {n: e.count for n, e in manifest.entities.items()} == {"ad": 20, "pin": 100}
    other = make_bundle(tmp_path / "other", OTHER)
    with pytest.raises(PublishError, match="rebuild ad with the new bundle"):
        build_release({"pin": make_input("pin", space=OTHER)}, other, store, quick())
    assert store.current() == second


@pytest.mark.slow
def test_build_deterministic_gives_same_files_and_id(tmp_path: Path, bundle: Path) -> None:
    inputs = {"pin": make_input("pin", 2500), "ad": make_input("ad", 20)}
    stores = [ReleaseStore(tmp_path / name) for name in ("one", "two")]
    ids = [build_release(inputs, bundle, s, quick("auto", deterministic=True)) for s in stores]
    assert ids[0] == ids[1]
    manifests = [read_manifest(s.path_of(ids[0])) for s in stores]
    assert manifests[0].files == manifests[1].files
    assert replace(manifests[0], measured={}) == replace(manifests[1], measured={})
    assert (
        build_release(inputs, bundle, stores[0], quick("auto", deterministic=True)) == ids[0]
    )  # publishing it again changes nothing
    assert stores[0].ids() == [ids[0]]


def test_build_with_live_log_equals_build_from_changed_input(
    tmp_path: Path, bundle: Path, store: ReleaseStore
) -> None:
    base = make_input("pin", 300)
    fresh = unit_vectors(3, 50)
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write(
            [
                LiveEntry(
                    id="pin-5",
                    vector=fresh[0],
                    space_id=SPACE,
                    attributes={"number": -1, "new": "x"},
                ),
                LiveEntry(id="pin-6"),
            ]
        )
        writer.write(
            [
                LiveEntry(id="zz", vector=fresh[1], space_id=SPACE),
                LiveEntry(id="zz", vector=fresh[2], space_id=SPACE),
            ]
        )
    build_release({"pin": base}, bundle, store, quick())
    with store.open_current() as release:
        index = release.entity("pin")
        assert release.manifest.entities["pin"].watermark == 4
        assert index.count == 300
        assert index.vector("pin-6") is None
        np.testing.assert_array_equal(index.vector("pin-5"), fresh[0])
        np.testing.assert_array_equal(index.vector("zz"), fresh[2])
        assert index.attributes(["pin-5", "pin-7", "zz"], ["number", "new", "colour"])[0] == {
            "number": -1,
            "new": "x",
            "colour": None,
        }


def test_build_foreign_live_entries_stop_it_unless_dropped(
    bundle: Path, store: ReleaseStore
) -> None:
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write([LiveEntry(id="alien", vector=unit_vectors(1, 0)[0], space_id=OTHER)])
    with pytest.raises(LiveLogError, match=r"alien.*--drop-foreign-live"):
        build_release({"pin": make_input("pin", 10)}, bundle, store, quick())
    build_release({"pin": make_input("pin", 10)}, bundle, store, quick(drop_foreign_live=True))
    assert store.open_current().entity("pin").vector("alien") is None


def test_build_from_active_release_folds_live_log(bundle: Path, store: ReleaseStore) -> None:
    build_release({"pin": make_input("pin", 300)}, bundle, store, quick())
    vector = unit_vectors(1, 8)[0]
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write(
            [
                LiveEntry(
                    id="n", vector=vector, space_id=SPACE, attributes={"number": 5, "colour": "red"}
                ),
                LiveEntry(id="pin-0"),
            ]
        )
    inputs, path = from_release(store, ())
    build_release(inputs, path, store, quick())
    with store.open_current() as release:
        assert release.manifest.entities["pin"].watermark == 2
        assert release.entity("pin").search(vector, 1, filter="colour == 'red'").ids == ["n"]
        assert release.entity("pin").vector("pin-0") is None
    assert list(store.gc(keep=1, drop_folded_log=True)) == []


def test_scratch_folder_is_nobody_elses_and_outlives_others(store: ReleaseStore) -> None:
    """Process ids repeat between containers: names and what is in use go by a held lock."""
    with scratch_folder(store) as mine:
        (mine / "pin.f32").write_bytes(b"x")
        child = os.fork()
        if child == 0:
            with scratch_folder(store) as other:
                (other / "left").write_bytes(b"x")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (store.root / ".input-1").mkdir()  # as an earlier version named it
        with scratch_folder(store) as other:
            assert other != mine
            assert sorted(p.name for p in store.root.glob(".input-*") if p.is_dir()) == sorted(
                (mine.name, other.name)
            )
        assert (mine / "pin.f32").is_file()
    assert not list(store.root.glob(".input-*"))


def test_scratch_folder_waits_for_who_takes_its_lock_for_an_abandoned_one(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.root.mkdir()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "new")
    other = FileLock(store.root / ".input-new.lock")
    assert other.acquire()

    def tidy_up() -> None:
        other.path.unlink()
        other.release()

    timer = threading.Timer(0.2, tidy_up)
    timer.start()
    with scratch_folder(store) as folder:
        assert not FileLock(other.path).acquire(), "the lock that has the name is held"
        assert folder.is_dir()
    timer.join()
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: False)
    with pytest.raises(PublisherBusy, match="tidying up"), scratch_folder(store):
        pass


def test_build_from_active_with_a_hole_in_the_log_is_refused(
    bundle: Path, store: ReleaseStore
) -> None:
    build_release({"pin": make_input("pin", 20)}, bundle, store, quick("exact"))
    vectors = unit_vectors(60, 3)
    with LiveLogWriter(store.live_root, "pin", D, file_bytes=8000) as writer:
        for number in range(60):
            writer.write([LiveEntry(id=f"n{number}", vector=vectors[number], space_id=SPACE)])
    files = sorted((store.live_root / "pin").glob("log-*.bin"))
    for victims in (files[:1], files[1:2], files[-1:], files):
        kept = {file: file.read_bytes() for file in victims}
        for file in victims:
            file.unlink()
        inputs, path = from_release(store, ())
        with pytest.raises(LiveLogError, match=r"gone|acknowledged"):
            build_release(inputs, path, store, quick("exact"))
        for file, content in kept.items():
            file.write_bytes(content)
    build_release(*from_release(store, ()), store, quick("exact"))
    with store.open_current() as release:
        assert release.entity("pin").count == 80


def test_build_catalogue_after_collected_log_says_what_it_cannot_know(
    bundle: Path, store: ReleaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    build_release({"pin": make_input("pin", 20)}, bundle, store, quick("exact"))
    with LiveLogWriter(store.live_root, "pin", D, file_bytes=1) as writer:
        for number in range(4):
            writer.write([LiveEntry(id=f"pin-{number}")])
    for release_id in ("r2", "r3"):  # the predecessor of the active one holds the writes, too
        build_release(*from_release(store, ()), store, quick("exact", release_id=release_id))
    store.gc(keep=1, drop_folded_log=True)
    newer = make_input("pin", 20, age=SourceAge(read_at=4))
    build_release({"pin": newer}, bundle, store, quick("exact"))
    assert "live writes 1 to 3 were collected" in caplog.text


def interrupt(monkeypatch: pytest.MonkeyPatch, step: str, entity_type: str) -> None:
    """Make one step (``build`` or ``load``) of an entity type's index raise KeyboardInterrupt."""
    original = getattr(EntityIndex, step)

    def interrupted(first: str | Path, *rest: Any, **options: Any) -> EntityIndex:
        if Path(first).name == entity_type:
            raise KeyboardInterrupt
        return original(first, *rest, **options)

    monkeypatch.setattr(EntityIndex, step, interrupted)


@pytest.mark.slow
def test_build_after_interruption_takes_over_what_was_finished(
    bundle: Path,
    store: ReleaseStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = {
        "ad": make_input("ad", 20),
        "pin": make_input("pin", 400),
        "product": make_input("product", 400, seed=3),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "load", "pin")
        build_release(inputs, bundle, store, quick())
    assert store.current() is None
    with caplog.at_level("INFO", "index_builder"):
        build_release(inputs, bundle, store, quick())
    assert [line for line in caplog.messages if "taken over" in line] == [
        "ad: finished by an earlier run, taken over"
    ]
    store.verify(store.current() or "")
    assert not list(store.releases.glob(".staging-*"))


def test_build_after_interruption_builds_a_damaged_part_again(
    bundle: Path,
    store: ReleaseStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = {"ad": make_input("ad", 20), "pin": make_input("pin", 400)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "build", "pin")
        build_release(inputs, bundle, store, quick())
    (victim,) = store.releases.glob(".staging-*/content/ad/vectors.npy")
    victim.write_bytes(victim.read_bytes()[:-4])
    with caplog.at_level("INFO", "index_builder"):
        build_release(inputs, bundle, store, quick())
    assert caplog.messages and not any("taken over" in line for line in caplog.messages)
    store.verify(store.current() or "")


@pytest.mark.slow
def test_store_killed_process_leaves_active_release_whole(
    bundle: Path, store: ReleaseStore
) -> None:
    first = build_release({"pin": make_input("pin", 300)}, bundle, store, quick())
    for delay in (0.01, 0.1, 0.3):
        child = os.fork()
        if child == 0:
            store.activate(first)
            while True:
                store.gc(keep=2)
                store.activate(first)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert store.current() == first
        store.verify(first)


@pytest.mark.slow
def test_memory_limit_chooses_smaller_kinds_or_refuses_with_figures(
    bundle: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        estimate_mib(IndexConfig(kind="symqg"), 10**6, 256)
        > estimate_mib(IndexConfig(kind="hnsw"), 10**6, 256)
        > estimate_mib(IndexConfig(kind="lean"), 10**6, 256)
    )
    inputs = {"pin": make_input("pin", 2500)}
    plan = plan_release(inputs, read_bundle(bundle), store, quick("auto", max_memory_mib=432))
    assert plan["build"]["pin"]["index"] in ("hnsw", "int8-graph")
    with pytest.raises(ConfigError, match="needs least"):
        plan_release(inputs, read_bundle(bundle), store, quick("symqg", max_memory_mib=70))
    waste: list[np.ndarray] = []
    original = EntityIndex.build

    def wasteful(*arguments: Any, **options: Any) -> EntityIndex:
        waste.append(np.ones(60_000_000))
        return original(*arguments, **options)

    monkeypatch.setattr(EntityIndex, "build", wasteful)
    with pytest.raises(GateFailed, match="private memory at its peak"):
        build_release(inputs, bundle, store, quick("hnsw", max_memory_mib=450))
    assert store.current() is None


def test_plan_release_names_and_takes_installed_kinds_only(
    bundle: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"pin": make_input("pin", 2500)}
    plan = "index_builder.building.plan.kind_available"
    monkeypatch.setattr(plan, lambda kind: kind != "int8-graph")
    with pytest.raises(ConfigError, match=r"installed kind that needs least \(--index hnsw\)"):
        plan_release(inputs, read_bundle(bundle), store, quick("auto", max_memory_mib=431))

    def missing() -> None:
        raise MissingDependency("faiss-cpu", "faiss", "Index kind 'faiss'")

    monkeypatch.setattr("index_builder.ann.choice.faiss_library", missing)
    with pytest.raises(MissingDependency, match="Index kind 'faiss'"):
        plan_release(inputs, read_bundle(bundle), store, quick("faiss"))


@pytest.mark.slow
def test_build_counts_the_disk_it_needs_beforehand(
    bundle: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.2 times the vectors were asked for, where the plan said 3.3 times."""
    inputs = {"pin": make_input("pin", 3000)}
    plan = plan_release(inputs, read_bundle(bundle), store, quick("symqg"))
    need = plan["build"]["pin"]["disk_mib_estimate"]
    assert need >= 2 + 3000 * 64 * 4 * 3.3 / 2**20
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=int((need - 1) * 2**20))
    )
    with pytest.raises(DiskFull, match="the build needs about"):
        build_release(inputs, bundle, store, quick("symqg"))
    assert store.current() is None and not list(store.releases.glob(".staging-*"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=int((need + 2) * 2**20))
    )
    build_release(inputs, bundle, store, quick("symqg"))


def test_build_full_disk_publishes_nothing(bundle: Path, store: ReleaseStore) -> None:
    first = build_release({"pin": make_input("pin", 300)}, bundle, store, quick())
    import index_builder.storage.durable_files as durability

    child = os.fork()
    if child == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            durability.write_durably(store.releases / "CURRENT", b"x" * 50_000)
        except DiskFull as error:
            os._exit(0 if "full" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.current() == first
    store.verify(first)


def test_from_signals_reads_vectors_and_attributes(
    tmp_path: Path, bundle: Path, store: ReleaseStore
) -> None:
    vectors = unit_vectors(70, 2)
    signals = SignalStore(tmp_path / "signals")
    signals.write("pin", [f"pin-{i}" for i in range(70)], vectors, SPACE, part_rows=30)
    catalogue = pl.DataFrame(
        {
            "id": [f"pin-{i}" for i in range(60)],
            "entity_type": ["pin"] * 60,
            "title": ["t"] * 60,
            "pinsage": [[0.1]] * 60,
        }
    )
    with scratch_folder(store) as scratch:
        inputs = from_signals(signals, (), catalogue, scratch)
        assert isinstance(inputs["pin"].vectors, np.memmap)
        np.testing.assert_array_equal(inputs["pin"].vectors, vectors)
        assert inputs["pin"].attributes is not None
        assert inputs["pin"].attributes.columns == ["title"]
        assert inputs["pin"].attributes["title"].null_count() == 10
        build_release(inputs, bundle, store, quick())
    assert not list(store.root.glob(".input-*"))
    assert store.open_current().entity("pin").count == 70


def test_build_real_queries_split_into_golden_and_calibration(
    bundle: Path, store: ReleaseStore
) -> None:
    queries = QuerySet([f"query {i}" for i in range(100)], unit_vectors(100, 12))
    build_release(
        {"pin": make_input("pin", 300), "ad": make_input("ad", 30)},
        bundle,
        store,
        quick(),
        {"*": queries},
    )
    with store.open_current() as release:
        golden = release.golden("pin")
        assert (golden.kind, len(golden)) == ("real queries", 8)
        assert all(text.startswith("query ") for text in golden.texts)
        assert release.manifest.entities["pin"].calibration["queries"] == 40


def test_build_form_differing_from_tower_is_not_published(
    bundle: Path, store: ReleaseStore
) -> None:
    queries = {"*": QuerySet([f"query {i}" for i in range(100)], unit_vectors(100, 12))}
    with pytest.raises(GateFailed, match=r"onnx-int8.*export again"):
        build_release(
            {"pin": make_input("pin", 30)},
            bundle,
            store,
            quick(),
            queries,
            parity=lambda *_: {"onnx-int8": {"passed": False, "cosine_min": 0.4}},
        )
    assert store.current() is None
    build_release(
        {"pin": make_input("pin", 30)},
        bundle,
        store,
        quick(),
        queries,
        parity=lambda *_: {"onnx-int8": {"passed": True}},
    )
    assert read_manifest(store.path_of(store.current() or "")).forms["onnx-int8"]["passed"]


def test_build_resumed_without_failed_form_does_not_publish_it(
    bundle: Path, store: ReleaseStore
) -> None:
    """The interrupted build had copied the form; with the bundle's forms gone nothing is gated, so
    nothing of them may stay.
    """
    queries = {"*": QuerySet([f"query {i}" for i in range(100)], unit_vectors(100, 12))}
    entities = {"pin": make_input("pin", 30)}
    (bundle / "forms").mkdir()
    (bundle / "forms" / "onnx-int8.onnx").write_bytes(b"differs from the tower")
    (bundle / "config.json").write_text("{}")
    with pytest.raises(GateFailed, match="remove the form"):
        build_release(
            entities,
            bundle,
            store,
            quick(),
            queries,
            parity=lambda *_: {"onnx-int8": {"passed": False}},
        )
    (bundle / "forms" / "onnx-int8.onnx").unlink()
    (bundle / "forms").rmdir()
    (bundle / "config.json").unlink()
    manifest = read_manifest(
        store.path_of(build_release(entities, bundle, store, quick(), queries))
    )
    assert not [
        name for name in manifest.files if name.startswith("forms/") or name == "config.json"
    ]


def test_build_resumed_after_killed_publication_publishes_no_half_manifest(
    bundle: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entities = {"pin": make_input("pin", 30)}

    def killed(_: ReleaseStore, content: Path, *__: Any, **___: Any) -> str:
        (content / ".manifest.json.0123456789abcdef.tmp").write_bytes(b"{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReleaseStore, "publish", killed)
        build_release(entities, bundle, store, quick("exact"))
    release = store.path_of(build_release(entities, bundle, store, quick("exact")))
    assert not [name for name in read_manifest(release).files if name.endswith(".tmp")]
    assert not list(release.rglob("*.tmp"))


def test_build_after_upgrade_of_the_code_takes_nothing_over(
    bundle: Path,
    store: ReleaseStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    entities = {"ad": make_input("ad", 20), "pin": make_input("pin", 30)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "load", "pin")
        patch.setattr(build_module, "_code_version", lambda: "0.0.1")
        build_release(entities, bundle, store, quick("exact"))
    build_release(entities, bundle, store, quick("exact"))
    assert "taken over" not in caplog.text


def test_read_query_texts_gives_distinct_texts(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("a\n\nb \na\n")
    assert sorted(read_query_texts(tmp_path / "q.txt", 10, 0)) == ["a", "b"]
    pl.DataFrame({"query": ["x", "y", "x", None]}).write_csv(tmp_path / "q.csv")
    assert sorted(read_query_texts(tmp_path / "q.csv", 10, 0)) == ["x", "y"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(OmniError, match="no query"):
        read_query_texts(tmp_path / "empty.txt", 10, 0)
