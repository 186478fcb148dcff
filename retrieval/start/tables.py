"""Make and look at the tables of ``omni start``: pairs, known queries, questions to time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Self

import polars as pl

from encoders.commands.console import say
from encoders.datasets.related_queries import query_entities
from encoders.tables.files import scan_parts, write_table
from encoders.tables.schemas import MAX_ID_CHARACTERS

HELD_OUT_SHARE = 0.1
"""Share of the queries of ready pairs that are held out, where the file holds none out."""
MOST_KNOWN_QUERIES = 50_000
"""The most frequent ones; each is an entity that is embedded and indexed."""
MOST_QUESTIONS = 1_000
FEW_ENGAGEMENTS = 2_000
"""Saves, carts and orders below which clicks count, too, where nothing says how long they were."""
_USUAL_DAYS = 120
"""Length of a log from which on the usual windows hold."""
_PSEUDO_PAIRS = 1_000
"""Of each entity type."""


class Prepared(NamedTuple):
    """The tables in ``OUT/data``."""

    pairs: Path | None
    """File or folder; None: there are none."""
    train_pairs: dict[str, int]
    """Distinct train pairs by entity type."""
    has_engaged_queries: bool

    @classmethod
    def read(cls, pairs: Path, catalogue: Path) -> Self:
        """Look at what was written."""
        engaged = pl.read_parquet_schema(catalogue).get("engaged_queries") == pl.List(pl.String)
        return cls(pairs, count_pairs(pairs), engaged)


def _scan(pairs: Path) -> pl.LazyFrame:
    return scan_parts(pairs) if pairs.is_dir() else pl.scan_parquet(pairs, glob=False)


def count_pairs(pairs: Path) -> dict[str, int]:
    """Count the distinct train pairs of each entity type."""
    counts = (
        _scan(pairs)
        .filter(pl.col("split") == "train")
        .select("query", "entity_type", "entity_id")
        .unique()
        .group_by("entity_type")
        .len()
        .collect()
    )
    return dict(sorted(counts.iter_rows()))


def has_held_out(data: Path) -> bool:
    """Tell whether some pairs of a folder can be evaluated on."""
    for path in (data / "pairs", data / "pairs.parquet"):
        if path.exists():
            held = _scan(path).filter(pl.col("split").is_in(["heldout", "dev"]))
            return bool(held.select(pl.len()).collect().item())
    return False


def hold_out(pairs: Path) -> None:
    """Hold out some queries of a pairs file for evaluation, where none are."""
    frame = pl.read_parquet(pairs, glob=False)
    if (frame["split"] != "train").any():
        return
    chosen = pl.col("query").hash(seed=7) % 1000 < int(1000 * HELD_OUT_SHARE)
    split = pl.when(chosen).then(pl.lit("heldout")).otherwise(pl.lit("train"))
    write_table(frame.with_columns(split.alias("split")), pairs)


def pairs_of_titles(catalogue: Path, out: Path) -> None:
    """Write titles as if they were queries for their entities: what a zero-shot run reads.

    Each is a train pair, which the run wants, and a validation pair, by which weight 0 is taken.
    """
    rows = pl.read_parquet(catalogue, glob=False)
    text = next((name for name in ("title", "description") if name in rows.columns), "id")
    titled = rows.filter(pl.col(text).fill_null("").str.strip_chars() != "")
    frame = (
        titled.group_by("entity_type", maintain_order=True)
        .head(_PSEUDO_PAIRS)
        .select(
            query=pl.col(text).str.head(200),
            entity_type="entity_type",
            entity_id="id",
            count=pl.lit(1),
        )
    )
    splits = (frame.with_columns(split=pl.lit(split)) for split in ("train", "validation"))
    write_table(pl.concat(splits), out)


def log_flags(log: Path) -> list[str]:
    """Choose the flags of ``omni pairs`` that fit a log: its windows, and what a click is worth."""
    rows = pl.scan_parquet(log, glob=False)
    flags = _windows(rows)
    if "dwell_seconds" in rows.collect_schema():
        return flags
    actions = dict(rows.group_by("action").len().collect().iter_rows())
    clicks = actions.get("click", 0)
    engaged = sum(n for name, n in actions.items() if name not in ("click", "impression"))
    if clicks and engaged < FEW_ENGAGEMENTS:
        say(
            f"the log has {clicks:,} clicks and {engaged:,} stronger actions, and no dwell_seconds:"
            " each click counts as an engagement"
        )
        flags.append("--map=action.click=long_click")
    return flags


def _windows(rows: pl.LazyFrame) -> list[str]:
    """Choose what is held out: the usual 30 days after a gap, or the last tenth of a short log."""
    time = pl.col("timestamp")
    first, last = rows.select(first=time.min(), last=time.max()).collect().row(0)
    if not isinstance(first, datetime):
        return []
    span = last - first
    if span.days >= _USUAL_DAYS:
        return []
    end = last - max(span / 10, timedelta(microseconds=1))
    days = span.days // 10 + 1
    return [f"--train-end={end.isoformat()}", "--gap-days=0", f"--heldout-days={days}"]


def known_queries(pairs: Path, data: Path, out: Path) -> bool:
    """Write the train queries as entities of type ``query``; return whether there are any.

    Of a log, those that enough users asked to be engaged queries: the others are private. None
    where the catalogue holds queries already.
    """
    catalogue = pl.scan_parquet(data / "catalogue.parquet", glob=False)
    if catalogue.filter(pl.col("entity_type") == "query").head(1).collect().height:
        return False
    frame = _scan(pairs).select("query", "language", "split", "count").collect()
    asked = data / "engaged_queries"
    if asked.is_dir():
        public = scan_parts(asked).select("query").unique().collect()
        frame = frame.join(public, on="query", how="semi")
    short = pl.col("query").str.len_chars() <= MAX_ID_CHARACTERS
    rows = query_entities(frame.filter(short), "train").head(MOST_KNOWN_QUERIES)
    write_table(rows.select("id", "entity_type", "title"), out)
    return bool(rows.height)


def questions(data: Path, prepared: Prepared, entity_type: str) -> Sequence[str]:
    """List texts to ask for an entity type: held-out queries, other queries, titles."""
    texts: list[str] = []
    if prepared.pairs is not None:
        of_type = _scan(prepared.pairs).filter(pl.col("entity_type") == entity_type)
        held_first = of_type.sort(pl.col("split") == "train", maintain_order=True)
        queries = held_first.select("query").unique(maintain_order=True).head(MOST_QUESTIONS)
        texts = queries.collect()["query"].to_list()
    if not texts:
        rows = pl.read_parquet(data / "catalogue.parquet", glob=False)
        if "title" in rows.columns:
            titles = rows.filter(pl.col("entity_type") == entity_type)["title"].drop_nulls()
            texts = titles.str.strip_chars().str.head(200).head(MOST_QUESTIONS).to_list()
    return [text for text in texts if text.strip()]
