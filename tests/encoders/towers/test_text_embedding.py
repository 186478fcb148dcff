"""The text embedding is the frozen tower's view of title and engaged queries, and the entity tower
starts at it.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from encoders.errors import BundleError, ConfigError
from encoders.inference.batch_embedding import content_hashes
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder, EntityTowerConfig, create_entity_encoder
from encoders.towers.shipped_tower import SHIPPED_TOWERS
from encoders.towers.text_embedding import TITLE_WEIGHT, TextEmbedding, text_embedding
from tests.helpers.training_examples import tiny_query_encoder

CATALOGUE = pl.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "entity_type": ["pin"] * 4,
        "title": ["red heart", None, "red heart", ""],
        "engaged_queries": [["love", "coeur"], ["love"], [], []],
    }
)


@pytest.fixture(scope="module")
def encoder() -> EntityEncoder:
    featurizer = EntityFeaturizer.fit(
        CATALOGUE, EntityFeatureConfig(text_embedding="tiny-multilingual")
    )
    torch.manual_seed(0)
    return create_entity_encoder(featurizer, table_rows=50, hidden=(16,))


def test_text_embedding_equals_formula() -> None:
    vectors = text_embedding("tiny-multilingual")(CATALOGUE)
    title, love, coeur = text_embedding("tiny-multilingual").encoder.encode(
        ["red heart", "love", "coeur"]
    )
    mean = (love + coeur) / np.linalg.norm(love + coeur)
    expected = mean + TITLE_WEIGHT * title
    np.testing.assert_allclose(vectors[0], expected / np.linalg.norm(expected), atol=2e-3)
    np.testing.assert_allclose(vectors[1], love, atol=2e-3)
    np.testing.assert_allclose(vectors[2], title, atol=2e-3)
    assert not vectors[3].any()


def test_text_embedding_full_text_is_encoded_as_one() -> None:
    rows = CATALOGUE.with_columns(
        category=pl.Series(["love and hate", "", None, ""]),
        board_titles=pl.Series([["symbols"], [], None, []]),
    )
    vectors = text_embedding("tiny-multilingual")(rows, 2.0)
    encode = text_embedding("tiny-multilingual").encoder.encode
    plain = text_embedding("tiny-multilingual")(rows)
    title, love, coeur, whole = encode(
        ["red heart", "love", "coeur", "red heart. love and hate. symbols"]
    )
    mean = (love + coeur) / np.linalg.norm(love + coeur)
    expected = mean + TITLE_WEIGHT * title + 2 * whole
    np.testing.assert_allclose(vectors[0], expected / np.linalg.norm(expected), atol=2e-3)
    np.testing.assert_allclose(
        vectors[1:], plain[1:], atol=2e-3
    )  # nothing beside a title or a query: nothing changes


def test_text_embedding_full_text_holds_first_engaged_queries() -> None:
    rows = CATALOGUE.with_columns(category=pl.Series(["symbols", "", None, "empty"]))
    embed = text_embedding("tiny-multilingual")
    title, love, coeur, one, two = embed.encoder.encode(
        [
            "red heart",
            "love",
            "coeur",
            "red heart. symbols. love",
            "red heart. symbols. love. coeur",
        ]
    )
    mean = (love + coeur) / np.linalg.norm(love + coeur)
    for count, whole in ((1, one), (2, two), (9, two)):
        expected = mean + TITLE_WEIGHT * title + whole
        np.testing.assert_allclose(
            embed(rows, 1.0, count)[0], expected / np.linalg.norm(expected), atol=2e-3
        )
    np.testing.assert_allclose(
        embed(rows, 1.0, 1)[2:], embed(rows, 1.0)[2:], atol=2e-3
    )  # no engaged queries
    np.testing.assert_allclose(
        embed(rows.select("engaged_queries"), 1.0, 1)[1], love, atol=2e-3
    )  # nothing else to read


def test_text_embedding_cache_keeps_bound_and_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("encoders.towers.text_embedding.CACHED_TEXTS", 3)
    embedding = TextEmbedding("tiny-multilingual")
    before = embedding(CATALOGUE)
    assert set(embedding._cache) == {"red heart", "love", "coeur", ""}
    np.testing.assert_array_equal(embedding(CATALOGUE.head(1)), before[:1])
    other = pl.DataFrame({"title": ["blue", "love"]})
    np.testing.assert_array_equal(embedding(other)[1], before[1])
    assert set(embedding._cache) == {"love", "blue", ""}
    np.testing.assert_allclose(
        embedding(CATALOGUE), before, atol=2e-3
    )  # embedded again, in another batch: the last bits may differ


def test_content_hashes_full_text_columns_count() -> None:
    config = EntityFeatureConfig(
        text_fields=("title",), text_embedding="tiny-multilingual", full_text_weight=1.0
    )
    assert config.text_columns == {
        "title",
        "engaged_queries",
        "description",
        "category",
        "board_titles",
    }
    changed = CATALOGUE.with_columns(category=pl.lit("art"))
    assert content_hashes(CATALOGUE, config)[0] != content_hashes(changed, config)[0]
    plain = EntityFeatureConfig(text_fields=("title",), text_embedding="tiny-multilingual")
    assert content_hashes(CATALOGUE, plain) == content_hashes(changed, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"full_text_weight": 1.0},
        {"text_embedding": "tiny-multilingual", "full_text_weight": -1.0},
        {"text_embedding": "tiny-multilingual", "full_text_queries": 5},
        {"text_embedding": "tiny-multilingual", "full_text_weight": 1.0, "full_text_queries": -1},
    ],
)
def test_entity_feature_config_impossible_full_text_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="full_text"):
        EntityFeatureConfig(**settings)


def test_entity_tower_untrained_is_near_text_embedding(encoder: EntityEncoder) -> None:
    vectors = encoder.encode(CATALOGUE.head(3))
    assert (
        np.einsum("nd,nd->n", vectors, text_embedding("tiny-multilingual")(CATALOGUE.head(3))).min()
        > 0.9
    )


def test_entity_tower_load_other_text_embedding_is_refused(
    encoder: EntityEncoder, tmp_path
) -> None:
    encoder.save(tmp_path)
    np.testing.assert_allclose(
        EntityEncoder.load(tmp_path).encode(CATALOGUE), encoder.encode(CATALOGUE), atol=1e-6
    )
    features = tmp_path / "features.json"
    fingerprint = encoder.featurizer.config.text_embedding_fingerprint
    features.write_text(features.read_text().replace(fingerprint, "0" * 64))
    with pytest.raises(BundleError, match="fingerprint"):
        EntityEncoder.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_featurizer_save_tower_replaced_meanwhile_is_not_saved(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = tmp_path / "tower"
    if packed:
        shutil.copytree(SHIPPED_TOWERS["tiny-multilingual"], tower)
    else:
        tiny_query_encoder().save(tower)
    known: dict[str, TextEmbedding] = {}
    monkeypatch.setattr("encoders.towers.text_embedding._EMBEDDINGS", known)
    config = EntityFeatureConfig(text_embedding=str(tower))
    featurizer = EntityFeaturizer.fit(CATALOGUE, config)
    expected = featurizer(CATALOGUE).continuous
    shutil.rmtree(tower)
    tiny_query_encoder(seed=9).save(tower)
    featurizer.save(tmp_path / "saved")
    known.clear()
    found = EntityFeaturizer.load(tmp_path / "saved")(CATALOGUE).continuous
    torch.testing.assert_close(found, expected)
    known.clear()
    with pytest.raises(BundleError, match="fingerprint"):
        featurizer.save(tmp_path / "again")


def test_featurizer_load_former_setting_names_are_read(tmp_path: Path) -> None:
    config = EntityFeatureConfig(
        text_embedding="tiny-multilingual", full_text_weight=2.0, full_text_queries=3
    )
    EntityFeaturizer.fit(CATALOGUE, config).save(tmp_path)
    features = tmp_path / "features.json"
    features.write_text(features.read_text().replace('"full_text_', '"whole_text_'))
    assert "full_text" not in features.read_text()
    loaded = EntityFeaturizer.load(tmp_path).config
    assert replace(loaded, text_embedding="tiny-multilingual") == config


def test_entity_tower_config_residual_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="residual_width"):
        EntityTowerConfig(vocabulary_size=1, fields=1, continuous_width=256, residual_width=100)
