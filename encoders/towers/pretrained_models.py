"""Make a query tower of a shipped tower, a folder or a Hugging Face name, or say why it cannot be.

A foreign model is checked before it is used: one that would train to nonsense without a word (no
tokenizer, a decoder, vectors that depend on the batch) is refused. Its tower starts close to the
model's own space: the linear layer begins as the identity, or as a turn into fewer dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from encoders.errors import ConfigError
from encoders.towers.forms import MAX_TOKENS
from encoders.towers.query_tower import QueryEncoder, pad
from encoders.towers.sentence_transformer import (
    FolderModel,
    is_sentence_transformer,
    read_folder,
)
from encoders.towers.shipped_tower import SHIPPED_TOWERS, is_packed, unpack_tower

PROBES = (
    "red shoes",
    "red lamp",
    "red shoes for running in the rain",
    "birthday cake",
    "Geschenke für Kinder",
    "новый год",
    "誕生日ケーキ",
    "a",
)
"""Short texts on which a foreign model is checked; the first two begin with one word."""
FOREIGN_DIMENSION = 256
"""D of a foreign model where none is asked for."""
BATCH_TOLERANCE = 1e-3
"""Largest difference of a state, relative to its length, between alone and in a batch."""
PROJECTION_TEXTS = 4096
"""Texts from whose states ``fit_projection`` takes the strongest directions, at most."""


def create_query_encoder(
    name_or_path: str = "tiny-multilingual",
    dimension: int | None = 256,
    *,
    pretrained: bool = True,
    dropout: float = 0.0,
) -> QueryEncoder:
    """Build a query tower from a shipped tower, a saved tower, or any Hugging Face encoder.

    Args:
        name_or_path: ``"tiny-multilingual"`` (shipped, offline), a folder (of this project, of
            Sentence-Transformers or of transformers), or a hub name such as
            ``distilbert-base-multilingual-cased``.
        dimension: D; None: the tower's own, or 256 for a foreign model.
        pretrained: False keeps only the architecture and tokenizer and draws new weights
            (``--from-scratch``).
        dropout: Rate of all dropout layers in training.

    Raises:
        ConfigError: The name is neither shipped, nor a folder, nor reachable on the hub, or the
            model is of a kind that cannot be a query tower.
    """
    torch_state = torch.random.get_rng_state()
    try:
        tower, projection = _load(name_or_path, dimension)
    finally:
        torch.random.set_rng_state(torch_state)
    if not pretrained:
        config: Any = tower.transformer.config
        fresh = AutoModel.from_config(config)
        tower = QueryEncoder(
            fresh, tower.tokenizer, tower.dimension, tower.max_tokens, tower.pooling
        )
    elif projection is None:
        start_near_the_states(tower)
        tower.has_fresh_projection = True
    elif projection.out_features == tower.dimension:
        tower.projection.load_state_dict(projection.state_dict())
    else:
        with torch.no_grad():
            turn = _near_identity(tower.dimension, projection.out_features)
            tower.projection.weight.copy_(turn @ projection.weight)
            tower.projection.bias.copy_(turn @ projection.bias)
    for module in tower.transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return tower


def _load(name: str, dimension: int | None) -> tuple[QueryEncoder, nn.Linear | None]:
    """Load a tower with a new linear layer, and the linear layer that belongs to it, if any."""
    folder = SHIPPED_TOWERS.get(name, Path(name))
    if is_packed(folder):
        transformer, tokenizer, weights = unpack_tower(folder)
        projection = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
        projection.load_state_dict(weights)
        width = dimension or projection.out_features
        return QueryEncoder(transformer, tokenizer, width), projection
    if (folder / "2_Dense" / "model.safetensors").is_file() and _is_own(folder):
        saved = QueryEncoder.load(folder)
        tower = QueryEncoder(
            saved.transformer,
            saved.tokenizer,
            dimension or saved.dimension,
            saved.max_tokens,
            saved.pooling,
            list(saved.dense),  # type: ignore[arg-type]
        )
        if saved.dimension == tower.dimension:
            tower.ngrams = saved.ngrams
        return tower, saved.projection
    return _load_foreign(name, dimension or FOREIGN_DIMENSION), None


def _is_own(folder: Path) -> bool:
    """Tell whether a folder's last layer is linear, as towers of this project are saved."""
    try:
        return read_folder(folder).dense[-1].is_linear
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def _load_foreign(name: str, dimension: int) -> QueryEncoder:
    """Load a model that this project did not save, and check it."""
    try:
        _refuse_incomplete(name)
        declared = FolderModel(Path(name), MAX_TOKENS, "cls", [])
        if is_sentence_transformer(Path(name)):
            declared = read_folder(Path(name))
        source = str(declared.transformer) if Path(name).is_dir() else name
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _refuse_kind(name, config)
        transformer, report = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(_not_loaded(name, error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of any type: they all mean missing or foreign files
        raise ConfigError(
            f"query tower {name!r}: its tokenizer cannot be read ({error}). Expected the tokenizer"
            " files that belong to the model (tokenizer.json)."
        ) from error
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise ConfigError(
            f"query tower {name!r}: the weights lack {len(missing)} of the encoder's tensors, e.g."
            f" {min(missing)!r}: it is not an encoder, or its files are not whole."
        )
    longest = min(declared.max_tokens, MAX_TOKENS)
    tower = QueryEncoder(
        transformer, tokenizer, dimension, longest, declared.pooling, declared.dense
    )
    _check(name, tower.eval())
    return tower


def _refuse_incomplete(name: str) -> None:
    """Refuse folders that hold no model of their own, before transformers asks questions."""
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"query tower {name!r}: the folder holds a LoRA adapter alone. Merge it into its base"
            " model first (peft: model.merge_and_unload().save_pretrained(FOLDER))."
        )
    config = folder / "config.json"
    if config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        raise ConfigError(
            f"query tower {name!r}: the model needs code that comes with it (auto_map in"
            " config.json), which is not run here. Use a model of an architecture that"
            " transformers has."
        )


def _refuse_kind(name: str, config: Any) -> None:
    """Refuse architectures that are no text encoders."""
    why = ""
    architectures = " ".join(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        why = "it has an encoder and a decoder"
    elif getattr(config, "is_decoder", False) or "ForCausalLM" in architectures:
        why = "it is a decoder"
    elif not isinstance(getattr(config, "hidden_size", None), int):
        why = f"a {config.model_type!r} has no single text encoder with a hidden_size"
    if why:
        raise ConfigError(
            f"query tower {name!r}: {why}. Expected an encoder such as BERT, RoBERTa, DistilBERT or"
            " ModernBERT."
        )


def _not_loaded(name: str, error: Exception) -> str:
    """Word the error of a model that transformers did not load."""
    if Path(name).is_dir():
        return (
            f"query tower {name!r}: the folder cannot be read as a model ({error}). Expected"
            " config.json, weights and tokenizer files of an encoder."
        )
    return (
        f"query tower {name!r}: not shipped ({', '.join(SHIPPED_TOWERS)}), not a folder with a"
        f" saved model, and the hub did not give it ({error}). Offline, use a shipped tower or a"
        " local path."
    )


@torch.inference_mode()
def _check(name: str, tower: QueryEncoder) -> None:
    """Refuse a model that cannot tell texts apart or that depends on the batch; shorten its limit.

    Raises:
        ConfigError: What is wrong, and what is expected.
    """

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"query tower {name!r}: {what}")

    if not isinstance(tower.tokenizer, PreTrainedTokenizerFast):
        raise refuse("its tokenizer is not a fast one (tokenizer.json). Convert it.")
    rows = tower.tokenize(PROBES)
    table: Any = tower.transformer.get_input_embeddings()  # type: ignore[operator]
    known = int(table.weight.shape[0])
    if len(tower.tokenizer) > known:
        raise refuse(
            f"the tokenizer has {len(tower.tokenizer):,} tokens, but the model only {known:,}"
            " embeddings. Resize the embeddings (resize_token_embeddings) and save again."
        )
    if unknown_share(tower, rows[:4]) > 0.9:
        raise refuse(
            "the tokenizer knows no word of English, not even its letters: tokenizer files"
            " (tokenizer.json) are missing."
        )
    tower.max_tokens = _longest(tower)
    try:
        alone = torch.cat([tower.pooled(*pad([row], tower.pad_id)) for row in rows]).float()
        together = tower.pooled(*pad(rows, tower.pad_id)).float()
    except Exception as error:  # of any type: they all mean another interface
        raise refuse(
            f"it does not run on input_ids and attention_mask alone ({error}). Expected an encoder"
            " such as BERT, RoBERTa, DistilBERT or ModernBERT."
        ) from error
    if not alone.isfinite().all():
        raise refuse("its states are not finite: the weights hold NaN or infinity.")
    length = alone.norm(dim=1).clamp_min(1e-6)
    if ((alone - together).norm(dim=1) / length).max() > BATCH_TOLERANCE:
        raise refuse(
            "a text's state depends on the other texts of its batch (it does not mask padding)."
        )
    if (alone[0] - alone[1]).norm() / length[0] < 1e-5:
        raise refuse(
            f"{PROBES[0]!r} and {PROBES[1]!r} have one state: its first token does not see the"
            " others (a decoder), or it knows none of the words. Declare mean pooling"
            " (1_Pooling/config.json), or use an encoder."
        )


def _longest(tower: QueryEncoder) -> int:
    """Find the longest input that the model's positions allow, up to the tower's limit."""
    token = max(tower.tokenize([PROBES[0]])[0])
    shortest, longest = 1, tower.max_tokens
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        try:
            tower.pooled(*pad([[token] * middle], tower.pad_id))
            shortest = middle
        except Exception:  # of any type: the model takes no input so long
            longest = middle - 1
    return shortest


def unknown_share(tower: QueryEncoder, token_ids: Sequence[Sequence[int]]) -> float:
    """Return the share of the tokens, special ones apart, that the tokenizer does not know.

    1 for texts without any token; 0 for a tokenizer that has no unknown token.
    """
    special = set(tower.tokenizer.all_special_ids)
    unknown = tower.tokenizer.unk_token_id
    tokens = [token for row in token_ids for token in row]
    missed = sum(token == unknown for token in tokens)
    ordinary = sum(token not in special for token in tokens) + missed
    return missed / ordinary if ordinary else 1.0


@torch.no_grad()
def start_near_the_states(tower: QueryEncoder) -> None:
    """Set the linear layer so that cosines of its outputs are those of the pooled states.

    The identity where the widths allow it, else a seeded random turn into fewer dimensions, which
    nearly keeps cosines; ``fit_projection`` does better with texts.
    """
    tower.projection.weight.copy_(_near_identity(*tower.projection.weight.shape))
    tower.projection.bias.zero_()


def _near_identity(rows: int, columns: int) -> Tensor:
    """Make a matrix that keeps inner products, exactly or, into fewer dimensions, nearly."""
    if rows >= columns:
        return torch.eye(rows, columns)
    seeded = torch.Generator().manual_seed(0)
    turned: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=seeded)).Q.T
    return turned


@torch.no_grad()
def fit_projection(tower: QueryEncoder, texts: Sequence[str]) -> None:
    """Set a linear layer into fewer dimensions to the strongest directions of these texts' states.

    Inner products are kept best in the sense of least squares (no centring). A layer that need
    not leave anything out stays.
    """
    weight = tower.projection.weight
    if weight.shape[0] >= weight.shape[1] or len(texts) < weight.shape[0]:
        return
    step = max(1, len(texts) // PROJECTION_TEXTS)
    rows = tower.tokenize(list(texts[::step])[:PROJECTION_TEXTS])
    was_training = tower.training
    tower.eval()
    states: list[Tensor] = []
    order = np.argsort([len(row) for row in rows])
    for start in range(0, len(order), 256):
        ids, mask = pad([rows[i] for i in order[start : start + 256]], tower.pad_id)
        states.append(tower.pooled(ids.to(weight.device), mask.to(weight.device)).float())
    tower.train(was_training)
    unit = nn.functional.normalize(torch.cat(states), dim=1)  # (N, H)
    directions = torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1)  # strongest first
    weight.copy_(directions[:, : weight.shape[0]].T)
