"""Live writes, exports, rebuilds and rollbacks in any order end where a simple model says."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from encoders.inference.signal_store import SignalStore
from encoders.tables.files import check_table
from index_builder.building.build import build_release
from index_builder.building.catalogue_age import ExportedAt, SourceTimes
from index_builder.building.inputs import EntityInput
from index_builder.building.order import LiveWrites, decide
from index_builder.building.plan import RebuildConfig
from index_builder.building.sources import from_release, from_signals, scratch_folder
from index_builder.commands.rebuild_sources import Towers, embed_foreign_live
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.source_age import NOTHING_SETTLED, RowTimes, Settled, SourceAge
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import D, make_bundle, quick, unit_vectors

IDS = ("a", "b", "c", "d")
SPACES = ("5a" * 32, "0b" * 32)
START = 1_700_000_000
"""Seconds since 1970 of the model's first moment; each step takes one second."""
STATED = ("nothing", "file time", "exported at", "modified at")


def vector_of(text: str, space: str) -> np.ndarray:
    return unit_vectors(1, abs(hash_of(text + space)) % 2**32)[0]


def hash_of(text: str) -> int:
    return sum((i + 1) * byte for i, byte in enumerate(text.encode()))


class FakeBundle:
    """Embeds a title by its bytes, in the space that its folder names."""

    def __init__(self, path: Path) -> None:
        self.space_id = str(json.loads((path / "space.json").read_text())["space_id"])

    def embed_entities(self, frame: pl.DataFrame) -> np.ndarray:
        return np.stack([vector_of(title, self.space_id) for title in frame["title"]])


@dataclass
class Row:
    """A row of the source of truth."""

    price: int
    modified: int


@dataclass
class Write:
    """A live write; price None: a delete."""

    id: str
    price: int | None
    second: int


@dataclass
class Built:
    """A release as the model has it."""

    rows: dict[str, int]
    upto: int
    settled: set[int] = field(default_factory=set)


@dataclass
class Export:
    """A file that was written once, and may be read later, or several times."""

    rows: dict[str, Row]
    second: int


class Model:
    """What must be visible, said as simply as possible."""

    def __init__(self) -> None:
        self.log: list[Write] = []
        self.releases: list[Built] = []

    def visible(self) -> dict[str, int]:
        built = self.releases[-1]
        return self._applied(built.rows, self.log[built.upto :])

    @staticmethod
    def _applied(rows: dict[str, int], writes: list[Write]) -> dict[str, int]:
        shown = dict(rows)
        for write in writes:
            shown.pop(write.id, None)
            if write.price is not None:
                shown[write.id] = write.price
        return shown

    def rebuild_from_active(self) -> None:
        built = self.releases[-1]
        self.releases.append(Built(self.visible(), len(self.log), set(built.settled)))

    def rebuild(self, export: Export, read: int, stated: str) -> set[str]:
        """Return the ids whose live write is no longer in effect since this rebuild."""
        settled = self.releases[-1].settled if self.releases else set()
        last = {write.id: number for number, write in enumerate(self.log)}
        rows = {id_: row.price for id_, row in export.rows.items()}
        caught_up: set[int] = set()
        lost: set[str] = set()
        result = {id_: price for id_, price in rows.items() if id_ not in last}
        for id_, number in last.items():
            write, row = self.log[number], rows.get(id_)
            newer = self._newer(export, write, number, read, stated)
            if newer == "unknown" and number in settled:
                newer = "source"
            if newer == "unknown":
                if write.price is None:
                    newer = "source" if row is None else "live"
                else:
                    newer = "live" if row is None else "source"
            value = write.price if newer == "live" else row
            if newer == "source":
                caught_up.add(number)
                if number not in settled and value != write.price:
                    lost.add(id_)
            if value is not None:
                result[id_] = value
        self.releases.append(Built(result, len(self.log), caught_up))
        return lost

    @staticmethod
    def _newer(export: Export, write: Write, number: int, read: int, stated: str) -> str:
        if number >= read:
            return "live"
        row = export.rows.get(write.id)
        moment = 0
        if stated == "exported at":
            moment = export.second
        elif stated == "modified at" and row is not None:
            moment = row.modified
        if moment:
            return "live" if write.second > moment else "source"
        if stated != "nothing" and write.second > export.second:
            return "live"
        return "unknown"


