import json

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional

from encoders.errors import BundleError, ConfigError
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder, EntityTowerConfig, create_entity_encoder

CATALOGUE = pl.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "title": ["red shoes", "blue sky over a lake", None, "赤い靴"],
        "board_titles": [["shoes", "to buy"], [], None, ["shoes"]],
        "visual": [[0.1, -0.2, 0.3], None, [1.0, 2.0, 3.0], None],
    }
)
FEATURIZER = EntityFeaturizer.fit(
    CATALOGUE, EntityFeatureConfig(text_fields=("title", "board_titles"), continuous={"visual": 3})
)
SMALL = {"table_rows": 50, "token_dimension": 16, "hidden": (32, 24), "dimension": 8}


def tower(seed: int = 0, **settings) -> EntityEncoder:
    torch.manual_seed(seed)
    return create_entity_encoder(FEATURIZER, **(SMALL | settings))


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.detach() * b).sum(1).mean().item()


def slow_forward(encoder: EntityEncoder, features) -> torch.Tensor:
    """The paper's formula, one token at a time."""
    rows = []
    for n in range(len(features)):
        text = encoder.field_bias.clone()
        for f in range(features.fields):
            place = n * features.fields + f
            tokens = features.token_ids[
                features.offsets[place] : features.offsets[place + 1]
            ].tolist()
            if tokens:
                summed = sum(
                    encoder.token_weights[t, 0] * encoder.table[encoder.rows[t, 0]]
                    + encoder.token_weights[t, 1] * encoder.table[encoder.rows[t, 1]]
                    for t in tokens
                )
                text = (
                    text
                    + (summed - summed.mean())
                    / (summed.var(unbiased=False) + 1e-5).sqrt()
                    * encoder.field_scale[f]
                )
        rows.append(torch.cat((text, features.continuous[n])))
    hidden = torch.stack(rows)
    for layer in encoder.mlp:
        hidden = layer(hidden)
    return hidden / hidden.norm(dim=1, keepdim=True)


def test_entity_tower_forward_and_gradients_equal_formula():
    encoder, features = tower(), FEATURIZER(CATALOGUE)
    with torch.no_grad():
        encoder.field_scale.add_(torch.randn_like(encoder.field_scale) * 0.1)
        encoder.field_bias.add_(torch.randn_like(encoder.field_bias))
    upstream = torch.randn(4, 8)
    gradients = []
    for function in (encoder, lambda x: slow_forward(encoder, x)):
        encoder.zero_grad()
        vectors = function(features)
        (vectors * upstream).sum().backward()
        gradients.append([vectors.detach(), *(p.grad.clone() for p in encoder.parameters())])
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)


def test_entity_tower_unit_vectors_do_not_depend_on_batch():
    encoder = tower()
    vectors = encoder.encode(CATALOGUE)
    assert vectors.shape == (4, 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(CATALOGUE, batch_size=1), vectors, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(CATALOGUE[[2, 0]]), vectors[[2, 0]], atol=1e-6)


def test_entity_tower_without_features_gives_one_finite_vector():
    encoder = tower()
    vectors = encoder.encode(pl.DataFrame({"id": ["x", "y"], "title": ["", None]}))
    np.testing.assert_allclose(vectors[0], vectors[1])
    assert np.isfinite(vectors).all()
    assert encoder.encode(CATALOGUE.head(0)).shape == (0, 8)


def test_entity_tower_without_vectors_needs_no_continuous_column():
    featurizer = EntityFeaturizer(
        EntityFeatureConfig(text_fields=("title",)), FEATURIZER.vocabulary
    )
    assert create_entity_encoder(featurizer, **SMALL).encode(CATALOGUE).shape == (4, 8)


def test_entity_tower_few_steps_pull_matching_rows_together():
    encoder, features = tower(), FEATURIZER(CATALOGUE)
    target = functional.normalize(torch.randn(4, 8), dim=1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    before = mean_cosine(encoder(features), target)
    for _ in range(60):
        optimizer.zero_grad()
        (1 - (encoder(features) * target).sum(1)).mean().backward()
        optimizer.step()
    assert mean_cosine(encoder(features), target) > max(before, 0.95)


def test_entity_tower_bfloat16_autocast_stays_close():
    encoder, features = tower(), FEATURIZER(CATALOGUE)
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(features)
    assert (low.float() * encoder(features)).sum(1).min().item() > 0.999


def test_entity_tower_saved_and_loaded_gives_same_bits(tmp_path):
    encoder = tower()
    encoder.save(tmp_path)
    loaded = EntityEncoder.load(tmp_path)
    assert loaded.config == encoder.config and not loaded.training
    np.testing.assert_array_equal(loaded.encode(CATALOGUE), encoder.encode(CATALOGUE))
    assert json.loads((tmp_path / "config.json").read_text())["table_rows"] == 50


def test_entity_tower_without_featurizer_saves_and_takes_batches(tmp_path):
    encoder = EntityEncoder(tower().config)
    encoder.save(tmp_path)
    loaded = EntityEncoder.load(tmp_path)
    with pytest.raises(ConfigError, match="without a featuriser"):
        loaded.encode(CATALOGUE)
    np.testing.assert_array_equal(
        loaded.encode_batch(FEATURIZER(CATALOGUE)), encoder.encode_batch(FEATURIZER(CATALOGUE))
    )


def test_entity_tower_load_damaged_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no readable entity tower"):
        EntityEncoder.load(tmp_path)
    tower().save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"format_version": 7}, "format 7, but this code reads 1"),
        ({"table_rows": 49}, "do not belong together"),
        ({"unknown": 1}, "do not belong together"),
        ({"dimension": 0}, "do not belong together"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(BundleError, match=message):
            EntityEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(BundleError, match="no readable entity tower"):
        EntityEncoder.load(tmp_path)


def test_entity_tower_load_another_vocabulary_is_refused(tmp_path):
    tower().save(tmp_path)
    EntityFeaturizer.fit(CATALOGUE.head(1), FEATURIZER.config).save(tmp_path)
    with pytest.raises(BundleError, match="token ids, but the vocabulary has"):
        EntityEncoder.load(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        {"table_rows": 0},
        {"dimension": -1},
        {"hidden": (0,)},
        {"continuous_width": -1},
        {"dropout": 1.0},
    ],
)
def test_entity_tower_config_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        EntityTowerConfig(**({"vocabulary_size": 5, "fields": 1} | bad))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_entity_tower_on_gpu_equals_cpu():
    encoder = tower()
    on_cpu = encoder.encode(CATALOGUE)
    np.testing.assert_allclose(encoder.cuda().encode(CATALOGUE), on_cpu, atol=1e-5)


def test_entity_tower_dropout_in_training_only(tmp_path):
    encoder, features = tower(dropout=0.5), FEATURIZER(CATALOGUE)
    plain = tower()
    plain.mlp[-1].load_state_dict(encoder.mlp[-1].state_dict())
    with torch.no_grad():
        assert not torch.equal(encoder.train()(features), encoder(features))
        assert torch.equal(encoder.eval()(features), plain.eval()(features))
    encoder.save(tmp_path)
    assert torch.equal(EntityEncoder.load(tmp_path)(features), encoder(features))
