"""Slices of ``omni bench fusion``: misspelt queries, and entities that no known query led to."""

from __future__ import annotations

import random
from collections.abc import Sequence

import polars as pl

from encoders.datasets.dataset import Dataset
from encoders.text.hashing import text_bucket

MIN_LETTERS = 4
"""Shorter words are not misspelt."""
COLD_OF = 10
"""One entity in this many is made cold."""
_SEED = 2323
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def misspelt(texts: Sequence[str], seed: int = 0) -> list[str | None]:
    """Return each text with one edit of one letter; None where no word is long enough.

    A letter inside the longest word is left out, doubled, swapped with the next or another one.

    Args:
        texts: Queries.
        seed: Another one gives other edits.
    """
    draw = random.Random(seed)
    return [_misspelt(text, draw) for text in texts]


def _misspelt(text: str, draw: random.Random) -> str | None:
    words = text.split(" ")
    number = max(range(len(words)), key=lambda place: len(words[place]))
    word = words[number]
    if len(word) < MIN_LETTERS or not word.isalpha():
        return None
    at = draw.randrange(1, len(word) - 1)
    kind = draw.randrange(4)
    if kind == 0:
        edited = word[:at] + word[at + 1 :]
    elif kind == 1:
        edited = word[: at + 1] + word[at:]
    elif kind == 2:
        edited = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    else:
        letter = draw.choice(_LETTERS if word.isascii() else word)
        edited = word[:at] + letter + word[at + 1 :]
    if edited == word:
        edited = word[:at] + word[at + 1 :]
    return " ".join([*words[:number], edited, *words[number + 1 :]])


def cold_entities(dataset: Dataset) -> set[str]:
    """Choose entities by their ids."""
    ids = dataset.catalogue["id"]
    return set(ids.filter(pl.Series(text_bucket(ids, _SEED, COLD_OF)) == 0).to_list())


def without_known_queries(dataset: Dataset, cold: set[str]) -> Dataset:
    """Return the data set without the train pairs of cold entities."""
    is_cold = pl.col("entity_id").is_in(list(cold))
    pairs = dataset.pairs.filter(~(is_cold & (pl.col("split") == "train")))
    return Dataset(dataset.catalogue, pairs, name=dataset.name, label=dataset.label)