class OrderOfWrites(RuleBasedStateMachine):
    """Runs a store and the model side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="order-"))
        self.store = ReleaseStore(self.folder / "store")
        self.bundles = [
            make_bundle(self.folder / f"bundle{n}", space) for n, space in enumerate(SPACES)
        ]
        self.space = 0
        self.second = START
        self.model = Model()
        self.truth: dict[str, Row] = {}
        self.exports: list[Export] = []
        self.mixed_spaces = False
        self.patch = patch("encoders.towers.bundle.load_bundle", FakeBundle)
        self.patch.start()

    def teardown(self) -> None:
        self.patch.stop()
        shutil.rmtree(self.folder)

    def tick(self) -> int:
        self.second += 1
        return self.second

    # ---- what happens

    @initialize(prices=st.dictionaries(st.sampled_from(IDS), st.integers(1, 3), min_size=1))
    def begin(self, prices: dict[str, int]) -> None:
        for id_, price in prices.items():
            self.change_source(id_, price)
        self.export()
        self.rebuild(0, "nothing", False, None)

    @rule(id_=st.sampled_from(IDS), price=st.integers(1, 3))
    def change_source(self, id_: str, price: int) -> None:
        self.truth[id_] = Row(price, self.tick())

    @precondition(lambda self: len(self.truth) > 1)
    @rule(data=st.data())
    def remove_from_source(self, data: st.DataObject) -> None:
        del self.truth[data.draw(st.sampled_from(sorted(self.truth)))]

    @rule()
    def export(self) -> None:
        rows = {id_: Row(row.price, row.modified) for id_, row in self.truth.items()}
        self.exports.append(Export(rows, self.tick()))

    @rule(id_=st.sampled_from(IDS), price=st.none() | st.integers(1, 3))
    def write_live(self, id_: str, price: int | None) -> None:
        self.write(id_, price)

    @rule(
        which=st.integers(0, 2),
        stated=st.sampled_from(STATED),
        new_bundle=st.booleans(),
        during=st.none() | st.tuples(st.sampled_from(IDS), st.none() | st.integers(1, 3)),
    )
    def rebuild(
        self,
        which: int,
        stated: str,
        new_bundle: bool,
        during: tuple[str, int | None] | None,
    ) -> None:
        """Rebuild from one of the last exports; ``during``: a live write after it was read."""
        export = self.exports[-1 - which % len(self.exports)]
        read = len(self.model.log)
        release_id = self.build_from(export, stated, new_bundle, during)
        lost = self.model.rebuild(export, read, stated)
        report = read_manifest(self.store.path_of(release_id)).measured["entities"]["pin"]["live"]
        told = {*report["overridden"], *report["relisted"], *report["dropped"]}
        assert told == lost
        self.mixed_spaces |= new_bundle

    @rule()
    def rebuild_from_active(self) -> None:
        inputs, path = from_release(self.store, ())
        embed_foreign_live(self.store, Towers(path), inputs, quick("exact"))
        build_release(inputs, path, self.store, self.config())
        self.model.rebuild_from_active()

    @precondition(lambda self: len(self.model.releases) > 1 and not self.mixed_spaces)
    @rule()
    def roll_back(self) -> None:
        # Between spaces a rolled-back release cannot show what was written in the other one
        self.store.rollback()
        self.model.releases.pop()

    @rule()
    def lose_signals(self) -> None:
        shutil.rmtree(self.store.root / "signals", ignore_errors=True)

    # ---- what is seen

    @invariant()
    def store_shows_what_the_model_says(self) -> None:
        if not self.model.releases:
            return
        with self.store.open_current() as release:
            follower = LiveFollower(self.store, release)
            follower.catch_up()
            index = release.entities["pin"]
            found = index.search(unit_vectors(1, 1)[0], 50, exact=True).ids
            prices = index.attributes(found, ["price"])
            follower.stop()
        shown = {id_: int(values["price"]) for id_, values in zip(found, prices)}
        assert shown == self.model.visible()

    # ---- how

    def write(self, id_: str, price: int | None) -> None:
        space, second = SPACES[self.space], self.tick()
        title = f"{id_} for {price}"
        vector = None if price is None else vector_of(title, space)
        row = {"title": title, "price": price}
        entry = LiveEntry(
            id=id_,
            vector=vector,
            space_id="" if price is None else space,
            attributes={} if price is None else row,
            source=None if price is None else {"id": id_, "entity_type": "pin", **row},
            time_ns=second * 10**9,
        )
        with LiveLogWriter(self.store.live_root, "pin", D) as writer:
            writer.write([entry])
        self.model.log.append(Write(id_, price, second))

    def build_from(
        self,
        export: Export,
        stated: str,
        new_bundle: bool,
        during: tuple[str, int | None] | None,
    ) -> str:
        path = self.folder / "catalogue.jsonl"
        frame = pl.DataFrame(
            [self.csv_row(id_, row, stated) for id_, row in sorted(export.rows.items())]
        )
        frame.write_ndjson(path)
        # A file that says nothing was copied a moment ago
        seconds = self.tick() if stated == "nothing" else export.second
        os.utime(path, (seconds, seconds))
        exported_at: ExportedAt = export.second * 10**9 if stated == "exported at" else None
        times = SourceTimes.now(self.store, [path], exported_at)
        catalogue = check_table(path, "catalogue").frame
        if during is not None:
            self.write(*during)  # in the space that is served meanwhile
        self.space ^= new_bundle
        bundle = self.bundles[self.space]
        signals = SignalStore(self.store.root / "signals" / SPACES[self.space][:16])
        vectors = FakeBundle(bundle).embed_entities(catalogue)
        signals.write("pin", catalogue["id"].to_list(), vectors, SPACES[self.space])
        with scratch_folder(self.store) as scratch:
            inputs = times.apply(from_signals(signals, (), catalogue, scratch), catalogue)
            embed_foreign_live(self.store, Towers(bundle), inputs, quick("exact"))
            return build_release(inputs, bundle, self.store, self.config())

    def config(self) -> RebuildConfig:
        return quick("exact", max_shrink=1.0, release_id=f"r{self.tick()}")

    @staticmethod
    def csv_row(id_: str, row: Row, stated: str) -> dict[str, Any]:
        values: dict[str, Any] = {
            "id": id_,
            "entity_type": "pin",
            "title": f"{id_} for {row.price}",
            "price": row.price,
        }
        if stated == "modified at":
            values["modified_at"] = row.modified
        return values


@pytest.mark.slow
def test_order_any_interleaving_ends_where_the_model_says() -> None:
    run_state_machine_as_test(
        OrderOfWrites,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- single decisions

PRICES = {"a": 12, "b": 12}


def entry(id_: str, price: int | None, sequence: int, second: int = 0, **more: Any) -> LiveEntry:
    vector = None if price is None else unit_vectors(1, sequence)[0]
    return LiveEntry(
        id=id_,
        vector=vector,
        space_id="" if price is None else SPACES[0],
        attributes={} if price is None else {"price": price},
        sequence=sequence,
        time_ns=second * 10**9,
        **more,
    )


def decided(
    *writes: LiveEntry, age: SourceAge | None, settled: Settled = NOTHING_SETTLED
) -> tuple[dict[str, int | None], dict[str, Any], Settled]:
    """Return price by id of what is in effect, the report, and what is settled then."""
    entities = EntityInput(
        ids=list(PRICES),
        vectors=unit_vectors(2, 0),
        space_id=SPACES[0],
        attributes=pl.DataFrame({"price": list(PRICES.values())}),
        age=age,
        settled=settled,
    )
    latest = {write.id: write for write in writes}
    changes = decide(entities, LiveWrites(latest, max(w.sequence for w in writes)))
    shown = {id_: PRICES[id_] for n, id_ in enumerate(PRICES) if n not in changes.dead}
    shown |= {e.id: e.attributes["price"] for e in changes.fresh}
    report = {name: value for name, value in changes.folded.report().items() if value}
    return shown, report, changes.folded.settled


def times(second: int) -> RowTimes:
    return RowTimes(rows=np.full(2, second * 10**9), absent=second * 10**9)


def test_decide_write_after_reading_wins() -> None:
    shown, report, settled = decided(
        entry("a", 99, 8), entry("b", None, 9), entry("n", 5, 10), age=SourceAge(read_at=7)
    )
    assert shown == {"a": 99, "n": 5}
    assert report == {"upserts": 2, "deletes": 1}
    assert not any(settled.holds(n) for n in (8, 9, 10))


def test_decide_upsert_that_says_its_age_only_is_compared_by_its_vector() -> None:
    """Attributes without the age say nothing, and nothing is the same as any row."""
    row = unit_vectors(2, 0)
    own, same = entry("a", 99, 1), entry("b", 99, 2)
    writes = [
        dataclasses.replace(own, attributes={"modified_at": "2024-01-01"}),
        dataclasses.replace(same, attributes={"modified_at": "2024-01-01"}, vector=row[1]),
    ]
    shown, report, _ = decided(*writes, age=SourceAge(read_at=7))
    assert shown == PRICES
    assert (report["overridden"], report["confirmed"]) == (["a"], 1)


def test_decide_write_before_reading_loses_to_a_row_but_a_delete_stays() -> None:
    shown, report, settled = decided(
        entry("a", 99, 1), entry("b", None, 2), entry("n", 5, 3), age=SourceAge(read_at=7)
    )
    assert shown == {"a": 12, "n": 5}
    assert (report["overridden"], report["held_back"]) == (["a"], ["b"])
    assert [settled.holds(n) for n in (1, 2, 3)] == [True, False, False]


def test_decide_source_that_says_it_is_newer_wins_everywhere() -> None:
    age = SourceAge(read_at=7, stated=times(100))
    writes = (entry("a", 99, 1, 50), entry("b", None, 2, 50), entry("n", 5, 3, 50))
    shown, report, _ = decided(*writes, age=age)
    assert shown == PRICES
    assert (report["overridden"], report["relisted"], report["dropped"]) == (["a"], ["b"], ["n"])
    later = [entry(w.id, None if w.is_delete else 7, w.sequence, 101) for w in writes]
    assert decided(*later, age=age)[0] == {"a": 7, "n": 7}


def test_decide_write_newer_than_the_file_wins() -> None:
    age = SourceAge(read_at=7, limit=times(100))
    assert decided(entry("a", 99, 1, 101), age=age)[0]["a"] == 99
    assert decided(entry("a", 99, 1, 99), age=age)[0]["a"] == 12
    assert "b" not in decided(entry("b", None, 1, 99), age=age)[0]  # a copied file says nothing


def test_decide_upsert_that_the_source_confirms_is_not_reported_as_lost() -> None:
    _, report, settled = decided(entry("a", 12, 1), age=SourceAge(read_at=7))
    assert report == {"confirmed": 1}
    assert settled.holds(1)


def test_decide_after_a_catalogue_caught_up_the_next_one_decides() -> None:
    age, caught_up = SourceAge(read_at=7), Settled(3)
    shown, report, settled = decided(
        entry("b", None, 2), entry("n", 5, 3), age=age, settled=caught_up
    )
    assert (shown, report) == (PRICES, {})  # listed again; left the catalogue: both are its own
    assert settled.holds(2) and settled.holds(3)


def test_decide_repeated_write_counts_as_the_write_it_repeats() -> None:
    again = entry("a", 99, 20, repeats=3)
    assert decided(again, age=SourceAge(read_at=7))[0]["a"] == 12
    assert decided(entry("a", 99, 20), age=SourceAge(read_at=7))[0]["a"] == 99


def test_settled_round_trips_and_damage_is_refused(tmp_path: Path) -> None:
    from index_builder.errors import ReleaseCorrupt

    assert Settled.read(tmp_path) == Settled()
    Settled(9, frozenset({3, 5})).write(tmp_path)
    assert Settled.read(tmp_path) == Settled(9, frozenset({3, 5}))
    (tmp_path / "settled.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ReleaseCorrupt, match=r"settled\.npy"):
        Settled.read(tmp_path)
