"""Releases whose manifests hold names of index kinds of an earlier version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from index_builder.building.build import build_release
from index_builder.errors import IndexFormatError
from index_builder.native import Engine
from index_builder.releases.manifest import MANIFEST_NAME
from index_builder.releases.release import Release, read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files
from tests.helpers.release_makers import make_bundle, make_input, quick, unit_vectors


def _release_of(folder: Path, kind: str) -> Path:
    """A whole release of that kind, as version 0.1.0 wrote it."""
    store = ReleaseStore(folder / "store")
    built_kind = kind if kind in ("swift", "lean") else "exact"
    release_id = build_release(
        {"pin": make_input("pin", 2_200)},
        make_bundle(folder / "bundle"),
        store,
        quick(built_kind, release_id="r1"),
    )
    path = store.path_of(release_id)
    meta = json.loads((path / "pin" / "index.json").read_text())
    meta["facts"]["kind"] = kind
    meta["facts"]["parameters"].pop("sketched_links", None)
    (path / "pin" / "index.json").write_text(json.dumps(meta))
    manifest = read_manifest(path)
    pin = manifest.entities["pin"]
    entities = {"pin": replace(pin, index={**pin.index, **meta["facts"]})}
    written = replace(manifest, entities=entities, files=record_files(path))
    (path / MANIFEST_NAME).write_bytes(written.to_bytes())
    return path


@pytest.mark.parametrize(("kind", "sketched"), [("swift", True), ("lean", False)])
def test_release_of_a_renamed_kind_opens_and_proves_itself(
    kind: str, sketched: bool, tmp_path: Path
) -> None:
    if Engine is None:
        pytest.skip("the extension was not compiled")
    path = _release_of(tmp_path, kind)
    assert read_manifest(path).entities["pin"].index["kind"] == kind
    with Release.open(path) as release:
        pin = release.entity("pin")
        assert pin.kind == pin.describe()["kind"] == "int8-graph"
        assert pin.ann.config.sketched_links is sketched
        assert release.replay_golden()["pin"].recall > 0.5
        assert pin.search(unit_vectors(2_200, 0)[7], 1).ids == ["pin-7"]


@pytest.mark.parametrize("kind", ["rabitq", "faiss-ivf"])
def test_release_of_a_retired_kind_is_refused_with_another_kind_to_use(
    kind: str, tmp_path: Path
) -> None:
    path = _release_of(tmp_path, kind)
    with pytest.raises(IndexFormatError, match=f"{kind}.*no longer read.*Rebuild.*--index"):
        Release.open(path)
