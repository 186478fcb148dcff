"""``omni rebuild`` after live writes: which wins, what is told of it, and what stops it."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from encoders.commands import embed as embed_command
from index_builder.commands import rebuild as rebuild_command
from index_builder.commands import update as update_command
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.store import ReleaseStore
from tests.helpers.run_command import run

HOUR = 3600.0


@dataclass
class Shop:
    """A store with one bundle, its catalogue files and commands."""

    folder: Path
    bundle: Path

    @property
    def store(self) -> ReleaseStore:
        return ReleaseStore(self.folder / "store")

    def export(self, name: str, prices: dict[str, float], hours: float = 0.0, **more: Any) -> Path:
        """Write a catalogue whose file is so many hours newer than now."""
        path = self.folder / name
        rows = [
            {"id": id_, "entity_type": "pin", "title": f"red barn {id_}", "price": price}
            | {key: values[id_] for key, values in more.items() if id_ in values}
            for id_, price in prices.items()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        moment = time.time() + hours * HOUR
        os.utime(path, (moment, moment))
        return path

    def live(self, **prices: float | None) -> None:
        """Write live prices; None deletes."""
        rows: list[dict[str, Any]] = []
        for id_, price in prices.items():
            row = {"id": id_, "entity_type": "pin"}
            told = {"title": f"red barn {id_}", "price": price}
            rows.append(row | ({"op": "delete"} if price is None else told))
        path = self.folder / "changes.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = run(update_command.command, path, "--store", self.store.root)
        assert done.exit_code == 0, done.output

    def rebuild(self, *catalogues: Path, options: tuple[object, ...] = ()) -> Result:
        arguments: list[object] = ["--store", self.store.root, "--index", "exact", "--json"]
        if catalogues:
            arguments += ["--bundle", self.bundle]
        for path in catalogues:
            arguments += ["--catalogue", path]
        return run(rebuild_command.command, *arguments, *options)

    def rebuilt(self, *catalogues: Path, options: tuple[object, ...] = ()) -> dict[str, Any]:
        """Rebuild; return what was decided about live writes, without what is empty."""
        done = self.rebuild(*catalogues, options=options)
        assert done.exit_code == 0, done.output
        live = json.loads(done.stdout)["entities"]["pin"]["live"]
        return {name: value for name, value in live.items() if value}

    def prices(self) -> dict[str, float]:
        """Return what a server would answer with."""
        with self.store.open_current() as release:
            follower = LiveFollower(self.store, release)
            follower.catch_up()
            index = release.entities["pin"]
            ids = index.search(release.golden("pin").vectors[0], 100, exact=True).ids
            values = index.attributes(ids, ["price"])
            follower.stop()
        return {id_: value["price"] for id_, value in sorted(zip(ids, values))}


DAY_1 = {"a": 1.5, "b": 2.5, "c": 3.5}


@pytest.fixture
def shop(tmp_path: Path, tiny_bundle: Path) -> Shop:
    """A shop an hour after its first rebuild."""
    shop = Shop(tmp_path, tiny_bundle)
    assert shop.rebuilt(shop.export("day1.jsonl", DAY_1, hours=-1)) == {}
    return shop


@pytest.mark.parametrize("lost", ["signals kept", "signals gone"])
def test_rebuild_same_catalogue_keeps_live_delete_and_price(shop: Shop, lost: str) -> None:
    shop.live(a=99.0, b=None)
    if lost == "signals gone":
        shutil.rmtree(shop.store.root / "signals")
    assert shop.rebuilt(shop.folder / "day1.jsonl") == {"upserts": 1, "deletes": 1}
    assert shop.prices() == {"a": 99.0, "c": 3.5}


def test_rebuild_newer_catalogue_gives_the_new_price_and_holds_deletes_back(shop: Shop) -> None:
    shop.live(a=99.0, b=None, d=9.0)
    day_2 = shop.export("day2.jsonl", {**DAY_1, "a": 120.0}, hours=1)
    done = shop.rebuild(day_2)
    live = json.loads(done.stdout)["entities"]["pin"]["live"]
    assert (live["overridden"], live["held_back"]) == (["a"], ["b"])
    assert "overridden by the newer source: 'a'" in done.stderr
    assert "--exported-at" in done.stderr
    assert shop.prices() == {"a": 120.0, "c": 3.5, "d": 9.0}
    again = shop.rebuilt(day_2, options=("--release-id", "again"))
    assert again == {"upserts": 1, "deletes": 1, "held_back": ["b"]}  # told once


@pytest.mark.parametrize("stated", ["exported at", "file", "modified_at"])
def test_rebuild_catalogue_stated_newer_lists_again_what_was_deleted(
    shop: Shop, stated: str
) -> None:
    shop.live(a=99.0, b=None, d=9.0)
    options: tuple[object, ...] = ()
    more: dict[str, Any] = {}
    if stated == "modified_at":
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + HOUR))
        more = {"modified_at": {"b": moment}}
    else:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
        options = ("--exported-at", now if stated == "exported at" else "file")
    day_2 = shop.export("day2.jsonl", {**DAY_1, "a": 120.0}, hours=1, **more)
    report = shop.rebuilt(day_2, options=options)
    assert report["relisted"] == ["b"]
    kept = {"d": 9.0} if stated == "modified_at" else {}
    assert shop.prices() == {"a": 120.0, "b": 2.5, "c": 3.5} | kept
    assert report.get("dropped", []) == ([] if kept else ["d"])


def test_rebuild_older_export_loses_to_live_writes(shop: Shop) -> None:
    day_2 = shop.export("day2.jsonl", {**DAY_1, "a": 2.0, "e": 5.0}, hours=-1)
    shop.live(a=99.0, b=None, e=None)
    assert shop.rebuilt(day_2) == {"upserts": 1, "deletes": 2}
    assert shop.prices() == {"a": 99.0, "c": 3.5}
    # Copied meanwhile, but said to be old
    moment = time.time() + HOUR
    os.utime(day_2, (moment, moment))
    assert shop.rebuilt(day_2, options=("--exported-at", "2026-01-01")) == {
        "upserts": 1,
        "deletes": 2,
    }


def test_rebuild_product_gone_from_an_export_and_listed_again_returns(shop: Shop) -> None:
    shop.live(b=None, d=9.0)
    without = {"a": 1.5, "c": 3.5}
    shop.rebuilt(shop.export("day2.jsonl", {**without, "d": 9.0}, hours=1))
    assert shop.prices() == {**without, "d": 9.0}
    shop.rebuilt(shop.export("day3.jsonl", DAY_1, hours=2))
    assert shop.prices() == DAY_1


def test_rebuild_row_enriched_after_a_delete_does_not_bring_it_back(shop: Shop) -> None:
    """Clicks change a row's text every day; the row is embedded again, but is no newer."""
    shop.live(b=None)
    clicked = shop.export("enriched.jsonl", DAY_1, 1, description={"b": "clicked five times"})
    assert shop.rebuilt(clicked)["held_back"] == ["b"]
    assert "b" not in shop.prices()


