"""A store with releases ``a1`` and ``a2`` of one space and ``b1`` of another, the first active."""

import shutil
from pathlib import Path

import pytest

from benchmarks.small_releases import small_release, write_small_bundle
from index_builder.releases.store import ReleaseStore

RELEASES = {"a1": "a", "a2": "a", "b1": "b"}
"""The space of each release; every id begins with the release's name."""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publish once; tests change copies."""
    folder = tmp_path_factory.mktemp("three-releases")
    store = ReleaseStore(folder / "store")
    encoders = {
        space: write_small_bundle(folder / space, seed) for seed, space in ((1, "a"), (2, "b"))
    }
    for name, space in RELEASES.items():
        small_release(
            store,
            folder / space,
            encoders[space],
            release_id=name,
            counts={"pin": 60},
            id_prefix=f"{name}:",
            activate=name == "a1",
        )
    return store.root


@pytest.fixture
def store(published: Path, tmp_path: Path) -> ReleaseStore:
    """Return a private copy of the store."""
    shutil.copytree(published, tmp_path / "store")
    return ReleaseStore(tmp_path / "store")
