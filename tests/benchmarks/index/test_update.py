"""``omni bench update``: the rate of writes that are sent and seen is what is reported."""

from pathlib import Path

import pytest

from benchmarks.index.update import sustained
from index_builder.building.build import build_release
from index_builder.live_log.reader import LiveLogReader
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import make_bundle, make_input, quick, unit_vectors


def test_sustained_writes_are_counted_acknowledged_and_seen(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "store")
    bundle = make_bundle(tmp_path / "bundle")
    release = store.open(build_release({"pin": make_input("pin")}, bundle, store, quick("exact")))
    follower = LiveFollower(store, release).start()
    index = release.entity("pin")
    result = sustained(store, index, follower, unit_vectors(50, 1), 500, 0.5)
    follower.stop()
    written = len(LiveLogReader(store.live_root, "pin").poll())
    assert result["entries_per_write"] == 20
    assert written > 0
    assert written % 20 == 0
    assert result["upserts_per_second"] == pytest.approx(written / result["seconds"], rel=0.25)
    assert follower.view("pin").sequence == written
    assert 0 < result["visible_after_p50_ms"] <= result["visible_after_max_ms"]
    assert result["searches_per_second_meanwhile"] > 0
    release.close()
