"""Split held-out queries once into halves: ``dev`` for choices, ``test`` for a release's record.

Whoever compares recipes, settings or baselines looks at ``dev``. What was chosen by looking at
pairs is measured too well on them, so ``test`` is read at release time only, by ``omni bench
recall --release`` and ``omni bench hybrid --release``. A query string belongs to one half by a hash
of its folded text, in every data set, version and language.
"""

from __future__ import annotations

import polars as pl

from encoders.errors import ConfigError
from encoders.text.hashing import text_bucket

HELDOUT = "heldout"
DEV = "dev"
TEST = "test"
_SEED = 1117
"""Chosen once; another number is another pair of halves."""


def rows_of_split(pairs: pl.DataFrame, split: str) -> pl.DataFrame:
    """Select the pairs of a split, in order.

    Args:
        pairs: Rows with ``query`` and ``split``.
        split: A value of ``split``, or ``dev`` or ``test`` for half of the ``heldout`` queries.
    """
    if split not in (DEV, TEST):
        return pairs.filter(pl.col("split") == split)
    is_held = pl.col("split") == HELDOUT
    queries = pairs.filter(is_held)["query"].unique(maintain_order=True)
    half = queries.filter(
        pl.Series(text_bucket(queries, _SEED, 2) == int(split == TEST), dtype=pl.Boolean)
    )
    in_half = is_held & pl.col("query").is_in(half.implode())
    return pairs.filter(in_half | (pl.col("split") == split))


def split_for_choices(split: str) -> str:
    """Return the split that an evaluation may look at: ``dev`` for ``heldout``.

    Raises:
        ConfigError: ``test`` was asked for.
    """
    if split == TEST:
        raise ConfigError(
            "the test half of the held-out queries is read at release time only, by `omni bench"
            " recall BUNDLE --release`, which records it. Use --split dev."
        )
    return DEV if split == HELDOUT else split


def describe_split(split: str) -> str:
    """Name a split in the title of a table."""
    return f"held-out {split}" if split in (DEV, TEST) else split
