"""The query tower: text -> transformer -> [CLS] -> linear -> unit vector (paper section 4.1).

It is saved as a Sentence-Transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from encoders.errors import BundleError, ConfigError
from encoders.towers.cls_state import cls_state
from encoders.towers.forms import MAX_TOKENS
from encoders.towers.shipped_tower import SHIPPED_TOWERS, unpack_shipped_tower
from encoders.towers.universal_sentence_encoder import register_universal_sentence_encoder

register_universal_sentence_encoder()
# A tower loads in a second; its progress bar would cut into our own lines.
transformers_logging.disable_progress_bar()

_PACKAGE = "sentence_transformers.models"
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_PACKAGE}.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{_PACKAGE}.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": f"{_PACKAGE}.Normalize"},
]


class QueryEncoder(nn.Module):
    """A Hugging Face encoder, its [CLS] state, one linear layer and L2 normalisation.

    Args:
        transformer: Any encoder whose output has ``last_hidden_state`` of shape (B, T, H) with
            [CLS] first.
        tokenizer: The fast tokenizer that belongs to it.
        dimension: D, the width of the vectors.
        max_tokens: Longer inputs are cut here.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        dimension: int = 256,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        config: Any = transformer.config
        hidden = int(config.hidden_size)
        self.projection = nn.Linear(hidden, dimension)
        nn.init.normal_(self.projection.weight, std=hidden**-0.5)
        nn.init.zeros_(self.projection.bias)

    @property
    def dimension(self) -> int:
        """D, the width of the vectors."""
        return int(self.projection.out_features)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_vectors: Tensor | None = None
    ) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: int64 (B, T), [CLS] in column 0.
            attention_mask: int64 or bool (B, T), 1 where a token is real.
            token_vectors: As in ``cls_state``: looked-up rows of the token table that ``input_ids``
                then index.

        Returns:
            Unit vectors, float32 (B, D).
        """
        state = cls_state(self.transformer, input_ids, attention_mask, token_vectors)  # (B, H)
        return nn.functional.normalize(self.projection(state).float(), dim=-1)  # (B, D)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids per text, [CLS] included, cut at ``max_tokens``."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Encode any number of texts, batched by length so that there is little padding.

        Args:
            texts: Any strings; the tokenizer trims and collapses white space.
            batch_size: Texts per forward pass.

        Returns:
            Unit vectors, float32 (B, D), rows in the order of ``texts``.
        """
        out = np.empty((len(texts), self.dimension), np.float32)
        device = self.projection.weight.device
        was_training = self.training
        self.eval()
        autocast = (
            torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        )
        with autocast:
            for rows, batch in length_buckets(self.tokenize(texts), batch_size):
                ids, mask = pad(batch, int(self.tokenizer.pad_token_id))
                out[rows] = self(ids.to(device), mask.to(device)).cpu().numpy()
        self.train(was_training)
        return out

    def save(self, folder: Path) -> None:
        """Write a folder that Sentence-Transformers, transformers and ``load`` all read."""
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        _write_json(folder / "modules.json", _MODULES)
        limits = {"max_seq_length": self.max_tokens, "do_lower_case": False}
        _write_json(folder / "sentence_bert_config.json", limits)
        pooling = {
            "word_embedding_dimension": self.projection.in_features,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        }
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        dense = {
            "in_features": self.projection.in_features,
            "out_features": self.projection.out_features,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        _write_json(folder / "2_Dense" / "config.json", dense)
        weights = {
            f"linear.{name}": value.detach().float().cpu().contiguous()
            for name, value in self.projection.state_dict().items()
        }
        save_file(weights, folder / "2_Dense" / "model.safetensors")
        (folder / "3_Normalize").mkdir(exist_ok=True)

    @classmethod
    def load(cls, folder: Path) -> QueryEncoder:
        """Read what ``save`` wrote.

        Raises:
            BundleError: A file is missing or does not fit the others.
        """
        dense = folder / "2_Dense" / "model.safetensors"
        if not dense.is_file():
            raise BundleError(
                f"{folder}: no query tower here (2_Dense/model.safetensors is missing). Expected"
                " the query_encoder/ folder of a bundle."
            )
        try:
            limits = (folder / "sentence_bert_config.json").read_text(encoding="utf-8")
            max_tokens = int(json.loads(limits)["max_seq_length"])
            weights = load_file(dense)
            transformer = AutoModel.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tower = cls(transformer, tokenizer, int(weights["linear.weight"].shape[0]), max_tokens)
            tower.projection.load_state_dict(
                {name.removeprefix("linear."): value for name, value in weights.items()}
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BundleError(
                f"{folder}: the query tower cannot be read ({error}). Copy the bundle again or"
                " train a new one."
            ) from error
        return tower.eval()


def create_query_encoder(
    name_or_path: str = "tiny-multilingual", dimension: int = 256, *, pretrained: bool = True
) -> QueryEncoder:
    """Build a query tower from a shipped tower, a saved tower, or any Hugging Face encoder.

    Args:
        name_or_path: ``"tiny-multilingual"`` (shipped, offline), a folder, or a hub name such as
            ``distilbert-base-multilingual-cased``.
        dimension: D.
        pretrained: False keeps only the architecture and tokenizer and draws new weights
            (``--from-scratch``).

    Raises:
        ConfigError: The name is neither shipped, nor a folder, nor reachable on the hub.
    """
    projection: dict[str, Tensor] | None
    torch_state = torch.random.get_rng_state()
    try:
        if name_or_path in SHIPPED_TOWERS:
            transformer, tokenizer, projection = unpack_shipped_tower(name_or_path)
        elif (Path(name_or_path) / "2_Dense" / "model.safetensors").is_file():
            saved = QueryEncoder.load(Path(name_or_path))
            transformer, tokenizer = saved.transformer, saved.tokenizer
            projection = saved.projection.state_dict()
        else:
            transformer, tokenizer = _load_hub_model(name_or_path)
            projection = None
    finally:
        torch.random.set_rng_state(torch_state)
    if not pretrained:
        config: Any = transformer.config
        transformer = AutoModel.from_config(config)
        projection = None
    tower = QueryEncoder(transformer, tokenizer, dimension)
    if projection is not None and projection["weight"].shape == tower.projection.weight.shape:
        tower.projection.load_state_dict(projection)
    return tower


_DROPOUT_RATES = (
    "dropout",
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)
"""Names of the dropout rates in the configurations of Hugging Face encoders."""


def _load_hub_model(name: str) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load encoder and tokenizer by name, in float32 and without dropout."""
    try:
        config = AutoConfig.from_pretrained(name)
        for rate in _DROPOUT_RATES:
            if hasattr(config, rate):
                setattr(config, rate, 0.0)
        model = AutoModel.from_pretrained(name, config=config, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        shipped = ", ".join(SHIPPED_TOWERS)
        raise ConfigError(
            f"query tower {name!r}: not shipped ({shipped}), not a folder with a saved model, and"
            " the hub did not answer. Offline, use a shipped tower or a local path."
        ) from error


def pad(batch: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad token id lists to one rectangle; return int64 ids (B, T) and mask (B, T)."""
    lengths = np.fromiter((len(row) for row in batch), np.int64, len(batch))
    mask = np.arange(max(1, int(lengths.max(initial=1)))) < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in batch]) if len(batch) else 0
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def length_buckets(
    token_ids: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[np.ndarray, list[Sequence[int]]]]:
    """Yield (rows, token ids) batches of similar length."""
    lengths = np.fromiter((len(row) for row in token_ids), np.int64, len(token_ids))
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, [token_ids[row] for row in rows]


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
