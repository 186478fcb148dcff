"""Board titles: for each entity the titles people filed it under, specific ones first, without noise and repetition (paper 4.2).

The paper ranks titles by a score of the title's frequency and its words' prevalence, ascending,
then by word count and length, descending, and keeps ten. Its formula is not published; ours, for a
title t on entity e with words w::

    score = mean over w of log2(p(w) / s(w, e)) - log2(1 + n(t, e))

``p(w)``: share of all entities on a board with that word; ``s(w, e)``: share of e's boards with it;
``n(t, e)``: e's boards called t. Words that are common on this entity and rare elsewhere make the
score low; so does a title that many of its boards bear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from encoders.errors import ConfigError
from encoders.text.normal_forms import fold

NOT_WORD = r"[^\p{L}\p{M}\p{N}]+"
ADDRESS = r"://|www\.|\S@\S"

FEATURE_SCHEMA: dict[str, pl.DataType] = {
    "entity_id": pl.String(),
    "title": pl.String(),
    "rank": pl.Int64(),
    "score": pl.Float64(),
    "boards": pl.Int64(),
}
"""Columns of board-title features; ``boards`` is how many of the entity's boards bear the title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoardTitlesConfig:
    """How board titles are chosen."""

    top: int = 10
    """Most titles per entity."""
    max_characters: int = 100
    """Longer titles are noise."""
    max_word_prevalence: float = 0.1
    """A title all of whose words are on boards of more than this share of entities says nothing ("ideas") and is noise."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.max_characters < 1 or not 0 < self.max_word_prevalence <= 1:
            raise ConfigError(
                "BoardTitlesConfig: top and max_characters must be at least 1, max_word_prevalence"
                " within (0, 1]"
            )


class Prevalence(NamedTuple):
    """In how many entities each word occurs; of disjoint sets of entities: add up with :func:`add_prevalence`."""

    words: pl.DataFrame
    """``word``, ``entities``."""
    entities: int
    """Entities with any board."""


def word_prevalence(boards: pl.DataFrame, config: BoardTitlesConfig) -> Prevalence:
    """Count the entities behind each word of the board titles of some entities.

    Args:
        boards: ``board_id, title, entity_id``; all rows of an entity must be in one call.
        config: What is noise.
    """
    titles = _read_titles(boards["title"].unique(), config)
    words = (
        boards.select("entity_id", "title")
        .unique()
        .join(titles, on="title")
        .select("entity_id", "words")
        .explode("words")
        .unique()
    )
    counts = words.group_by(pl.col("words").alias("word")).agg(
        pl.len().cast(pl.Int64).alias("entities")
    )
    return Prevalence(counts.sort("word"), boards["entity_id"].n_unique())


def add_prevalence(parts: list[Prevalence]) -> Prevalence:
    """Prevalence over the union of disjoint sets of entities."""
    words = pl.concat([p.words for p in parts]).group_by("word").agg(pl.col("entities").sum())
    return Prevalence(words.sort("word"), sum(p.entities for p in parts))


def board_titles(
    boards: pl.DataFrame, config: BoardTitlesConfig, prevalence: Prevalence | None = None
) -> pl.DataFrame:
    """Rank and choose the board titles of each entity.

    A title is noise when it holds no letter, is an address, is too long, or consists of words that
    are everywhere. Titles of the same words in any order, case and form are one title, shown in its
    most frequent form. A title that adds no word to those ranked above it is redundant and dropped.

    Args:
        boards: ``board_id, title, entity_id``; all rows of an entity must be in one call. A board
            counts once per entity.
        config: Sizes and what is noise.
        prevalence: Of all entities; None: ``boards`` holds all of them.

    Returns:
        Columns of ``FEATURE_SCHEMA``, sorted by entity and rank (from 1).
    """
    prevalence = prevalence or word_prevalence(boards, config)
    titles = _read_titles(boards["title"].unique(), config)
    # A board that comes with two titles (it was renamed) keeps the first in alphabetical order.
    filed = boards.group_by("entity_id", "board_id").agg(pl.col("title").min())
    all_boards = filed.group_by("entity_id").agg(pl.len().alias("all_boards"))
    forms = (
        filed.group_by("entity_id", "title").agg(pl.len().alias("uses")).join(titles, on="title")
    )
    if not forms.height:
        return pl.DataFrame(schema=FEATURE_SCHEMA)
    best = (
        forms.sort("uses", "title", descending=[True, False])
        .group_by("entity_id", "key")
        .agg(
            pl.col("title").first(),
            pl.col("uses").sum().cast(pl.Int64).alias("boards"),
            pl.col("words").first(),
        )
    )
    on_entity = (
        forms.select("entity_id", "uses", "words")
        .explode("words")
        .group_by("entity_id", "words")
        .agg(pl.col("uses").sum().alias("with_word"))
        .join(all_boards, on="entity_id")
    )
    share = pl.col("entities") / prevalence.entities
    # Whole thousandths, so that sums do not depend on the order in which words come.
    surprise = (
        (1000 * (share / (pl.col("with_word") / pl.col("all_boards"))).log(2))
        .round(0)
        .cast(pl.Int64)
    )
    words = (
        best.select("entity_id", "key", "words")
        .explode("words")
        .join(on_entity, on=["entity_id", "words"])
        .join(prevalence.words, left_on="words", right_on="word")
    )
    scored = words.group_by("entity_id", "key").agg(
        surprise.sum().alias("sum"),
        share.min().alias("rarest"),
        pl.len().cast(pl.Int64).alias("word_count"),
    )
    mean = pl.col("sum") / pl.col("word_count") / 1000
    ranked = (
        best.join(scored, on=["entity_id", "key"])
        .filter(
            (pl.col("rarest") <= config.max_word_prevalence)
            | (prevalence.entities * config.max_word_prevalence < 1)
        )
        .with_columns((mean - (1 + pl.col("boards")).log(2)).round(1).alias("score"))
        .sort(
            "entity_id",
            "score",
            "word_count",
            pl.col("title").str.len_chars(),
            "title",
            descending=[False, False, True, True, False],
        )
        .with_columns(pl.int_range(pl.len()).over("entity_id").alias("place"))
    )
    first = (
        ranked.select("entity_id", "words", "place")
        .explode("words")
        .group_by("entity_id", "words")
        .agg(pl.col("place").min())
    )
    kept = first.select("entity_id", "place").unique()
    chosen = ranked.join(kept, on=["entity_id", "place"], how="semi", maintain_order="left")
    chosen = chosen.with_columns(
        (pl.int_range(pl.len()) + 1).over("entity_id").alias("rank")
    ).filter(pl.col("rank") <= config.top)
    return chosen.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_SCHEMA.items())


def _read_titles(titles: pl.Series, config: BoardTitlesConfig) -> pl.DataFrame:
    """``title, words, key`` of the titles that are not noise; every distinct title is looked at once."""
    title = pl.col("title")
    plausible = (title.str.len_chars() <= config.max_characters) & (
        title.str.strip_chars().str.len_chars() > 1
    )
    clean = pl.DataFrame({"title": titles.drop_nulls()}, schema={"title": pl.String()}).filter(
        plausible & ~title.str.contains(ADDRESS) & title.str.contains(r"\p{L}")
    )
    folded = pl.Series("words", [fold(t) for t in clean["title"].to_list()], dtype=pl.String)
    split = (
        clean.with_columns(folded.str.replace_all(NOT_WORD, " ").str.split(" "))
        .explode("words")
        .filter(pl.col("words") != "")
    )
    words = (
        split.unique().sort("title", "words").group_by("title", maintain_order=True).agg("words")
    )
    return words.with_columns(pl.col("words").list.join(" ").alias("key"))
