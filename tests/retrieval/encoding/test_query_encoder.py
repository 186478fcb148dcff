import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.small_releases import entity_texts, tiny_query_encoder
from encoders.errors import BundleError, ConfigError, MissingDependency
from encoders.towers.forms import FORM_FILES
from retrieval.encoding.query_encoder import (
    OnnxQueryEncoding,
    QueryTokenizer,
    TorchQueryEncoding,
    choose_form,
    encode_by_length,
    gpu_available,
    open_query_encoding,
)

TEXTS = [
    "red cat",
    "x",
    "blue whale " * 40,
    "日本語 検索",
    "silver lamp and a green house by the river",
    "red cat",
    "ж",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tower") / "query_encoder"
    tiny_query_encoder(1).save(path)
    return path


def test_torch_form_equals_trained_tower(folder: Path) -> None:
    served = TorchQueryEncoding(folder).encode(TEXTS)
    np.testing.assert_allclose(served, tiny_query_encoder(1).encode(TEXTS), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(served, axis=1), 1.0, atol=1e-5)


def test_tokenizer_equals_towers_and_cuts_at_64(folder: Path) -> None:
    rows = QueryTokenizer(folder).token_ids(TEXTS)
    assert rows == tiny_query_encoder(1).tokenize(TEXTS)
    assert max(map(len, rows)) == 64


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("red\u200f sh\u00adoes\ufeff", "red shoes"),
        ("cafe\u0301\u00a0x", "caf\u00e9 x"),
        ("red\u200bshoes", "red shoes"),
    ],
)
def test_token_ids_invisible_characters_and_spellings_change_nothing(
    folder: Path, text: str, same: str
) -> None:
    rows = QueryTokenizer(folder).token_ids([text, same])
    assert rows[0] == rows[1]
    assert rows == tiny_query_encoder(1).tokenize([text, same])


@pytest.mark.parametrize(
    ("text", "share"),
    [("red", 0.0), ("שלום", 1.0), ("red שלום", 4 / 7), ("🙂\u200f", 1.0), ("", 0.0)],
)
def test_unknown_share_counts_characters_that_the_tokenizer_does_not_know(
    folder: Path, text: str, share: float
) -> None:
    assert QueryTokenizer(folder).unknown_share(text) == pytest.approx(share)


def test_token_ids_names_of_special_tokens_are_text(folder: Path) -> None:
    tokenizer = QueryTokenizer(folder)
    rows = tokenizer.token_ids(["[CLS] red [PAD]", "red"])
    assert rows == tiny_query_encoder(1).tokenize(["[CLS] red [PAD]", "red"])
    assert rows[0].count(rows[1][0]) == 1  # the one that opens every text


def test_encode_batch_equals_each_text_alone(folder: Path) -> None:
    encoding = TorchQueryEncoding(folder)
    together = encoding.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoding.encode([text])[0], together[row], atol=2e-5)
    assert encoding.encode([]).shape == (0, 32)


def test_encode_by_length_pads_to_buckets_and_keeps_order(folder: Path) -> None:
    shapes = []

    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.append(ids.shape[1])
        return np.repeat(mask.sum(axis=1, keepdims=True), 2, axis=1).astype(np.float32)

    tokenizer = QueryTokenizer(folder)
    out = encode_by_length(tokenizer, TEXTS, 2, forward, pad_to_bucket=True)
    assert out[:, 0].tolist() == [len(row) for row in tokenizer.token_ids(TEXTS)]
    assert set(shapes) <= {8, 16, 32, 64} and len(shapes) == len(set(shapes))


@pytest.mark.slow
def test_open_query_encoding_exported_int8_is_chosen_and_agrees(
    folder: Path, tmp_path: Path
) -> None:
    from encoders.inference.onnx_forms import export_forms
    from encoders.towers.query_tower import QueryEncoder

    forms = tmp_path / "forms"
    export_forms(QueryEncoder.load(folder), forms, entity_texts(120), ["onnx-fp32"])
    reference = TorchQueryEncoding(folder).encode(TEXTS)
    exact = open_query_encoding(folder, forms, device="cpu", form="onnx-fp32")
    np.testing.assert_allclose(exact.encode(TEXTS), reference, atol=1e-4)
    assert open_query_encoding(folder, forms, device="cpu").form_id == "torch-fp32"
    shutil.copy(
        forms / FORM_FILES["onnx-fp32"], forms / FORM_FILES["onnx-int8"]
    )  # a tower this small does not survive int8
    chosen = open_query_encoding(folder, forms, device="cpu")
    assert isinstance(chosen, OnnxQueryEncoding) and chosen.form_id == "onnx-int8"
    np.testing.assert_allclose(chosen.encode(TEXTS), reference, atol=1e-4)


def test_choose_form_follows_machine_and_release(tmp_path: Path) -> None:
    assert choose_form("auto", "auto", tmp_path, has_gpu=True) == "torch-bf16"
    assert choose_form("auto", "auto", tmp_path, has_gpu=False) == "torch-fp32"
    assert choose_form("cpu", "torch", tmp_path, has_gpu=True) == "torch-fp32"
    (tmp_path / FORM_FILES["onnx-int8"]).touch()
    assert choose_form("cpu", "auto", tmp_path, has_gpu=True) == "onnx-int8"
    with pytest.raises(ConfigError, match="onnx-fp32"):
        choose_form("cpu", "onnx-fp32", tmp_path, has_gpu=False)
    with pytest.raises(ConfigError, match="CUDA"):
        choose_form("cuda", "auto", tmp_path, has_gpu=False)


def test_choose_form_without_torch_takes_what_onnx_runtime_can_run(tmp_path: Path) -> None:
    def chosen(form: str = "auto") -> str:
        return choose_form("cpu", form, tmp_path, has_gpu=False, has_torch=False)

    with pytest.raises(MissingDependency, match=r"omni export.*omnisearchsage\[train\]"):
        chosen()
    (tmp_path / FORM_FILES["onnx-fp32"]).touch()
    assert chosen() == "onnx-fp32"
    (tmp_path / FORM_FILES["onnx-int8"]).touch()
    assert chosen() == "onnx-int8"
    with pytest.raises(MissingDependency, match="torch"):
        chosen("torch")


def test_open_query_encoding_damaged_files_raise_bundle_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        QueryTokenizer(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        OnnxQueryEncoding(tmp_path / "broken.onnx", folder, "onnx-int8")


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_available(), reason="no CUDA device")
def test_cuda_form_agrees_with_torch_fp32(folder: Path) -> None:
    from retrieval.encoding.query_encoder import CudaQueryEncoding

    made = CudaQueryEncoding(folder).encode(TEXTS)
    assert float(np.min(np.sum(made * TorchQueryEncoding(folder).encode(TEXTS), axis=1))) > 0.98
