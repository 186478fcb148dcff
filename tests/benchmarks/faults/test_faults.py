"""Parts of ``omni bench faults`` at a small size: real servers, hurt for a moment; what must hold
is the behaviour, not the speed.
"""

import asyncio
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.faults import kills as fault_kills
from benchmarks.faults import mixed as fault_mixed
from benchmarks.faults import overload as fault_overload
from benchmarks.faults.faults import merged
from benchmarks.faults.reconnect import reconnect
from benchmarks.faults.servers import ServerProcess, prepare_store
from benchmarks.faults.storms import clock_jump, damaged_index, full_disk, hostile_redis
from benchmarks.faults.swaps import swaps_under_load
from benchmarks.small_releases import small_release, write_small_bundle
from encoders.towers.bundle import read_space_id
from encoders.towers.query_tower import QueryEncoder
from index_builder.releases.store import ReleaseStore
from tests.helpers.serving.real_server import SmallBundle


@dataclass(frozen=True)
class Prepared:
    """Releases a1, a2 and b1 of two spaces, and what those of the first were made from."""

    store: ReleaseStore
    bundle: Path
    encoder: QueryEncoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("faults")
    store, encoder = prepare_store(folder)
    return Prepared(store, folder / "a", encoder)


@pytest.fixture
def prepared(made: Prepared, tmp_path: Path) -> Prepared:
    """A copy of the store, to be hurt."""
    shutil.copytree(made.store.root, tmp_path / "store")
    return replace(made, store=ReleaseStore(tmp_path / "store"))


@pytest.mark.slow
def test_full_disk_refuses_writes_only(small_bundle: SmallBundle) -> None:
    found = asyncio.run(full_disk(small_bundle.encoder, small_bundle.folder, small_bundle.space_id))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["publish_on_full_disk"] == "DiskFull"
    assert found["writes"]["full"].get("RESOURCE_EXHAUSTED", 0) > 0 and found["writes"][
        "room again"
    ] == {"OK": 5}
    assert found["answers_while_full"] > 0 and not found["failed_reads"] and found["lost"] == 0
    assert found["release_after_room"] == "d3"


@pytest.mark.slow
def test_clock_jump_disturbs_nothing(prepared: Prepared) -> None:
    space_id = read_space_id(prepared.bundle)
    found = asyncio.run(clock_jump(prepared.store.root, prepared.encoder, space_id))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert (
        all(jump["write"] == "OK" and jump["swapped"] for jump in found["jumps"].values())
        and len(found["jumps"]) == 4
    )
    assert all(jump["cached_before_and_after"] for jump in list(found["jumps"].values())[1:]), (
        "age is measured by a clock that never jumps"
    )
    assert found["answers"] > 0 and not found["failed_reads"] and found["lost"] == 0


@pytest.mark.slow
def test_shadow_recall_damaged_index_is_noticed(
    tmp_path: Path,
) -> None:
    store = ReleaseStore(tmp_path / "store")
    encoder = write_small_bundle(tmp_path / "bundle", 5)
    small_release(
        store, tmp_path / "bundle", encoder, release_id="good", counts={"pin": 4000}, kind="hnsw"
    )
    flags = ("--shadow-fraction", "0.3", "--shadow-cpu", "0.5")
    found = asyncio.run(damaged_index(store, encoder, "good", 100.0, 5.0, flags))
    assert found["offline_within_interval"], found
    assert (
        found["noticed_after_seconds"] is not None
        and found["recall_when_noticed"] < found["alert_below"]
    ), found
    assert found["failed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_swaps_under_load_mix_nothing(prepared: Prepared, workers: str) -> None:
    server = ServerProcess(prepared.store.root, "--workers", workers, "--shadow-fraction", "0")
    try:
        found = asyncio.run(swaps_under_load(server.address, 4, 6, 60.0))
    finally:
        server.stop()
    assert found["failed"] == 0 and found["mixed"] == 0 and found["answers"] > 50, found
    assert found["to_another_encoder"] >= 2


@pytest.mark.slow
def test_kill_9_of_server_and_publisher_loses_nothing(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_kills, "ROUNDS_PER_STORE", 3)
    store, bundle = prepared.store, prepared.bundle
    space_id = read_space_id(bundle)
    found = asyncio.run(fault_kills.kill_nine(store, bundle, prepared.encoder, space_id, 8))
    assert found["lost_or_mixed"] == 0 and found["ready_after_the_kill"] == found["rounds"] >= 5, (
        found
    )
    assert (
        found["kills"] == sum(found["killed"].values()) >= 8
        and found["killed"]["server, during upserts and swaps"] >= 2
    )
    assert (
        any(what.startswith("publisher") for what in found["killed"])
        and found["acknowledged_writes"] > 0
    )
    assert sorted(path.name for path in store.releases.glob("[ab]?")) == [
        "a1",
        "a2",
        "b1",
    ], "the prepared one is as it was"


@pytest.mark.slow
def test_overload_is_refused_and_accepted_calls_are_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_overload, "PEAK_SECONDS", 1.0)
    store = ReleaseStore(tmp_path / "store")
    encoder = write_small_bundle(tmp_path / "bundle", 3, layers=6, width=256)
    small_release(store, tmp_path / "bundle", encoder, counts={"pin": 300})
    server_cores, client_cores = fault_overload.split_cores()
    flags = ("--shadow-fraction", "0", "--max-in-flight", "70", "--max-encode-queue", "64")
    server = ServerProcess(store.root, *flags, cores=server_cores)
    try:
        found = fault_overload.overload(server, 2.0, 5.0, client_cores)
        refused = [
            float(line.split()[-1])
            for line in server.metrics().splitlines()
            if line.startswith("omni_refused_total")
        ]
    finally:
        server.stop()
    outcomes = found["overload"]["outcomes"]
    assert (
        outcomes["OK"] > 0
        and outcomes["RESOURCE_EXHAUSTED"] > 0
        and set(outcomes) <= {"OK", "RESOURCE_EXHAUSTED"}
    ), found
    assert found["overload"]["late"] == 0 and found["recovered"]["outcomes"]["OK"] > 0
    assert refused and refused[0] > 0, "refusals before admission are counted"
    assert len(found["rss_mib_during"]) >= 2 and found["cores"]["client"] == sorted(client_cores)


