"""A bundle holds all that its towers read, whoever loads it and from wherever."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.errors import BundleError
from encoders.evaluation.report import engaged_depth
from encoders.inference.batch_embedding import content_hashes
from encoders.towers.bundle import ModelBundle, load_bundle, save_bundle
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder, create_entity_encoder
from tests.helpers.training_examples import tiny_query_encoder, world

SHAPE = {"table_rows": 50, "token_dimension": 16, "hidden": (16,), "dimension": 16}


def bundle_of(path: Path, config: EntityFeatureConfig) -> ModelBundle:
    featurizer = EntityFeaturizer.fit(world().catalogue, config)
    tower = create_entity_encoder(featurizer, **SHAPE)
    return save_bundle(path, tiny_query_encoder(), {"pin": tower, "product": tower})


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelBundle:
    """A bundle whose features name a frozen tower by a relative path."""
    monkeypatch.chdir(tmp_path)
    tiny_query_encoder(1).save(Path("frozen"))
    return bundle_of(tmp_path / "model", EntityFeatureConfig(text_embedding="frozen"))


def test_load_bundle_from_elsewhere_without_its_frozen_tower_gives_same_vectors(
    embedded: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embedded.embed_entities(world().catalogue)
    shutil.rmtree(tmp_path / "frozen")
    (tmp_path / "else").mkdir()
    shutil.move(embedded.path, tmp_path / "else" / "moved")
    monkeypatch.chdir("/")
    moved = load_bundle(tmp_path / "else" / "moved")
    assert moved.space_id == embedded.space_id
    np.testing.assert_allclose(moved.embed_entities(world().catalogue), expected, atol=1e-6)
    again = save_bundle(tmp_path / "again", moved.query_encoder, moved.entity_encoders)
    assert again.space_id == embedded.space_id


def test_load_bundle_frozen_tower_is_part_of_the_space(embedded: ModelBundle) -> None:
    weights = embedded.path / "entity_encoder" / "text_tower" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="space id"):
        load_bundle(embedded.path)


def test_entity_encoder_load_frozen_tower_of_version_0_1_gone_is_named(
    embedded: ModelBundle,
) -> None:
    folder = embedded.path / "entity_encoder"
    shutil.rmtree(folder / "text_tower")
    described = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**described, "text_embedding": "gone"}))
    with pytest.raises(BundleError, match="is not there"):
        EntityEncoder.load(folder)


def test_save_bundle_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        bundle = bundle_of(tmp_path / "model", EntityFeatureConfig())
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (bundle.path, *bundle.path.rglob("*"))}
    wrong = {str(p): oct(m) for p, m in modes.items() if m != (0o755 if p.is_dir() else 0o644)}
    assert wrong == {}


# ------------------------------------------------------------------------------ engaged queries
MANY = pl.DataFrame(
    {
        "id": ["a", "b"],
        "entity_type": ["pin", "pin"],
        "title": ["red chair", "blue lamp"],
        "engaged_queries": [["chair", "sofa", "bed"], ["lamp"]],
    }
)


def tokens(depth: int, catalogue: pl.DataFrame) -> list[int]:
    config = EntityFeatureConfig(text_fields=("engaged_queries",), engaged_queries=depth)
    vocabulary = EntityFeaturizer.fit(
        MANY, EntityFeatureConfig(text_fields=("engaged_queries",), engaged_queries=0)
    ).vocabulary
    return EntityFeaturizer(config, vocabulary)(catalogue).token_ids.tolist()


def test_featurizer_reads_no_more_engaged_queries_than_its_depth() -> None:
    cut = MANY.with_columns(pl.col("engaged_queries").list.head(2))
    assert tokens(2, MANY) == tokens(0, cut)
    assert len(tokens(0, MANY)) > len(tokens(2, MANY)) > len(tokens(1, MANY))


def test_content_hashes_engaged_queries_beyond_the_depth_do_not_count() -> None:
    config = EntityFeatureConfig(engaged_queries=2)
    cut = MANY.with_columns(pl.col("engaged_queries").list.head(2))
    assert content_hashes(MANY, config) == content_hashes(cut, config)
    deeper = EntityFeatureConfig(engaged_queries=3)
    assert content_hashes(MANY, deeper) != content_hashes(cut, deeper)


def test_bundle_depth_is_stored_and_asked_for_by_evaluation(tmp_path: Path) -> None:
    deep = bundle_of(tmp_path / "deep", EntityFeatureConfig(engaged_queries=50))
    shallow = bundle_of(tmp_path / "shallow", EntityFeatureConfig(engaged_queries=3))
    assert load_bundle(deep.path).engaged_queries == 50
    assert engaged_depth([shallow]) == 3
    assert engaged_depth([shallow, deep]) == 50
    assert engaged_depth([deep], 7) == 7
    assert engaged_depth([]) == 20


def test_bundle_of_version_0_1_reads_all_engaged_queries(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "model", EntityFeatureConfig(engaged_queries=1))
    features = bundle.path / "entity_encoder" / "features.json"
    described = json.loads(features.read_text())
    del described["engaged_queries"]
    features.write_text(json.dumps(described))
    featurizer = EntityEncoder.load(bundle.path / "entity_encoder").featurizer
    assert featurizer is not None
    assert featurizer.config.engaged_queries == 0
