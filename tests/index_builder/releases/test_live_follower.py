"""The follower of the live logs: what is written is soon visible, whatever happens to a log."""

import errno
from pathlib import Path

import pytest

from index_builder.building.build import build_release
from index_builder.errors import LiveLogCorrupt
from index_builder.live_log.files import log_files
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import SPACE, D, make_bundle, make_input, quick, unit_vectors
from tests.helpers.waiting import PATIENCE_SECONDS, until


@pytest.fixture
def store(store: ReleaseStore) -> ReleaseStore:
    """The first of the two releases is active."""
    store.activate("r0")
    return store


def test_live_follower_write_is_visible_to_every_reader(store: ReleaseStore) -> None:
    releases = [store.open_current() for _ in range(3)]
    followers = [LiveFollower(store, release).start() for release in releases]
    query = unit_vectors(200, 0)[11]
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        green, red = {"colour": "green", "number": 7}, {"colour": "red"}
        last = writer.write(
            [
                LiveEntry(id="new", vector=query, space_id=SPACE, attributes=green),
                LiveEntry(id="pin-11", vector=-query, space_id=SPACE, attributes=red),
                LiveEntry(id="pin-12"),
            ]
        )
    for follower in followers:
        assert follower.wait_for("pin", last, timeout_seconds=PATIENCE_SECONDS)
    for release in releases:
        index = release.entity("pin")
        assert index.search(query, 5).ids[0] == "new"
        everything = index.search(query, 300).ids
        assert len(everything) == len(set(everything)) == 200
        assert everything[-1] == "pin-11"
        assert "pin-12" not in everything
        assert index.search(query, 10, filter="colour == 'green'").ids == ["new"]
        assert index.vector("pin-12") is None
        assert index.attributes(["new"], ["colour", "number"]) == [{"colour": "green", "number": 7}]
    for follower in followers:
        follower.stop()


def test_live_follower_activation_and_rollback_replay_later_writes(
    store: ReleaseStore, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    first = store.current()
    vector = unit_vectors(1, 99)[0]
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write([LiveEntry(id="early", vector=vector, space_id=SPACE), LiveEntry(id="pin-3")])
        second = build_release(
            {"pin": make_input("pin", 200), "ad": make_input("ad", 20)}, bundle, store, quick()
        )
        writer.write([LiveEntry(id="late", vector=vector, space_id=SPACE)])

    def answers() -> list[str]:
        with store.open_current() as release:
            LiveFollower(store, release).catch_up()
            return release.entity("pin").search(vector, 250).ids

    assert store.current() == second
    with store.open(second) as release:
        assert release.manifest.entities["pin"].watermark == 2
        assert release.entity("pin").count == 200
        assert "early" in release.entity("pin").search(vector, 3).ids
    after = answers()
    assert set(after[:2]) == {"early", "late"}
    assert "pin-3" not in after
    assert store.rollback() == first
    assert set(answers()) == set(after)


def test_live_follower_damaged_log_keeps_last_view_and_reports_it(store: ReleaseStore) -> None:
    release = store.open_current()
    writer = LiveLogWriter(store.live_root, "pin", D)
    writer.write([LiveEntry(id="good", vector=unit_vectors(1, 1)[0], space_id=SPACE)])
    follower = LiveFollower(store, release, poll_seconds=0.02).start()
    path = log_files(store.live_root / "pin")[0][1]
    size = path.stat().st_size
    bad = writer.write([LiveEntry(id="bad", vector=unit_vectors(1, 2)[0], space_id=SPACE)])
    assert follower.wait_for("pin", bad, timeout_seconds=PATIENCE_SECONDS)
    writer.write([LiveEntry(id="worse", vector=unit_vectors(1, 3)[0], space_id=SPACE)])
    follower.stop()
    content = bytearray(path.read_bytes())
    content[size + 40] ^= 1
    path.write_bytes(bytes(content))
    fresh = Release.open(release.path)
    checked = LiveFollower(store, fresh).start()
    assert isinstance(checked.error, LiveLogCorrupt)
    assert (
        fresh.entity("pin").search(unit_vectors(1, 1)[0], 1).ids == ["good"]
        or fresh.entity("pin").count == 200
    )
    assert fresh.entity("ad").count == 20
    checked.stop()


def test_live_follower_merge_between_polls_is_shown(store: ReleaseStore) -> None:
    release = store.open_current()
    follower = LiveFollower(store, release)
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        for part in range(3):
            writer.write(
                [
                    LiveEntry(
                        id=f"new-{part}-{i}",
                        vector=unit_vectors(1, 10 * part + i)[0],
                        space_id=SPACE,
                    )
                    for i in range(5)
                ]
            )
            follower.catch_up()
    state = follower._followed["pin"][1]
    before = state.view
    state.compact()
    state.wait()
    assert state.view is not before
    follower.poll()
    assert release.entity("pin")._live is state.view
    follower.stop()


def test_live_follower_without_descriptors_goes_on_polling(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = store.open_current()
    follower = LiveFollower(store, release, poll_seconds=0.02).start()
    poll = LiveLogReader.poll

    def out_of_descriptors(self: LiveLogReader, limit: int) -> list[LiveEntry]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(LiveLogReader, "poll", out_of_descriptors)
    until(lambda: follower.error is not None)
    assert isinstance(follower.error, OSError), "reported"
    monkeypatch.setattr(LiveLogReader, "poll", poll)
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        last = writer.write([LiveEntry(id="new", vector=unit_vectors(1, 5)[0], space_id=SPACE)])
    assert (
        follower.wait_for("pin", last, timeout_seconds=PATIENCE_SECONDS) and follower.error is None
    )
    follower.stop()