def test_rebuild_of_several_catalogues_takes_each_file_by_its_own_age(shop: Shop) -> None:
    shop.live(a=99.0, c=99.0)
    old = shop.export("old.jsonl", {"a": 1.0, "b": 2.0}, hours=-1)
    new = shop.export("new.jsonl", {"c": 3.0}, hours=1)
    assert shop.rebuilt(old, new)["overridden"] == ["c"]
    assert shop.prices() == {"a": 99.0, "b": 2.0, "c": 3.0}


def test_rebuild_from_named_signals_is_as_old_as_what_was_embedded(shop: Shop) -> None:
    shop.live(a=99.0, b=None)
    signals = shop.folder / "signals"
    day_1 = shop.folder / "day1.jsonl"
    done = run(embed_command.command, shop.bundle, "--catalogue", day_1, "--out", signals)
    assert done.exit_code == 0, done.output
    options = ("--bundle", shop.bundle, "--signals", signals)
    assert shop.rebuilt(options=options) == {"upserts": 1, "deletes": 1}
    shop.rebuilt(options=(*options, "--catalogue", day_1))
    assert shop.prices() == {"a": 99.0, "c": 3.5}


def test_rebuild_after_rollback_keeps_every_live_write(shop: Shop) -> None:
    shop.live(a=99.0, b=None)
    shop.rebuilt(options=("--from-active",))
    shop.live(c=None, n=7.0)
    shop.store.rollback()
    wanted = {"a": 99.0, "n": 7.0}
    assert shop.prices() == wanted
    shop.rebuilt(shop.folder / "day1.jsonl")
    assert shop.prices() == wanted
    shop.rebuilt(options=("--from-active",))
    assert shop.prices() == wanted


