"""The query tower: text -> transformer -> pooling -> linear -> unit vector (paper section 4.1).

Pooling is [CLS], as in the paper, or what a pretrained folder declares. The tower may also read
words and character n-grams from a hashed table, added before normalisation. It is saved as a
Sentence-Transformers model, which holds all but that table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from encoders.errors import BundleError
from encoders.text.normal_forms import normalize_query
from encoders.towers.cls_state import cls_state, pooled_state
from encoders.towers.forms import MAX_TOKENS
from encoders.towers.query_ngrams import QueryNgrams
from encoders.towers.sentence_transformer import (
    DenseLayer,
    read_folder,
    write_modules,
    write_pooling,
)
from encoders.towers.universal_sentence_encoder import register_universal_sentence_encoder

register_universal_sentence_encoder()
# A tower loads in a second; its progress bar would cut into our own lines.
transformers_logging.disable_progress_bar()


_LOADED_FROM = ("is_local", "local_files_only")
"""Keys that transformers adds to ``tokenizer_config.json``."""


class QueryEncoder(nn.Module):
    """A Hugging Face encoder, its pooled state, one linear layer and L2 normalisation.

    Args:
        transformer: Any encoder whose output has ``last_hidden_state`` of shape (B, T, H).
        tokenizer: The fast tokenizer that belongs to it.
        dimension: D, the width of the vectors.
        max_tokens: Longer inputs are cut here.
        pooling: ``cls`` (the first token's state), ``mean`` or ``max``.
        dense: Layers of a pretrained model between pooling and the linear layer.

    Attributes:
        ngrams: The part that reads n-grams; None: there is none.
        has_fresh_projection: Whether the linear layer is not trained yet, of a foreign model.
    """

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        dimension: int = 256,
        max_tokens: int = MAX_TOKENS,
        pooling: str = "cls",
        dense: Sequence[DenseLayer] = (),
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pooling = pooling
        self.dense = nn.ModuleList(dense)
        self.ngrams: QueryNgrams | None = None
        self.has_fresh_projection = False
        config: Any = transformer.config
        hidden = dense[-1].linear.out_features if dense else int(config.hidden_size)
        self.projection = nn.Linear(hidden, dimension)
        nn.init.normal_(self.projection.weight, std=hidden**-0.5)
        nn.init.zeros_(self.projection.bias)

    @property
    def dimension(self) -> int:
        """D, the width of the vectors."""
        return int(self.projection.out_features)

    @property
    def pad_id(self) -> int:
        """Id that fills the end of shorter rows; a model without one masks any id."""
        config: Any = self.transformer.config
        for found in (self.tokenizer.pad_token_id, getattr(config, "pad_token_id", None)):
            if found is not None:
                return int(found)
        return 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_vectors: Tensor | None = None,
        ngram_ids: Tensor | None = None,
    ) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: int64 (B, T), [CLS] in column 0.
            attention_mask: int64 or bool (B, T), 1 where a token is real.
            token_vectors: As in ``cls_state``: looked-up rows of the token table that ``input_ids``
                then index.
            ngram_ids: int64 (B, G), buckets of ``ngrams``; None: the transformer alone.

        Returns:
            Unit vectors, float32 (B, D).
        """
        vectors = self.project(input_ids, attention_mask, token_vectors)
        if ngram_ids is not None and self.ngrams is not None:
            vectors = vectors + self.ngrams(ngram_ids).float()
        return nn.functional.normalize(vectors, dim=-1)

    def project(
        self, input_ids: Tensor, attention_mask: Tensor, token_vectors: Tensor | None = None
    ) -> Tensor:
        """Compute the linear layer's output, before n-grams and normalisation: float32 (B, D)."""
        state = self.pooled(input_ids, attention_mask, token_vectors)
        projected: Tensor = self.projection(state).float()
        return projected

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_vectors: Tensor | None = None
    ) -> Tensor:
        """Compute what the linear layer reads: (B, H), or the last dense layer's width."""
        inputs = (self.transformer, input_ids, attention_mask, token_vectors)
        state = cls_state(*inputs) if self.pooling == "cls" else pooled_state(self.pooling, *inputs)
        for layer in self.dense:
            state = layer(state)
        return state

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids per text in its normal form, [CLS] included, cut at ``max_tokens``.

        A special token's name in a text ("[CLS]") is text.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            [normalize_query(text) for text in texts],
            split_special_tokens=True,
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def reset_tokenizer(self) -> None:
        """Drop what the last call left in the tokenizer's state, which its file would hold."""
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()

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
        read = self.ngrams.read(texts) if self.ngrams is not None else None
        with autocast:
            for rows, batch in length_buckets(self.tokenize(texts), batch_size):
                ids, mask = pad(batch, self.pad_id)
                ngram_ids = None
                if self.ngrams is not None and read is not None:
                    ngram_ids = self.ngrams.pad(*read, rows).to(device)
                vectors = self(ids.to(device), mask.to(device), ngram_ids=ngram_ids)
                out[rows] = vectors.cpu().numpy()
        self.train(was_training)
        return out

    def save(self, folder: Path) -> None:
        """Write a folder that Sentence-Transformers, transformers and ``load`` all read."""
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder)  # type: ignore[operator]
        self.reset_tokenizer()
        self.tokenizer.save_pretrained(folder)
        # Where it was loaded from is no part of a tower: a copy is the same tower
        config_path = folder / "tokenizer_config.json"
        settings = json.loads(config_path.read_text(encoding="utf-8"))
        _write_json(config_path, {k: v for k, v in settings.items() if k not in _LOADED_FROM})
        limits = {"max_seq_length": self.max_tokens, "do_lower_case": False}
        _write_json(folder / "sentence_bert_config.json", limits)
        config: Any = self.transformer.config
        write_pooling(folder / "1_Pooling", self.pooling, int(config.hidden_size))
        layers: list[Any] = [*self.dense, DenseLayer(self.projection)]
        paths = ["", "1_Pooling"]
        for layer in layers:
            paths.append(f"{len(paths)}_Dense")
            layer.save(folder / paths[-1])
        paths.append(f"{len(paths)}_Normalize")
        (folder / paths[-1]).mkdir(exist_ok=True)
        write_modules(folder, paths)
        if self.ngrams is not None:
            self.ngrams.save(folder)

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
            model = read_folder(folder)
            transformer = AutoModel.from_pretrained(model.transformer, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(model.transformer)
            *layers, last = model.dense
            tower = cls(
                transformer,
                tokenizer,
                last.linear.out_features,
                model.max_tokens,
                model.pooling,
                layers,
            )
            tower.projection.load_state_dict(last.linear.state_dict())
            tower.ngrams = QueryNgrams.load(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"{folder}: the query tower cannot be read ({error}). Copy the bundle again or"
                " train a new one."
            ) from error
        return tower.eval()


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


def __getattr__(name: str) -> Any:
    """Import ``create_query_encoder`` from its former place, for one version."""
    if name == "create_query_encoder":
        from encoders.towers.pretrained_models import create_query_encoder

        return create_query_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
