"""Incremental rebuilds: which graphs are carried over, what a release says of it, when not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.ann.symqg import symqg_available
from index_builder.building import entity_build
from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput
from index_builder.errors import GateFailed
from index_builder.native import Engine
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.calibration import check_gate
from tests.helpers.release_makers import SPACE, make_bundle, make_input, quick, unit_vectors

pytestmark = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")

N = 1_000


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "store")


def pins(changed: int = 0, gone: int = 0) -> EntityInput:
    """``N`` pins of which the first ``changed`` have other vectors and the last are gone."""
    vectors = unit_vectors(N, 0)
    vectors[:changed] = unit_vectors(N, 1)[:changed]
    return make_input("pin", N - gone, vectors=vectors[: N - gone])


def built(
    bundle: Path, store: ReleaseStore, pin: EntityInput, kind: str = "int8-graph", **config: Any
) -> dict[str, Any]:
    """Build and activate a release; return what it says of how its graph was made."""
    release = build_release({"pin": pin}, bundle, store, quick(kind, **config))
    manifest = read_manifest(store.path_of(release))
    incremental: dict[str, Any] = manifest.measured["entities"]["pin"]["incremental"]
    return incremental


def test_rebuild_after_few_changes_carries_the_graph_over(
    bundle: Path, store: ReleaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert built(bundle, store, pins()) == {
        "used": False,
        "why": "no release is active",
    }
    with caplog.at_level(logging.INFO):
        second = built(bundle, store, pins(changed=30, gone=20))
    assert second["used"] and second["changed_since_full"] == pytest.approx(50 / 980, abs=1e-4)
    assert (second["kept"], second["inserted"], second["removed"]) == (950, 30, 50)
    assert "950 vectors carried over, 30 inserted, 50 removed" in caplog.text
    with store.open_current() as release:
        release.replay_golden()
        index = release.entity("pin")
        assert index.describe()["incremental"]["kept"] == 950
        vectors = pins(changed=30, gone=20).vectors
        hits = [index.search(vectors[row], 1).ids == [f"pin-{row}"] for row in range(0, 980, 7)]
        assert np.mean(hits) > 0.98
        found = index.search(unit_vectors(N, 0)[N - 1], 10, filter="number >= 0").ids
        assert f"pin-{N - 1}" not in found


@pytest.mark.slow
def test_rebuild_adds_up_changes_until_a_full_build(bundle: Path, store: ReleaseStore) -> None:
    built(bundle, store, pins())
    shares = [built(bundle, store, pins(changed=n)) for n in (100, 180, 260, 300)]
    assert [s["used"] for s in shares] == [True, True, False, True]
    assert "26.0% of the vectors changed" in shares[2]["why"]
    assert [s.get("changed_since_full") for s in shares] == [0.1, 0.18, None, 0.04]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"incremental": False}, "a full build was asked for"),
        ({"deterministic": True}, "a deterministic build rests on its input alone"),
        ({"kind": "hnsw"}, "the kind is hnsw and was int8-graph"),
        ({"kind": "exact"}, "exact"),
    ],
)
def test_rebuild_of_other_settings_builds_in_full(
    bundle: Path, store: ReleaseStore, config: dict[str, Any], why: str
) -> None:
    built(bundle, store, pins())
    second = built(bundle, store, pins(changed=10), **config)
    assert not second["used"] and why in second["why"]


def test_rebuild_of_another_space_builds_in_full(tmp_path: Path, store: ReleaseStore) -> None:
    built(make_bundle(tmp_path / "one"), store, pins())
    other = make_bundle(tmp_path / "two", "0b" * 32)
    second = built(other, store, replace(pins(), space_id="0b" * 32))
    assert second == {"used": False, "why": "the vectors are of another space"}
    assert SPACE != "0b" * 32


def test_rebuild_over_damaged_release_builds_in_full(
    bundle: Path, store: ReleaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    built(bundle, store, pins())
    path = store.path_of(store.current() or "") / "pin" / "index.codes.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    second = built(bundle, store, pins(changed=10))
    assert not second["used"] and "files differ from their manifest" in second["why"]
    assert "differ from their manifest; its graph is not carried over" in caplog.text


def test_rebuild_that_misses_the_gate_builds_in_full(
    bundle: Path, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(bundle, store, pins())
    calls = []

    def gate(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise GateFailed("recall is below the target")
        check_gate(*arguments)

    monkeypatch.setattr(entity_build, "check_gate", gate)
    second = built(bundle, store, pins(changed=10))
    assert second == {"used": False, "why": "the graph that was carried over missed the gate"}
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.skipif(not symqg_available(), reason="rabitqlib is not installed")
def test_rebuild_by_auto_carries_links_of_symqg_over(bundle: Path, store: ReleaseStore) -> None:
    vectors = unit_vectors(2_100, 0)
    first = make_input("pin", 2_100, vectors=vectors)
    built(bundle, store, first, "symqg")
    changed = vectors.copy()
    changed[:40] = unit_vectors(40, 1)
    second = built(bundle, store, make_input("pin", 2_100, vectors=changed), "auto")
    assert second["used"] and second["inserted"] == 40
    with store.open_current() as release:
        index = release.entity("pin")
        assert index.kind == "int8-graph"
        assert np.mean([index.search(changed[i], 1).ids == [f"pin-{i}"] for i in range(60)]) > 0.9


@pytest.mark.slow
def test_rebuild_over_kind_without_links_says_which_kind(bundle: Path, store: ReleaseStore) -> None:
    built(bundle, store, pins(), "hnsw")
    second = built(bundle, store, pins(changed=10))
    assert second["why"] == "links of kind hnsw are not read from a release"


def test_rebuild_of_type_new_to_the_release_says_so(bundle: Path, store: ReleaseStore) -> None:
    first = build_release({"pin": pins()}, bundle, store, quick("int8-graph"))
    products = make_input("product", 300)
    second = build_release({"product": products}, bundle, store, quick("int8-graph"))
    measured = read_manifest(store.path_of(second)).measured["entities"]["product"]
    why = f"{first} holds no product index"
    assert measured["incremental"] == {"used": False, "why": why}
