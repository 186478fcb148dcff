"""Words, votes and weights of a release: built from texts and pairs, kept by later rebuilds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from encoders.errors import DataError
from index_builder.building.build import build_release
from index_builder.building.fusion_build import with_engagements
from index_builder.building.inputs import EntityInput
from index_builder.building.sources import from_release, texts_for
from index_builder.fusion.engagements import CalibrationQueries, Engagements, NonsenseQueries
from index_builder.fusion.nonsense import nonsense_queries
from index_builder.lexical.scan import ScanRequest
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import SPACE, D, make_bundle, make_input, quick, unit_vectors

COUNT = 120
TITLES = [f"lamp model{i} sku{1000 + i}" for i in range(COUNT)]
KNOWN = [f"known query {i}" for i in range(40)]
EXACT = quick("exact")


def pins(**changes: Any) -> EntityInput:
    texts = pl.DataFrame({"title": TITLES})
    return replace(make_input("pin", COUNT, seed=1), texts=texts, **changes)


def queries() -> EntityInput:
    return make_input("query", len(KNOWN), seed=2, ids=KNOWN, attributes=None)


def engagements() -> Engagements:
    """Known queries vote for pins; asked ones name a pin by words that no vector knows."""
    pairs = pl.DataFrame(
        {"query": KNOWN, "entity_id": [f"pin-{i % COUNT}" for i in range(len(KNOWN))]}
    )
    asked = [f"sku{1000 + i}" for i in range(60)]
    relevant = [[f"pin-{i}"] for i in range(60)]
    return Engagements(pairs, CalibrationQueries(asked, unit_vectors(60, 9), relevant))


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "store")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def rows_of(release: Release, text: str) -> list[str]:
    lexical = release.entities["pin"].lexical
    assert lexical is not None
    rows = lexical.search(lexical.query(text), ScanRequest(k=1)).rows
    return release.entities["pin"].ids.take(rows.astype(np.int64))


def test_build_texts_and_pairs_give_words_votes_and_weights(
    store: ReleaseStore, bundle: Path
) -> None:
    inputs = {"pin": pins(engagements=engagements()), "query": queries(), "ad": make_input("ad")}
    build_release(inputs, bundle, store, EXACT)
    with store.open_current() as release:
        facts = release.manifest.entities["pin"].index
        assert facts["lexical"]["fields"] == ["title"]
        assert facts["votes"]["pairs"] == len(KNOWN)
        assert facts["fusion"]["enabled"] and facts["fusion"]["gain_low"] > 0
        assert facts["fusion"]["weights"]["lexical"] > 0
        assert [point["k"] for point in facts["fusion"]["recall"]] == [10, 100]
        assert facts["fusion"]["recall"][0]["recall"] > 0.99, "the index is exact"
        assert rows_of(release, "sku1033") == ["pin-33"]
        fused = release.fused["pin"]
        assert fused.votes is not None and fused.fusion is not None
        found = fused.search(fused.query("sku1033", unit_vectors(1, 77)[0]), 3)
        assert found.ids[0] == "pin-33"
        assert release.entities["ad"].lexical is None
        assert release.fused["ad"].fusion is None


@pytest.mark.slow
def test_build_twice_gives_the_same_bytes(tmp_path: Path, bundle: Path) -> None:
    digests = []
    for name in ("a", "b"):
        store = ReleaseStore(tmp_path / name)
        inputs = {"pin": pins(engagements=engagements()), "query": queries()}
        build_release(inputs, bundle, store, replace(EXACT, deterministic=True))
        with store.open_current() as release:
            digests.append({n: r.sha256 for n, r in release.manifest.files.items()})
    assert {"pin/lexical.rows", "pin/votes.rows", "pin/fusion.json"} <= set(digests[0])
    assert digests[0] == digests[1]


def test_rebuild_from_active_keeps_words_votes_and_weights(
    store: ReleaseStore, bundle: Path
) -> None:
    inputs = {"pin": pins(engagements=engagements()), "query": queries()}
    build_release(inputs, bundle, store, EXACT)
    with LiveLogWriter(store.live_root, "pin", D) as writer:
        fresh = LiveEntry(
            id="new",
            vector=unit_vectors(1, 55)[0],
            space_id=SPACE,
            attributes={"title": "zebra sku9999"},
        )
        writer.write([fresh, LiveEntry(id="pin-33")])
    again, folder = from_release(store, ())
    build_release(again, folder, store, EXACT)
    with store.open_current() as release:
        assert rows_of(release, "sku9999") == ["new"]
        assert rows_of(release, "sku1033") != ["pin-33"]
        assert rows_of(release, "sku1034") == ["pin-34"]
        fused = release.fused["pin"]
        assert fused.votes is not None and fused.fusion is not None and fused.queries is not None
        known = fused.votes.pairs(fused.queries.ids, fused.entities.ids)
        assert known.height == len(KNOWN) - 1
        assert fused.fusion.enabled
        assert fused.fusion.recall == (), "it was measured of other indexes"


@pytest.mark.slow
def test_rebuild_of_other_known_queries_drops_votes_of_types_taken_over(
    store: ReleaseStore, bundle: Path
) -> None:
    inputs = {"pin": pins(engagements=engagements()), "query": queries(), "ad": make_input("ad")}
    build_release(inputs, bundle, store, EXACT)
    build_release({"ad": make_input("ad", seed=8)}, bundle, store, EXACT)
    with store.open_current() as release:
        assert release.fused["pin"].votes is not None
    build_release({"query": make_input("query", 30, seed=4)}, bundle, store, EXACT)
    with store.open_current() as release:
        assert release.fused["pin"].votes is None and release.fused["pin"].fusion is None
        assert "votes" not in release.manifest.entities["pin"].index
        assert rows_of(release, "sku1033") == ["pin-33"]


def test_build_pairs_without_known_queries_fit_words_alone(
    store: ReleaseStore, bundle: Path
) -> None:
    build_release({"pin": pins(engagements=engagements())}, bundle, store, EXACT)
    with store.open_current() as release:
        fused = release.fused["pin"]
        assert fused.votes is None
        assert fused.fusion is not None and fused.fusion.enabled


@pytest.mark.slow
def test_build_with_enough_queries_fits_a_query_gate(store: ReleaseStore, bundle: Path) -> None:
    asked = [f"lamp sku{1000 + i}" for i in range(COUNT)]
    texts = nonsense_queries(300)
    calibration = CalibrationQueries(
        asked,
        unit_vectors(COUNT, 9),
        [[f"pin-{i}"] for i in range(COUNT)],
        NonsenseQueries(texts, unit_vectors(300, 11)),
    )
    pairs = engagements().pairs
    inputs = {"pin": pins(engagements=Engagements(pairs, calibration)), "query": queries()}
    build_release(inputs, bundle, store, EXACT)
    with store.open_current() as release:
        gate = release.manifest.entities["pin"].index["fusion"]["gate"]
        assert gate["nonsense_emptied"] > 0.9 and gate["hits_lost"] <= 0.05
        fused = release.fused["pin"]
        vector = unit_vectors(1, 77)[0]
        for text, emptied in ((texts[0], True), ("lamp sku1033", False)):
            found = fused.search(fused.query(text, vector), 3, gate=True)
            assert (found.plan == "gated") is emptied and bool(found.ids) is not emptied


def test_with_engagements_splits_pairs_and_leaves_private_queries_out() -> None:
    pairs = pl.DataFrame(
        {
            "query": ["a", "b", "b", "c", "d"],
            "entity_type": ["pin"] * 5,
            "entity_id": ["pin-1", "pin-2", "pin-3", "pin-4", "pin-5"],
            "split": ["train", "train", "train", "validation", "heldout"],
            "count": [1] * 5,
            "users": [2, 3, 2, 9, 9],
        }
    )
    asked: list[list[str]] = []

    def embed(texts: object) -> np.ndarray:
        asked.append(list(texts))  # type: ignore[call-overload]
        return unit_vectors(1, 1)

    changed = with_engagements({"pin": pins(), "ad": make_input("ad")}, pairs, embed, 3)
    found = changed["pin"].engagements
    assert found is not None and found.calibration is not None
    assert found.pairs["query"].to_list() == ["b", "b"]
    assert found.calibration.texts == ["c"] and asked[0] == ["c"]
    assert found.calibration.nonsense is not None
    assert asked[1:] == [found.calibration.nonsense.texts]
    assert changed["ad"].engagements is None
    with pytest.raises(DataError, match="min-query-users"):
        with_engagements({"pin": pins()}, pairs, embed, 100)


def test_texts_for_rows_follow_ids_and_missing_ones_are_empty() -> None:
    catalogue = pl.DataFrame(
        {
            "id": ["b", "a", "x"],
            "entity_type": ["pin", "pin", "ad"],
            "title": ["blue", "red", "other"],
            "board_titles": [["one", "two"], None, None],
        }
    )
    texts = texts_for(catalogue, "pin", ["a", "b", "c"])
    assert texts is not None
    assert texts.to_dict(as_series=False) == {
        "title": ["red", "blue", ""],
        "board_titles": ["", "one\ntwo", ""],
    }
    assert texts_for(catalogue.drop("title", "board_titles"), "pin", ["a"]) is None
