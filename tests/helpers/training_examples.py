"""A world small enough to train on in a second: coloured things, queries that name them, and a
one-layer query tower.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from encoders.config.train_config import TrainConfig, train_config
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.source_tables import TrainingData

COLOURS = ("red", "blue", "green", "black", "white", "pink")
PINS = ("chair", "lamp", "sofa", "vase", "rug", "desk", "bed", "shelf")
PRODUCTS = ("shoe", "hat", "coat", "scarf", "belt")
DIMENSION = 16


def world(vectors: bool = False) -> TrainingData:
    """48 pins and 30 products with three queries each; queries of one thing are related; a frozen
    vector sums the meanings of two words.
    """
    rows, pairs = [], []
    generator = np.random.default_rng(0)
    meaning = {word: generator.normal(size=DIMENSION) for word in (*COLOURS, *PINS, *PRODUCTS)}
    for entity_type, things in (("pin", PINS), ("product", PRODUCTS)):
        for colour, thing in product(COLOURS, things):
            queries = [f"{colour} {thing}", f"{thing} in {colour}", f"{thing}  {colour} ideas"]
            entity_id = f"{entity_type}-{colour}-{thing}"
            row: dict[str, object] = {
                "id": entity_id,
                "entity_type": entity_type,
                "title": f"{colour} {thing}",
                "engaged_queries": queries[:2],
            }
            if vectors:
                row["pinsage"] = (
                    (meaning[colour] + meaning[thing]).tolist() if colour != "pink" else None
                )
            rows.append(row)
            pairs += [
                (query, entity_type, entity_id, count, "save")
                for count, query in enumerate(queries, start=1)
            ]
            pairs.append((queries[0], "query", queries[1], 1, "query_click"))
    columns = ["query", "entity_type", "entity_id", "count", "action"]
    return TrainingData(pl.DataFrame(rows), pl.DataFrame(pairs, schema=columns, orient="row"))


def tiny_query_encoder(seed: int = 0, dimension: int = DIMENSION) -> QueryEncoder:
    """One layer, 16 wide, over the words of the world."""
    torch.manual_seed(seed)
    words = (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *COLOURS,
        *PINS,
        *PRODUCTS,
        "in",
        "ideas",
    )  # a fixed list: training a tokenizer is not repeatable
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    shape = DistilBertConfig(
        vocab_size=len(fast),
        dim=16,
        hidden_dim=32,
        n_layers=1,
        n_heads=2,
        dropout=0.1,
        attention_dropout=0.1,
    )
    return QueryEncoder(DistilBertModel(shape), fast, dimension)


def small_config(**changes: object) -> TrainConfig:
    """A config that trains the world in about a second; ``changes`` are top-level keys, tables are
    merged.
    """
    table: dict[str, object] = {
        "steps": 30,
        "log_every": 10,
        "checkpoint_every": 0,
        "device": "cpu",
        "model": {"dimension": DIMENSION},
        "entity_tower": {"table_rows": 500, "token_dimension": 16, "hidden": [32]},
        "batch": {"pairs": 48, "query_chunk": 16, "entity_chunk": 64},
        "loss": {
            "matryoshka": {"4": 0.05, "8": 0.05},
            "sketch_width": 4096,
            "random_negatives": 1.0,
            "random_query_negatives": 1.0,
        },
        "optimiser": {
            "learning_rate": 0.01,
            "query_learning_rate": 0.005,
            "token_embedding_learning_rate": 0.005,
            "warmup_steps": 3,
        },
        "validation": {"fraction": 0.0},
    }
    for key, value in changes.items():
        known = table.get(key)
        table[key] = (
            {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        )
    return train_config(table)


def write_run(folder: Path, first: str, last: str) -> Path:
    """Write the tables, a query tower and ``run.toml`` of a small training; return the last.

    Args:
        folder: Where they are written.
        first: Lines of the config before its sections.
        last: Lines of its last section, ``[loss]``, and further sections.
    """
    data = world()
    data.catalogue.write_parquet(folder / "catalogue.parquet")
    data.pairs.write_parquet(folder / "pairs.parquet")
    tiny_query_encoder().save(folder / "query")
    path = folder / "run.toml"
    path.write_text(f"""
device = "cpu"
{first}

[data]
catalogue = ["catalogue.parquet"]
pairs = ["pairs.parquet"]

[model]
query_encoder = "{folder / "query"}"
dimension = {DIMENSION}

[entity_tower]
table_rows = 500
token_dimension = 16
hidden = [32]

[batch]
pairs = 32

[loss]
random_negatives = 1.0
random_query_negatives = 1.0
{last}
""")
    return path
