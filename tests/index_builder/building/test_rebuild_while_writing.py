"""A rebuild with another bundle takes minutes to embed the live entities again: what is written
about them meanwhile must win.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import encoders.towers.bundle
from index_builder.building.build import build_release
from index_builder.building.live_fold import read_live
from index_builder.commands.rebuild_sources import Towers, embed_foreign_live
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import SPACE, D, make_bundle, make_input, quick, unit_vectors

NEW = "c3" * 32


class SlowBundle:
    """Embeds one row per title, and while it does something else is written."""

    space_id = NEW

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.meanwhile, self.titles = meanwhile, list[list[str]]()
        self.loads = 0

    def load(self, _: Path) -> "SlowBundle":
        self.loads += 1
        return self

    def embed_entities(self, frame: pl.DataFrame) -> np.ndarray:
        self.titles.append(frame["title"].to_list())
        if len(self.titles) == 1:
            self.meanwhile()
        return np.concatenate([unit_vectors(1, sum(title.encode())) for title in frame["title"]])


def old(identifier: str, title: str) -> LiveEntry:
    source = {"id": identifier, "entity_type": "pin", "title": title}
    return LiveEntry(
        id=identifier,
        vector=unit_vectors(1, 1)[0],
        space_id=SPACE,
        attributes={"title": title},
        source=source,
    )


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    store = ReleaseStore(tmp_path / "store")
    build_release(
        {"pin": make_input("pin", 60)}, make_bundle(tmp_path / "old"), store, quick("exact")
    )
    return store


def rebuilt(
    store: ReleaseStore, meanwhile: list[LiveEntry], monkeypatch: pytest.MonkeyPatch
) -> tuple[SlowBundle, str]:
    """A release with the new bundle; ``meanwhile`` is acknowledged while it embeds."""

    def write() -> None:
        with LiveLogWriter(store.live_root, "pin", D) as writer:
            writer.write(meanwhile)

    slow = SlowBundle(write)
    monkeypatch.setattr(encoders.towers.bundle, "load_bundle", slow.load)
    bundle, inputs = make_bundle(store.root / "new", NEW), {"pin": make_input("pin", 60, space=NEW)}
    embed_foreign_live(store, Towers(bundle), inputs, quick("exact"))
    return slow, build_release(inputs, bundle, store, quick("exact"))


def test_embed_foreign_live_delete_meanwhile_stays_deleted(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write([old("x", "gone"), old("y", "kept")])
    _, release_id = rebuilt(store, [LiveEntry(id="x")], monkeypatch)
    latest, _ = read_live(store.live_root, "pin", 0)
    assert latest["x"].is_delete
    index = store.open(release_id).entities["pin"]
    assert index.row_of("x") is None
    assert index.row_of("y") is not None


def test_embed_foreign_live_update_meanwhile_is_embedded_too(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        writer.write([old("x", "before"), old("y", "kept")])
    slow, release_id = rebuilt(store, [old("x", "after"), old("z", "new")], monkeypatch)
    assert slow.titles == [["before", "kept"], ["after", "new"]]
    assert slow.loads == 1
    index = store.open(release_id).entities["pin"]
    for identifier, title in (("x", "after"), ("y", "kept"), ("z", "new")):
        np.testing.assert_array_equal(
            index.vector(identifier), unit_vectors(1, sum(title.encode()))[0]
        )
        assert index.attributes([identifier], ["title"])[0] == {"title": title}


def test_write_unless_changed_appends_unchanged_ids_only(tmp_path: Path) -> None:
    with (
        LiveLogWriter(tmp_path, "pin", D, file_bytes=2000) as writer,
        LiveLogWriter(tmp_path, "pin", D, file_bytes=2000) as other,
    ):
        known = writer.write([old("a", "1"), old("b", "1"), old("c", "1")])
        other.write([LiveEntry(id="a")])
        for n in range(10):
            other.write([old(f"n{n}", "x")])
        other.write([old("b", "2")])
        assert writer.write_unless_changed([old(i, "3") for i in "abcd"], since=known) == 2
        assert writer.write_unless_changed([old("a", "3")], since=known) == 0
        assert other.write([old("e", "x")]) == 18
    reader = LiveLogReader(tmp_path, "pin")
    latest = {entry.id: entry.attributes.get("title") for entry in reader.poll()}
    assert [latest[i] for i in "abcd"] == [None, "2", "3", "3"]


def test_write_unless_changed_wrong_shape_is_refused(tmp_path: Path) -> None:
    with LiveLogWriter(tmp_path, "pin", D) as writer, pytest.raises(Exception, match="unit norm"):
        writer.write_unless_changed(
            [old("a", "1"), LiveEntry(id="b", vector=np.zeros(D, np.float32), space_id=SPACE)],
            since=0,
        )
    assert LiveLogReader(tmp_path, "pin").poll() == []
