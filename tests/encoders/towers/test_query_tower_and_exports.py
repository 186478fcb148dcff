"""The query tower is a Sentence-Transformers model, its exports agree with it, and a bundle is
whole or refused.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.datasets.dataset import load_sample
from encoders.errors import BundleError, ConfigError
from encoders.inference.onnx_forms import ReadTexts, export_forms, measure_parity, onnx_encode
from encoders.towers.bundle import load_bundle, save_bundle
from encoders.towers.pretrained_models import create_query_encoder
from encoders.towers.query_tower import QueryEncoder
from tests.helpers.training_examples import tiny_query_encoder


@pytest.fixture(scope="module")
def tower() -> QueryEncoder:
    return create_query_encoder("tiny-multilingual").eval()


@pytest.fixture(scope="module")
def queries() -> list[str]:
    return (
        load_sample(images=False)
        .split("train")["query"]
        .unique(maintain_order=True)
        .gather_every(200)
        .to_list()
    )


def test_query_encoder_vectors_are_unit_rows_in_input_order(
    tower: QueryEncoder, queries: list[str]
) -> None:
    together = tower.encode(queries[:50], batch_size=7)
    alone = np.concatenate([tower.encode([text]) for text in queries[:50]])
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_query_encoder_white_space_and_case_do_not_count(tower: QueryEncoder) -> None:
    a, b = tower.encode(["  Red\u00a0 HEART\n", "red heart"])
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_query_encoder_no_texts_give_no_rows(tower: QueryEncoder) -> None:
    assert tower.encode([]).shape == (0, 256)


def test_query_encoder_empty_and_very_long_texts_encode(tower: QueryEncoder) -> None:
    vectors = tower.encode(["", "word " * 5000, "\U0001f600" * 300])
    assert np.isfinite(vectors).all()


def test_query_encoder_in_sentence_transformers_gives_same_vectors(
    tower: QueryEncoder, queries: list[str], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tower.save(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode(queries[:64]), tower.encode(queries[:64]), atol=1e-5)


def test_query_encoder_saved_and_loaded_gives_same_vectors(
    tower: QueryEncoder, queries: list[str], tmp_path: Path
) -> None:
    tower.save(tmp_path)
    np.testing.assert_allclose(
        QueryEncoder.load(tmp_path).encode(queries[:20]), tower.encode(queries[:20]), atol=1e-6
    )


def test_query_encoder_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="2_Dense"):
        QueryEncoder.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/model.safetensors"])
def test_query_encoder_weights_cut_short_are_named(
    tower: QueryEncoder, name: str, tmp_path: Path
) -> None:
    tower.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(BundleError, match="Copy the bundle again"):
        QueryEncoder.load(tmp_path)


def test_create_query_encoder_unknown_name_lists_shipped() -> None:
    with pytest.raises(ConfigError, match="tiny-multilingual"):
        create_query_encoder("./no-such-folder")


@pytest.mark.slow
def test_create_query_encoder_from_scratch_keeps_shape_only(tower: QueryEncoder) -> None:
    fresh = create_query_encoder("tiny-multilingual", pretrained=False)
    mine, theirs = dict(tower.named_parameters()), dict(fresh.named_parameters())
    assert mine.keys() == theirs.keys()
    name = "transformer.embeddings.word_embeddings.weight"
    assert not np.allclose(mine[name].detach().numpy(), theirs[name].detach().numpy())


@pytest.mark.slow
def test_export_forms_stay_within_tolerance(
    tower: QueryEncoder, queries: list[str], tmp_path: Path
) -> None:
    reports = {report.form_id: report for report in export_forms(tower, tmp_path, queries)}
    assert reports["onnx-fp32"].cosine_min >= 0.999
    assert reports["onnx-int8"].cosine_min >= 0.99
    assert reports["onnx-int8"].overlap_at_10 >= 0.95
    assert reports["onnx-int8"].bytes < reports["onnx-fp32"].bytes / 2
    assert set(json.loads((tmp_path / "forms.json").read_text())) == {"onnx-fp32", "onnx-int8"}
    assert not list(tmp_path.glob(".export-*"))
    encode = onnx_encode(tmp_path / "query_encoder.int8.onnx")
    assert np.isfinite(encode(ReadTexts.of(tower, ["word " * 100]))).all()
    # The golden queries of a small rebuild: one text has no other text that could go missing
    for few in (1, 2, 3):
        report = measure_parity(tower, tmp_path, "onnx-fp32", queries[:few])
        assert (report.texts, report.overlap_at_10, report.within_tolerance) == (few, 1.0, True)


@pytest.mark.slow
def test_load_bundle_changed_file_is_refused(tower: QueryEncoder, tmp_path: Path) -> None:
    from encoders.towers.entity_features import EntityFeaturizer
    from encoders.towers.entity_tower import create_entity_encoder

    catalogue = load_sample(images=False).catalogue.head(200)
    entity = create_entity_encoder(EntityFeaturizer.fit(catalogue), table_rows=100, hidden=(32,))
    bundle = save_bundle(
        tmp_path / "model", tower, {"pin": entity, "product": entity, "ad": entity}
    )
    assert len(bundle.space_id) == 64
    vectors = bundle.embed_entities(catalogue.head(30))
    np.testing.assert_allclose(
        load_bundle(tmp_path / "model").embed_entities(catalogue.head(30)), vectors, atol=1e-6
    )
    weights = tmp_path / "model" / "query_encoder" / "2_Dense" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="space id"):
        load_bundle(tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": None},
        {"entity_types": 3},
        {"unified_entity_tower": None},
        {"format_version": "1"},
    ],
)
def test_load_bundle_config_of_another_shape_is_named(
    tmp_path: Path, change: dict[str, object]
) -> None:
    from encoders.towers.entity_features import EntityFeaturizer
    from encoders.towers.entity_tower import create_entity_encoder

    catalogue = pl.DataFrame({"id": ["a"], "entity_type": ["pin"], "title": ["red cat"]})
    entity = create_entity_encoder(
        EntityFeaturizer.fit(catalogue), table_rows=10, hidden=(8,), dimension=16
    )
    bundle = save_bundle(tmp_path / "model", tiny_query_encoder(), {"pin": entity})
    path = bundle.path / "config.json"
    config = {
        name: value
        for name, value in (json.loads(path.read_text()) | change).items()
        if value is not None
    }
    path.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"config\.json|bundle format"):
        load_bundle(tmp_path / "model")
