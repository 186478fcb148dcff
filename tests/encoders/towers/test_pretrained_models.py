"""Foreign model folders become towers of their own pooling and space, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from encoders.errors import ConfigError
from encoders.towers.pretrained_models import PROBES, create_query_encoder, fit_projection
from encoders.towers.query_tower import QueryEncoder
from tests.helpers.training_examples import tiny_query_encoder

SMALL = {
    "initializer_range": 0.4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXTS = ["red shoes", "birthday cake", "a", "red shoes for running in the rain"]


def tokenizer(pad: bool = True, end: str = "[SEP]") -> transformers.PreTrainedTokenizerFast:
    """Words and letters of the probes; every text begins with [CLS]."""
    words = sorted({word for text in PROBES for word in text.split()} | set("abcdefgh"))
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {end}", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if pad:
        names["pad_token"] = "[PAD]"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert(**changes: object) -> transformers.BertModel:
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer()), "pad_token_id": 0, **SMALL, **changes}
    return transformers.BertModel(transformers.BertConfig(**shape)).eval()


def save(folder: Path, model: transformers.PreTrainedModel, **kinds: bool) -> Path:
    model.save_pretrained(folder)
    tokenizer(**kinds).save_pretrained(folder)
    return folder


def declare(folder: Path, pooling: dict[str, object], *modules: str) -> None:
    """Make a folder a Sentence-Transformers model."""
    kinds = ["Transformer", "Pooling", *modules]
    rows = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, **pooling})
    )


MEAN: dict[str, object] = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def dense(folder: Path, activation: str, out: int = 16) -> None:
    folder.mkdir()
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(out, 32) * 0.2, "linear.bias": torch.randn(out)}
    save_file(weights, folder / "model.safetensors")
    described = {
        "in_features": 32,
        "out_features": out,
        "bias": True,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    (folder / "config.json").write_text(json.dumps(described))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True},
        MEAN,
        {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": False},
        {"pooling_mode": "mean"},
    ],
)
def test_declared_pooling_gives_the_vectors_of_sentence_transformers(
    tmp_path: Path, pooling: dict[str, object]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    declare(save(tmp_path, bert()), pooling, "Normalize")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    tower = create_query_encoder(str(tmp_path), 32)
    np.testing.assert_allclose(tower.encode(TEXTS), unit(theirs), atol=1e-5)
    tower.save(tmp_path / "saved")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), unit(theirs), atol=1e-5)
    loaded = create_query_encoder(str(tmp_path / "saved"), 32)
    np.testing.assert_allclose(loaded.encode(TEXTS), unit(theirs), atol=1e-5)


@pytest.mark.parametrize("activation", ["activation.Tanh", "linear.Identity"])
def test_declared_dense_layer_and_activation_are_kept(tmp_path: Path, activation: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    declare(save(tmp_path, bert()), MEAN, "Dense", "Normalize")
    dense(tmp_path / "2_Dense", activation)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    tower = create_query_encoder(str(tmp_path), 16)
    np.testing.assert_allclose(tower.encode(TEXTS), unit(theirs), atol=1e-5)
    tower.save(tmp_path / "saved")
    np.testing.assert_allclose(
        QueryEncoder.load(tmp_path / "saved").encode(TEXTS), unit(theirs), atol=1e-5
    )


@pytest.mark.slow
def test_new_tower_starts_at_the_models_own_cosines(tmp_path: Path) -> None:
    folder = str(save(tmp_path, bert()))
    wide = create_query_encoder(folder, 48).encode(TEXTS)
    same = create_query_encoder(folder, 32).encode(TEXTS)
    np.testing.assert_allclose(wide @ wide.T, same @ same.T, atol=1e-5)
    narrow = create_query_encoder(folder, 16)
    np.testing.assert_array_equal(
        narrow.encode(TEXTS), create_query_encoder(folder, 16).encode(TEXTS)
    )
    many = [f"{a} {b} {c}" for a in "abcdefgh" for b in "abcdefgh" for c in ("cake", "rain")]
    exact = create_query_encoder(folder, 32).encode(many)
    random_turn = narrow.encode(many)
    fit_projection(narrow, many)
    fitted = narrow.encode(many)
    errors = [np.abs(v @ v.T - exact @ exact.T).mean() for v in (fitted, random_turn)]
    assert errors[0] < 0.7 * errors[1]


def test_saved_tower_of_another_width_keeps_its_space(tmp_path: Path) -> None:
    tiny_query_encoder(1, 16).save(tmp_path)
    own = create_query_encoder(str(tmp_path), None)
    assert own.dimension == 16
    wider = create_query_encoder(str(tmp_path), 24)
    a, b = own.encode(TEXTS[:2]), wider.encode(TEXTS[:2])
    np.testing.assert_allclose(b @ b.T, a @ a.T, atol=1e-5)


def test_tokenizer_without_pad_token_encodes_batches(tmp_path: Path) -> None:
    tower = create_query_encoder(str(save(tmp_path, bert(pad_token_id=None), pad=False)), 32)
    alone = np.concatenate([tower.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(tower.encode(TEXTS), alone, atol=1e-5)


def test_short_position_tables_shorten_queries(tmp_path: Path) -> None:
    tower = create_query_encoder(str(save(tmp_path, bert(max_position_embeddings=32))), 32)
    assert tower.max_tokens == 32
    assert np.isfinite(tower.encode(["red " * 200])).all()
    shape = {"vocab_size": len(tokenizer()), "pad_token_id": 1, "max_position_embeddings": 40}
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**SMALL, **shape))
    tower = create_query_encoder(str(save(tmp_path / "roberta", roberta)), 32)
    assert tower.max_tokens == 38  # its positions begin behind the padding's
    assert np.isfinite(tower.encode(["red " * 200])).all()


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_of_the_tower_is_a_setting(tmp_path: Path, rate: float) -> None:
    tower = create_query_encoder(str(save(tmp_path, bert())), 32, dropout=rate)
    found = {m.p for m in tower.modules() if isinstance(m, torch.nn.Dropout)}
    assert found == {rate}


# --------------------------------------------------------------------------------------- refusals
def no_tokenizer(folder: Path) -> None:
    bert().save_pretrained(folder)


def gpt2(folder: Path) -> None:
    shape = {"vocab_size": len(tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 2}
    save(folder, transformers.GPT2Model(transformers.GPT2Config(**shape, initializer_range=0.4)))


def t5(folder: Path) -> None:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(
        vocab_size=len(tokenizer()), decoder_start_token_id=0, pad_token_id=0, **shape
    )
    save(folder, transformers.T5Model(config))


def t5_encoder(folder: Path) -> None:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(tokenizer()), pad_token_id=0, **shape)
    save(folder, transformers.T5EncoderModel(config))


def fnet(folder: Path) -> None:
    config = transformers.FNetConfig(
        vocab_size=len(tokenizer()),
        **{k: v for k, v in SMALL.items() if k != "num_attention_heads"},
    )
    save(folder, transformers.FNetModel(config))


def clip(folder: Path) -> None:
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer()), **SMALL)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    save(folder, transformers.CLIPModel(config))


def lora(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def custom_code(folder: Path) -> None:
    save(folder, bert())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))


def too_many_tokens(folder: Path) -> None:
    save(folder, bert(vocab_size=8))


def not_finite(folder: Path) -> None:
    model = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[4:] = float("nan")
    save(folder, model)


def last_token(folder: Path) -> None:
    declare(save(folder, bert()), {"pooling_mode_lasttoken": True})


def unknown_activation(folder: Path) -> None:
    declare(save(folder, bert()), MEAN, "Dense")
    dense(folder / "2_Dense", "activation.Mish")


def unknown_module(folder: Path) -> None:
    declare(save(folder, bert()), MEAN, "LSTM")


def weights_cut(folder: Path) -> None:
    save(folder, bert())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def dense_cut(folder: Path) -> None:
    declare(save(folder, bert()), MEAN, "Dense")
    dense(folder / "2_Dense", "linear.Identity")
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"cut")


def config_is_no_json(folder: Path) -> None:
    save(folder, bert())
    (folder / "config.json").write_text('{"model_type":')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weights_cut, "query tower"),
        (dense_cut, "query tower"),
        (config_is_no_json, "query tower"),
        (no_tokenizer, "tokenizer"),
        (gpt2, "decoder"),
        (t5, "decoder"),
        (t5_encoder, "query tower"),
        (fnet, "query tower"),
        (clip, "no single text encoder"),
        (lora, "LoRA adapter alone"),
        (custom_code, "needs code"),
        (too_many_tokens, "embeddings"),
        (not_finite, "not finite"),
        (last_token, "lasttoken"),
        (unknown_activation, "Mish"),
        (unknown_module, "LSTM"),
    ],
)
def test_model_that_cannot_be_a_query_tower_is_refused(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "model")
    with pytest.raises(ConfigError, match=message) as raised:
        create_query_encoder(str(tmp_path / "model"), 32)
    assert str(tmp_path / "model") in str(raised.value)
    assert "the hub did not" not in str(raised.value)
