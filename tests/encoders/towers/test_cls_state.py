"""The [CLS] state of the fast path is that of the whole model, and so are the gradients."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from encoders.towers.cls_state import cls_state, takes_token_vectors

LENGTHS = [7, 1, 4, 7]


def _distilbert(layers: int = 3, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=60,
        dim=32,
        hidden_dim=64,
        n_heads=4,
        n_layers=layers,
        max_position_embeddings=16,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return DistilBertModel(config)


def _bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            hidden_dropout_prob=0.0,
        )
    )


def _xlm_roberta() -> nn.Module:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=0,
    )
    return XLMRobertaModel(config)


def _batch() -> tuple[Tensor, Tensor]:
    ids, mask = np.zeros((len(LENGTHS), 7), np.int64), np.zeros((len(LENGTHS), 7), np.int64)
    rng = np.random.default_rng(0)
    for row, length in enumerate(LENGTHS):
        ids[row, :length], mask[row, :length] = rng.integers(1, 60, length), 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cls_state_equals_whole_model_with_gradients(layers: int) -> None:
    model = _distilbert(layers).eval()
    ids, mask = _batch()
    whole = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    short = cls_state(model, ids, mask)
    torch.testing.assert_close(short, whole)
    upstream = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * upstream).sum(), list(model.parameters()))
    torch.testing.assert_close(
        torch.autograd.grad((short * upstream).sum(), list(model.parameters())), expected
    )


def test_cls_state_padding_does_not_count() -> None:
    model = _distilbert().eval()
    ids, mask = _batch()
    together = cls_state(model, ids, mask)
    alone = torch.cat(
        [cls_state(model, ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    )
    torch.testing.assert_close(together, alone)


def test_cls_state_dropout_in_training_only() -> None:
    model = _distilbert(dropout=0.5)
    ids, mask = _batch()
    assert not torch.equal(cls_state(model.train(), ids, mask), cls_state(model, ids, mask))
    assert torch.equal(cls_state(model.eval(), ids, mask), cls_state(model, ids, mask))


@pytest.mark.parametrize("make", [_distilbert, _bert, _xlm_roberta])
def test_cls_state_given_token_vectors_equals_plain(make: object) -> None:
    model = make().eval()  # type: ignore[operator]
    assert takes_token_vectors(model)
    ids, mask = _batch()
    table = model.get_input_embeddings().weight
    wanted, places = torch.unique(ids, return_inverse=True)
    plain, looked_up = cls_state(model, ids, mask), cls_state(model, places, mask, table[wanted])
    torch.testing.assert_close(looked_up, plain)
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * upstream).sum(), table)[0]
    torch.testing.assert_close(
        torch.autograd.grad((looked_up * upstream).sum(), table)[0], expected
    )


def test_takes_token_vectors_custom_table_is_false() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = _distilbert()
    model.set_input_embeddings(Scaled(60, 32))  # type: ignore[operator]
    assert not takes_token_vectors(model)
