"""A store with two releases, ``r0`` and ``r1``, the second active."""

import shutil
from pathlib import Path

import pytest

from index_builder.building.build import build_release
from index_builder.releases.store import ReleaseStore
from tests.helpers.release_makers import make_bundle, make_input, quick


@pytest.fixture(scope="session")
def built_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build once; tests change copies."""
    folder = tmp_path_factory.mktemp("two-releases")
    store = ReleaseStore(folder / "store")
    bundle = make_bundle(folder / "bundle")
    for seed in (0, 1):
        inputs = {"pin": make_input("pin", 200, seed=seed), "ad": make_input("ad", 20)}
        build_release(inputs, bundle, store, quick(release_id=f"r{seed}"))
    return store.root


@pytest.fixture
def store(tmp_path: Path, built_store: Path) -> ReleaseStore:
    """Return a private copy of the store."""
    shutil.copytree(built_store, tmp_path / "store")
    return ReleaseStore(tmp_path / "store")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with tiny towers that embeds pins by title and description."""
    import polars as pl

    from benchmarks.small_releases import tiny_query_encoder
    from encoders.towers.bundle import save_bundle
    from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
    from encoders.towers.entity_tower import create_entity_encoder

    rows = pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["red barn number 1 2 3"]})
    config = EntityFeatureConfig(text_fields=("title", "description"))
    tower = create_entity_encoder(
        EntityFeaturizer.fit(rows, config),
        table_rows=64,
        token_dimension=32,
        hidden=(48,),
        dimension=16,
    )
    folder = tmp_path_factory.mktemp("tiny-bundle") / "model"
    return save_bundle(folder, tiny_query_encoder(0, dimension=16), {"pin": tower}).path