def test_rebuild_overriding_too_many_live_writes_stops(shop: Shop) -> None:
    many = {f"x{n}": 1.0 for n in range(150)}
    shop.live(**dict.fromkeys(many, 2.0))
    newer = shop.export("day2.jsonl", many | DAY_1, hours=1)
    before = shop.store.current()
    refused = shop.rebuild(newer)
    assert refused.exit_code == 1
    assert "150 acknowledged live writes" in refused.stderr
    assert "--max-overridden" in refused.stderr and "'x0'" in refused.stderr
    assert shop.rebuild(newer, options=("--dry-run",)).exit_code == 1
    assert shop.store.current() == before
    assert len(shop.rebuilt(newer, options=("--max-overridden", 1))["overridden"]) == 150


def test_rebuild_shrunken_export_is_refused_unless_allowed(shop: Shop) -> None:
    one = shop.export("day2.jsonl", {"a": 1.5}, hours=1)
    refused = shop.rebuild(one)
    assert refused.exit_code == 1
    assert "would hold 1 entities, the active one holds 3" in refused.stderr
    assert "--max-shrink" in refused.stderr
    assert shop.rebuild(one, options=("--max-shrink", 0.5, "--dry-run")).exit_code == 1
    shop.rebuilt(one, options=("--max-shrink", 0.7))
    assert shop.prices() == {"a": 1.5}


def test_rebuild_small_because_of_live_deletes_is_no_shrunken_export(shop: Shop) -> None:
    shop.live(a=None, b=None)
    shop.rebuilt(shop.folder / "day1.jsonl")
    assert shop.prices() == {"c": 3.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--exported-at", "yesterday"), "2026-01-31"),
        (("--exported-at", "2199-01-01"), "future"),
        (("--max-shrink", "1.5"), "max_shrink"),
    ],
)
def test_rebuild_impossible_age_or_share_is_refused(
    shop: Shop, options: tuple[str, ...], message: str
) -> None:
    refused = shop.rebuild(shop.folder / "day1.jsonl", options=options)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_rebuild_modified_at_that_is_no_time_is_refused(shop: Shop) -> None:
    path = shop.export("day2.jsonl", DAY_1, 1, modified_at={"a": "last week", "b": "2026-01-01"})
    refused = shop.rebuild(path)
    assert refused.exit_code == 1
    assert "modified_at" in refused.stderr and "last week" in refused.stderr


def test_rebuild_from_active_with_a_hole_in_the_log_is_refused(shop: Shop) -> None:
    shop.live(a=99.0)
    log = shop.store.live_root / "pin"
    (first,) = log.glob("log-*.bin")
    os.rename(first, log / "log-00000000000000000005.bin")
    before = shop.store.current()
    for options in (("--from-active",), ("--bundle", shop.bundle, "--catalogue", "day1.jsonl")):
        if options[0] == "--bundle":
            options = (*options[:-1], shop.folder / "day1.jsonl")
        refused = shop.rebuild(options=options)
        assert refused.exit_code == 1
        assert "acknowledged writes are gone" in refused.stderr
    assert shop.store.current() == before


def test_rebuild_from_catalogue_without_the_log_of_the_active_release_is_refused(
    shop: Shop,
) -> None:
    shop.live(a=99.0)
    shop.rebuilt(options=("--from-active",))
    shutil.rmtree(shop.store.live_root)
    refused = shop.rebuild(shop.folder / "day1.jsonl")
    assert refused.exit_code == 1
    assert "entries up to 1 are in the release" in refused.stderr
    assert "--no-live" in refused.stderr
