"""Choose each entity's board titles: specific ones first, no noise, no repetition (paper 4.2).

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
from encoders.text.words import words_of

SYMBOLS = r"[\p{So}_]"
"""Ornaments: titles that differ in these alone are one title."""
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
    """A title ("ideas") whose words all are on boards of a larger share of entities is noise."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.max_characters < 1 or not 0 < self.max_word_prevalence <= 1:
            raise ConfigError(
                "BoardTitlesConfig: top and max_characters must be at least 1, max_word_prevalence"
                " within (0, 1]"
            )


class Prevalence(NamedTuple):
    """In how many entities each word occurs; ``add_prevalence`` sums disjoint sets of entities."""

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
    """Sum prevalence over disjoint sets of entities."""
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
    # A board that has two titles (it was renamed) keeps the first in alphabetical order.
    filed = boards.group_by("entity_id", "board_id").agg(pl.col("title").min())
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
    all_boards = filed.group_by("entity_id").agg(pl.len().alias("all_boards"))
    scores = _scores(best, _word_surprise(forms, all_boards, prevalence))
    common_words_say_nothing = prevalence.entities * config.max_word_prevalence >= 1
    ranked = (
        scores.filter(
            (pl.col("rarest") <= config.max_word_prevalence) | (not common_words_say_nothing)
        )
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
    chosen = _without_redundant(ranked)
    rank = (pl.int_range(pl.len()) + 1).over("entity_id").alias("rank")
    chosen = chosen.with_columns(rank).filter(pl.col("rank") <= config.top)
    return chosen.select(pl.col(name).cast(dtype) for name, dtype in FEATURE_SCHEMA.items())


def _word_surprise(
    forms: pl.DataFrame, all_boards: pl.DataFrame, prevalence: Prevalence
) -> pl.DataFrame:
    """Measure for each entity and word how common the word is elsewhere, and how rare here.

    Args:
        forms: ``entity_id, title, uses, words``: an entity's titles, each on ``uses`` boards.
        all_boards: ``entity_id, all_boards``: how many boards hold the entity.
        prevalence: Of all entities.

    Returns:
        ``entity_id``, ``words`` (one word), ``share`` (p(w)) and ``surprise``
        (1000 log2(p(w) / s(w, e)), whole, so that sums do not depend on the order of words).
    """
    on_entity = (
        forms.select("entity_id", "uses", "words")
        .explode("words")
        .group_by("entity_id", "words")
        .agg(pl.col("uses").sum().alias("with_word"))
        .join(all_boards, on="entity_id")
        .join(prevalence.words, left_on="words", right_on="word")
    )
    share = pl.col("entities") / prevalence.entities
    surprise = 1000 * (share / (pl.col("with_word") / pl.col("all_boards"))).log(2)
    return on_entity.select(
        "entity_id",
        "words",
        share.alias("share"),
        surprise.round(0).cast(pl.Int64).alias("surprise"),
    )


def _scores(titles: pl.DataFrame, words: pl.DataFrame) -> pl.DataFrame:
    """Score titles (``entity_id, key, title, boards, words``) by what ``_word_surprise`` returned.

    Returns:
        The titles with ``score``, ``word_count`` and ``rarest``, the least prevalence of a word.
    """
    sums = (
        titles.select("entity_id", "key", "words")
        .explode("words")
        .join(words, on=["entity_id", "words"])
        .group_by("entity_id", "key")
        .agg(
            pl.col("surprise").sum().alias("sum"),
            pl.col("share").min().alias("rarest"),
            pl.len().cast(pl.Int64).alias("word_count"),
        )
    )
    mean = pl.col("sum") / pl.col("word_count") / 1000
    score = (mean - (1 + pl.col("boards")).log(2)).round(1)
    return titles.join(sums, on=["entity_id", "key"]).with_columns(score.alias("score"))


def _without_redundant(ranked: pl.DataFrame) -> pl.DataFrame:
    """Keep titles that hold a word which no title ranked above (``place``) has on the entity."""
    first = (
        ranked.select("entity_id", "words", "place")
        .explode("words")
        .group_by("entity_id", "words")
        .agg(pl.col("place").min())
    )
    kept = first.select("entity_id", "place").unique()
    return ranked.join(kept, on=["entity_id", "place"], how="semi", maintain_order="left")


def _read_titles(titles: pl.Series, config: BoardTitlesConfig) -> pl.DataFrame:
    """Split titles that are not noise into words.

    Returns:
        ``title``, ``words`` (distinct and sorted) and ``key`` (the words as one text).
    """
    title = pl.col("title")
    plausible = (title.str.len_chars() <= config.max_characters) & (
        title.str.strip_chars().str.len_chars() > 1
    )
    clean = pl.DataFrame({"title": titles.drop_nulls()}, schema={"title": pl.String()}).filter(
        plausible & ~title.str.contains(ADDRESS) & title.str.contains(r"\p{L}")
    )
    plain = clean["title"].str.replace_all(SYMBOLS, " ").to_list()
    listed = pl.Series("words", [words_of(t) for t in plain], dtype=pl.List(pl.String))
    split = clean.with_columns(listed).explode("words").drop_nulls("words")
    words = (
        split.unique().sort("title", "words").group_by("title", maintain_order=True).agg("words")
    )
    return words.with_columns(pl.col("words").list.join(" ").alias("key"))
