"""Make small releases in seconds, for fault injection and tests.

A tiny random query tower, and entities embedded by it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from encoders.towers.query_tower import QueryEncoder
from index_builder.building.build import RebuildConfig, build_release
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig

WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "wooden",
    "silver",
    "golden",
    "paper",
    "glass",
    "stone",
    "river",
    "mountain",
    "garden",
    "kitchen",
    "winter",
    "summer",
    "autumn",
    "spring",
    "night",
    "morning",
    "cat",
    "dog",
    "bird",
    "fish",
    "horse",
    "whale",
    "tree",
    "flower",
    "apple",
    "bread",
    "cake",
    "soup",
    "coffee",
    "lamp",
    "chair",
    "table",
    "door",
    "window",
    "house",
    "boat",
    "train",
    "bicycle",
]


def tiny_query_encoder(
    seed: int, dimension: int = 32, layers: int = 1, width: int = 32
) -> QueryEncoder:
    """Make a random tower over letters and some words: deterministic, one space per seed."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789äöüéñßабвгдежз日本語検索"
    pieces += [letter for letter in letters] + [f"##{letter}" for letter in letters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = DistilBertConfig(
            vocab_size=len(vocabulary),
            dim=width,
            n_layers=layers,
            n_heads=2,
            hidden_dim=2 * width,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        encoder = QueryEncoder(DistilBertModel(config), fast, dimension)
        with (
            torch.no_grad()
        ):  # spread the directions: an untrained [CLS] state hardly depends on the text
            for name, parameter in encoder.transformer.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8.0 if "embeddings" in name else 6.0)
            ids = fast(entity_texts(64, seed), padding=True, return_tensors="pt")
            state = (
                encoder.eval()
                .transformer(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
                .last_hidden_state[:, 0]
            )
            encoder.projection.bias.copy_(-encoder.projection(state).mean(dim=0))
    return encoder.eval()


def write_small_bundle(
    folder: Path, seed: int, dimension: int = 32, *, layers: int = 1, width: int = 32
) -> QueryEncoder:
    """Write a bundle with only a tiny query tower; its space id is the hash of its weights."""
    encoder = tiny_query_encoder(seed, dimension, layers, width)
    encoder.save(folder / "query_encoder")
    (folder / "entity_encoder").mkdir(exist_ok=True)
    digest = hashlib.sha256()
    for path in sorted((folder / "query_encoder").rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    space = {"space_id": digest.hexdigest(), "dimension": dimension}
    (folder / "space.json").write_text(json.dumps(space), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"dimension": dimension}), encoding="utf-8")
    return encoder


def entity_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct short texts from a fixed word list."""
    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choice(WORDS, size=int(rng.integers(2, 5))))] = None
    return list(texts)


class SmallReleaseOptions(TypedDict, total=False):
    """How a small release differs from the usual one."""

    release_id: str | None
    """Name; None: derived."""
    counts: dict[str, int]
    """Entities per type; 300 pins and 120 products by default."""
    id_prefix: str
    """In front of every id, so that answers of two releases differ."""
    activate: bool
    """Make it the active one (the default)."""
    kind: str
    """Index kind, ``hnsw`` by default."""


def small_release(
    store: ReleaseStore,
    bundle: Path,
    encoder: QueryEncoder,
    **options: Unpack[SmallReleaseOptions],
) -> str:
    """Build and publish a release of texts embedded by the query tower, so a query finds its text.

    Args:
        store: Where to publish.
        bundle: What ``write_small_bundle`` wrote.
        encoder: What it returned.
        options: See ``SmallReleaseOptions``.

    Returns:
        The id of the release.
    """
    id_prefix = options.get("id_prefix", "")
    counts = options.get("counts", {"pin": 300, "product": 120})
    space_id = json.loads((bundle / "space.json").read_text(encoding="utf-8"))["space_id"]
    inputs: dict[str, EntityInput] = {}
    for number, (entity_type, count) in enumerate(counts.items()):
        texts = entity_texts(count, seed=number)
        frame = pl.DataFrame(
            {
                "title": texts,
                "price": [float(i % 50) for i in range(count)],
                "stock": [i % 7 for i in range(count)],
                "sale": [i % 3 == 0 for i in range(count)],
                "tags": [text.split() for text in texts],
            }
        )
        ids = [f"{id_prefix}{entity_type}-{i}" for i in range(count)]
        inputs[entity_type] = EntityInput(
            ids=ids, vectors=encoder.encode(texts), space_id=space_id, attributes=frame
        )
    golden = WORDS[:24]
    queries = {"*": QuerySet(golden, encoder.encode(golden))}
    config = RebuildConfig(
        index=IndexConfig(kind=options.get("kind", "hnsw")),
        min_recall=0.5,
        golden_queries=16,
        release_id=options.get("release_id"),
        activate=options.get("activate", True),
    )
    return build_release(inputs, bundle, store, config, queries)
