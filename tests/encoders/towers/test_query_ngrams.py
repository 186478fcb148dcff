"""A tower with an n-gram table: every way to run it gives one vector, and bundles hold it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.compatibility.adapter import SpaceAdapter
from encoders.errors import BundleError
from encoders.inference.onnx_forms import export_forms
from encoders.towers.bundle import compute_space_id, save_bundle
from encoders.towers.query_ngrams import QueryNgrams
from encoders.towers.query_tower import QueryEncoder
from retrieval.encoding.query_encoder import OnnxQueryEncoding, TorchQueryEncoding
from tests.helpers.training_examples import COLOURS, PINS, tiny_query_encoder

TEXTS = [f"{colour} {thing}" for colour in COLOURS for thing in PINS] + ["", "誕生日", "x" * 300]


def tower_with_ngrams(buckets: int = 256) -> QueryEncoder:
    tower = tiny_query_encoder(1).eval()
    tower.ngrams = QueryNgrams(buckets, tower.dimension)
    torch.manual_seed(0)
    with torch.no_grad():
        tower.ngrams.table[:buckets] = torch.randn(buckets, tower.dimension).half().float()
        tower.ngrams.weights[:buckets] = torch.rand(buckets).half().float()
    return tower


def test_encode_adds_the_weighted_sum_of_distinct_buckets() -> None:
    tower = tower_with_ngrams()
    assert tower.ngrams is not None
    text = "red red chair"
    buckets = torch.from_numpy(np.unique(tower.ngrams.read([text])[0]).astype(np.int64))
    weights = tower.ngrams.weights[buckets]
    added = tower.ngrams.table[buckets].sum(0) / weights.square().sum().sqrt()
    ids, mask = torch.tensor(tower.tokenize([text])), torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(tower.project(ids, mask)[0] + added, dim=0)
    np.testing.assert_allclose(tower.encode([text])[0], expected.detach(), atol=1e-5)
    alone = np.concatenate([tower.encode([t]) for t in TEXTS])
    np.testing.assert_allclose(tower.encode(TEXTS, batch_size=7), alone, atol=1e-5)


def test_saved_and_loaded_tower_gives_same_vectors(tmp_path: Path) -> None:
    tower = tower_with_ngrams()
    tower.save(tmp_path)
    loaded = QueryEncoder.load(tmp_path)
    np.testing.assert_allclose(loaded.encode(TEXTS), tower.encode(TEXTS), atol=1e-5)
    assert np.abs(loaded.encode(TEXTS) - tiny_query_encoder(1).encode(TEXTS)).max() > 0.1


def test_space_id_covers_the_table(tmp_path: Path) -> None:
    from encoders.towers.entity_features import EntityFeaturizer
    from encoders.towers.entity_tower import create_entity_encoder
    from tests.helpers.training_examples import world

    featurizer = EntityFeaturizer.fit(world().catalogue)
    entity = create_entity_encoder(
        featurizer, table_rows=50, token_dimension=16, hidden=(8,), dimension=16
    )
    bundle = save_bundle(tmp_path / "model", tower_with_ngrams(), {"pin": entity})
    weights = bundle.path / "query_encoder" / "ngrams.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert compute_space_id(bundle.path) != bundle.space_id


def test_load_of_other_text_rules_is_refused(tmp_path: Path) -> None:
    tower_with_ngrams().save(tmp_path)
    described = json.loads((tmp_path / "ngrams.json").read_text())
    (tmp_path / "ngrams.json").write_text(json.dumps({**described, "text_rules": 99}))
    with pytest.raises(BundleError, match="text rules 99"):
        QueryEncoder.load(tmp_path)
    with pytest.raises(BundleError, match="text rules 99"):
        TorchQueryEncoding(tmp_path)


@pytest.mark.slow
def test_served_forms_equal_the_trained_tower(tmp_path: Path) -> None:
    tower = tower_with_ngrams(1 << 16)  # large enough for an int8 table
    tower.save(tmp_path / "query_encoder")
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
    export_forms(tower, tmp_path / "forms", texts)
    expected = tower.encode(TEXTS)
    for form in (
        TorchQueryEncoding(tmp_path / "query_encoder"),
        OnnxQueryEncoding(
            tmp_path / "forms" / "query_encoder.onnx", tmp_path / "query_encoder", "onnx-fp32"
        ),
    ):
        np.testing.assert_allclose(form.encode(TEXTS), expected, atol=2e-5)
    int8 = tmp_path / "forms" / "query_encoder.int8.onnx"
    served = OnnxQueryEncoding(int8, tmp_path / "query_encoder", "onnx-int8").encode(TEXTS)
    assert np.einsum("nd,nd->n", served, expected).min() > 0.99
    assert int8.stat().st_size < 6 << 20  # 65,536 rows of 16 numbers: 1 MiB and scales


@pytest.mark.slow
def test_form_of_a_tower_without_the_table_is_refused(tmp_path: Path) -> None:
    tower_with_ngrams().save(tmp_path / "query_encoder")
    plain = tiny_query_encoder(1)
    export_forms(plain, tmp_path / "forms", [f"red {i}" for i in range(100)], ["onnx-fp32"])
    with pytest.raises(BundleError, match="ngram_ids"):
        OnnxQueryEncoding(
            tmp_path / "forms" / "query_encoder.onnx", tmp_path / "query_encoder", "onnx-fp32"
        )


def test_adapter_folded_into_the_tower_turns_its_vectors() -> None:
    tower = tower_with_ngrams()
    draw = np.random.default_rng(0).normal(size=(tower.dimension, tower.dimension))
    turn = np.linalg.qr(draw)[0].astype(np.float32)
    adapter = SpaceAdapter(turn)
    folded = adapter.fold(tower)
    np.testing.assert_allclose(folded.encode(TEXTS), adapter.apply(tower.encode(TEXTS)), atol=1e-4)