@pytest.mark.slow
def test_mixed_page_and_batches_are_all_answered(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_mixed, "PEAK_SECONDS", 1.0)
    server_cores, client_cores = fault_overload.split_cores()
    server = ServerProcess(prepared.store.root, "--shadow-fraction", "0", cores=server_cores)
    try:
        found = fault_mixed.mixed(server, 1.0, client_cores, turns=1)
    finally:
        server.stop()
    assert found["failed"] == 0 and found["page_per_s"] > 0, found
    for page in (found["page_calm"], found["page_mixed"]):
        assert page["all"]["answers"] == page["new"]["answers"] + page["cached"]["answers"] > 0
    assert found["batch_texts_per_s"]["mixed"] > 0 and found["batch_share_of_alone"] > 0


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_mixed_summary_compares_turns_of_the_page_and_of_batches(seconds: float) -> None:
    def turn(page: float, batches: int) -> fault_mixed.Turn:
        tallies = []
        for latencies in ([page] * 10, [page / 10] * 10, [seconds] * batches):
            tally = fault_overload.Tally(1.0, latencies=latencies, began=1.0, last=1.0 + seconds)
            tallies.append(tally)
        return fault_mixed.Turn(*tallies)

    found = fault_mixed.summary(
        [turn(0.01, 0)] * 2, [turn(0.015, 3), turn(0.015, 3)], [turn(0.0, 4)] * 2
    )
    assert found["p99_ratio"] == {"all": 1.5, "new": 1.5, "cached": 1.5}
    assert found["p99_ratio_by_turn"] == [1.5, 1.5]
    assert found["batch_share_of_alone"] == 0.75 and found["failed"] == 0
    per_second = round(4 * fault_mixed.BATCH_TEXTS / seconds, 1)
    assert found["batch_texts_per_s"]["alone"] == per_second


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow", "dead", "lying"])
def test_hostile_redis_fails_nothing(prepared: Prepared, kind: str) -> None:
    pytest.importorskip("redis")
    assert asyncio.run(hostile_redis(kind, prepared.store.root))["failed"] == 0


@pytest.mark.slow
def test_reconnect_serves_every_client(prepared: Prepared) -> None:
    server = ServerProcess(prepared.store.root)
    try:
        found = reconnect(server, 40, rounds=2)
    finally:
        server.stop()
    assert found["clients"] == 40 and found["failed"] == 0 and found["served_s"] > 0


def test_merged_records_of_parts_add_up() -> None:
    first = {
        "seeds": [0],
        "kills": 50,
        "killed": {"server": 50},
        "acknowledged_writes": 100,
        "lost_or_mixed": 0,
    }
    other = {
        **first,
        "seeds": [1],
        "acknowledged_writes": 90,
        "killed": {"server": 30, "publisher": 20},
    }
    assert merged({}, "kills", first) == first
    assert merged({"kills": first}, "kills", other) == {
        "seeds": [0, 1],
        "kills": 100,
        "killed": {"server": 80, "publisher": 20},
        "acknowledged_writes": 190,
        "lost_or_mixed": 0,
    }
    assert merged({"kills": first}, "kills", first) == first, "the same seed again replaces"
    assert merged({"kills": {"seeds": [7], "kills": 9}}, "kills", first) == first, (
        "a record of another form is not added to"
    )
    assert merged({"clock": {"answers": 1}}, "clock", {"answers": 2}) == {"answers": 2}
