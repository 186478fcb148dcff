"""Turn engaged events into training and held-out pairs, and check for leaks (paper 4.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import polars as pl

from encoders.errors import ConfigError, DataError
from encoders.logs.events import merge_duplicates
from encoders.tables.schemas import ACTIONS, is_entity_type
from encoders.text.hashing import combine_keys, hash_texts, seeded_hash
from encoders.text.normal_forms import fold_query

PAIR_KEY = ["query", "language", "country", "entity_type", "entity_id", "action"]
PAIR_COLUMNS = [*PAIR_KEY, "count", "timestamp", "split"]

PAPER_ACTIONS: dict[str, tuple[str, ...]] = {
    "pin": ("save", "long_click"),
    "product": ("save", "long_click", "add_to_cart", "checkout"),
    "ad": ("save", "long_click", "add_to_cart", "checkout"),
    "query": ("query_click",),
}
"""Actions that make a pair a positive, by entity type."""
OTHER_ACTIONS = PAPER_ACTIONS["product"]
"""Those of entity types that neither the paper nor ``PairsConfig.actions`` names."""
OTHER_CAP = 200
"""Cap of entity types that ``PairsConfig.caps`` does not name."""


class LeakError(DataError):
    """An evaluation pair can be seen by the model during training; the message names some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """How events become pairs."""

    actions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(PAPER_ACTIONS))
    """Actions that count, by entity type."""
    caps: Mapping[str, int] = field(
        default_factory=lambda: {"pin": 50, "product": 200, "ad": 200, "query": 200}
    )
    """Most distinct queries of one entity in one split; which ones are kept is uniformly random."""
    train_end: datetime | None = None
    """Training events are before this time.

    None: ``heldout_days`` plus ``gap_days`` before the end of the log.
    """
    train_days: int = 365
    """Length of the training window."""
    gap_days: int = 15
    """Days between the training and the held-out window; their events are dropped."""
    heldout_days: int = 30
    """Length of the held-out window; 0: everything up to the end of the log is training data."""
    keep_seen: bool = False
    """Keep held-out pairs whose query and entity are a training pair, too.

    They measure memory, not retrieval.
    """
    seed: int = 0
    """Chooses the queries that a cap keeps."""

    def __post_init__(self) -> None:
        for entity_type, names in self.actions.items():
            if not is_entity_type(entity_type) or not set(names) <= set(ACTIONS) - {"impression"}:
                raise ConfigError(
                    "PairsConfig.actions: expected entity types, such as product, and"
                    f" actions {', '.join(ACTIONS[1:])}, got {entity_type!r}: {', '.join(names)}"
                )
        for entity_type, cap in self.caps.items():
            if not is_entity_type(entity_type) or cap < 1:
                raise ConfigError(
                    "PairsConfig.caps: expected an entity type and a cap of at least 1, got"
                    f" {entity_type!r}: {cap}"
                )
        if self.train_days < 1 or self.gap_days < 0 or self.heldout_days < 0:
            raise ConfigError(
                "PairsConfig: train_days must be at least 1, gap_days and heldout_days at least 0"
            )
        if self.train_end is not None and self.train_end.tzinfo is None:
            raise ConfigError(
                "PairsConfig.train_end needs a time zone, for example datetime(2026, 1, 1,"
                " tzinfo=UTC)"
            )

    def split_at(self, last_event: datetime) -> TimeSplit:
        """Return the windows for a log whose last event is at ``last_event``."""
        held = timedelta(days=self.heldout_days)
        gap = timedelta(days=self.gap_days if self.heldout_days else 0)
        after = last_event + timedelta(microseconds=1)
        end = self.train_end or after - held - gap
        return TimeSplit(end - timedelta(days=self.train_days), end, end + gap, end + gap + held)


class TimeSplit(NamedTuple):
    """Half-open windows ``[train_start, train_end)`` and ``[heldout_start, heldout_end)``."""

    train_start: datetime
    train_end: datetime
    heldout_start: datetime
    heldout_end: datetime


class Pairs(NamedTuple):
    """Pairs of some entities, and what became of every event."""

    frame: pl.DataFrame
    """``PAIR_COLUMNS``, sorted."""
    counts: Counter[str]
    """Events and pairs by what happened to them; counters of disjoint sets of entities add up."""


def build_pairs(
    events: pl.DataFrame,
    config: PairsConfig,
    split: TimeSplit,
    *,
    known: pl.DataFrame | None = None,
    features: pl.DataFrame | None = None,
) -> Pairs:
    """Turn engaged events into pairs with counts.

    Every step works within one entity, so calls on disjoint sets of entities give, together, what
    one call on all of them gives.

    Args:
        events: Columns of ``events.EVENT_SCHEMA``; repeated rows are one event. All events of an
            entity must be in one call.
        config: Actions, caps, seed.
        split: The time windows (see ``PairsConfig.split_at``).
        known: ``entity_type`` and ``entity_id`` of the catalogue; events of other entities are left
            out and counted. None: all are known.
        features: Engaged-query features (``entity_type, entity_id, query``) that training will see;
            held-out pairs among them are dropped and counted. None: none are dropped for this
            reason.

    Returns:
        One row per query, language, country, entity and action within a split: ``count`` events,
        the last at ``timestamp``.
    """
    counts: Counter[str] = Counter({"events": events.height})
    events = merge_duplicates(events)
    counts["dropped: duplicate events"] = counts["events"] - events.height
    events = _count_dropped(
        events, _action_filter(config), counts, "dropped: events whose action makes no pair"
    )
    itself = (pl.col("entity_type") == "query") & (pl.col("query") == pl.col("entity_id"))
    events = _count_dropped(
        events, ~itself, counts, "dropped: clicks on a suggestion equal to the query"
    )
    events = events.with_columns(_window(split).alias("split"))
    events = _count_dropped(events, pl.col("split") != "gap", counts, "dropped: events in the gap")
    events = _count_dropped(
        events, pl.col("split") != "outside", counts, "dropped: events outside the windows"
    )
    if known is not None:
        key = ["entity_type", "entity_id"]
        in_catalogue = events.join(known.select(key).unique(), on=key, how="semi")
        kept = pl.concat([in_catalogue, events.filter(pl.col("entity_type") == "query")])
        unknown = events.height - kept.height
        counts["dropped: events of entities that are not in the catalogue"] = unknown
        events = kept
    pairs = events.group_by([*PAIR_KEY, "split"]).agg(
        pl.len().cast(pl.Int64).alias("count"), pl.col("timestamp").max()
    )
    if not config.keep_seen:
        pairs = _drop_seen(pairs, counts)
    if features is not None:
        pairs = drop_visible(pairs, features, counts)
    pairs = _cap(pairs, config, counts)
    counts["pairs"] = pairs.height
    return Pairs(pairs.select(PAIR_COLUMNS).sort([*PAIR_KEY[3:], *PAIR_KEY[:3], "split"]), counts)


def _window(split: TimeSplit) -> pl.Expr:
    """Name the window of a ``timestamp``: train, gap, heldout or outside."""

    def between(start: datetime, end: datetime) -> pl.Expr:
        return pl.col("timestamp").is_between(start, end, closed="left")

    return (
        pl.when(between(split.train_start, split.train_end))
        .then(pl.lit("train"))
        .when(between(split.heldout_start, split.heldout_end))
        .then(pl.lit("heldout"))
        .when(between(split.train_end, split.heldout_start))
        .then(pl.lit("gap"))
        .otherwise(pl.lit("outside"))
    )


def _count_dropped(
    events: pl.DataFrame, keep: pl.Expr, counts: Counter[str], reason: str
) -> pl.DataFrame:
    """Filter events and count those that are dropped."""
    kept = events.filter(keep)
    counts[reason] += events.height - kept.height
    return kept


def _action_filter(config: PairsConfig) -> pl.Expr:
    """Select events whose action makes a pair for their entity type."""
    wanted = [
        (pl.col("entity_type") == t) & pl.col("action").is_in(list(names))
        for t, names in config.actions.items()
    ]
    other = ~pl.col("entity_type").is_in([*PAPER_ACTIONS, *config.actions])
    return pl.any_horizontal(*wanted, other & pl.col("action").is_in(list(OTHER_ACTIONS)))


def _drop_seen(pairs: pl.DataFrame, counts: Counter[str]) -> pl.DataFrame:
    """Drop the held-out pairs whose folded query and entity are a training pair."""
    heldout = pairs.filter(pl.col("split") == "heldout")
    if not heldout.height:
        return pairs
    folded = fold_query(pl.col("query")).alias("folded")
    # Only entities with held-out pairs can have seen ones: the others are not folded.
    train = (
        pairs.filter(pl.col("split") == "train")
        .join(heldout, on=["entity_type", "entity_id"], how="semi")
        .select(folded, "entity_type", "entity_id")
    )
    unseen = (
        heldout.with_columns(folded)
        .join(train, on=["folded", "entity_type", "entity_id"], how="anti")
        .drop("folded")
    )
    counts["dropped: heldout pairs seen in training"] = heldout.height - unseen.height
    return pl.concat([pairs.filter(pl.col("split") == "train"), unseen])


def drop_visible(pairs: pl.DataFrame, features: pl.DataFrame, counts: Counter[str]) -> pl.DataFrame:
    """Drop the held-out pairs whose query is an engaged query of the entity, and count them."""
    leaking = find_leaks(pairs, features).through_features.select([*PAIR_KEY, "split"])
    counts["dropped: heldout pairs visible in an engaged-query feature"] = leaking.height
    return pairs.join(leaking, on=[*PAIR_KEY, "split"], how="anti", nulls_equal=True)


def _cap(pairs: pl.DataFrame, config: PairsConfig, counts: Counter[str]) -> pl.DataFrame:
    """Keep at most ``caps[entity_type]`` distinct queries per entity and split.

    Kept are those whose seeded hash is smallest.
    """
    group = ["entity_type", "entity_id", "split"]
    crowded = pairs.group_by(group).agg(pl.col("query").n_unique().alias("queries"))
    caps = dict(config.caps)
    cap = pl.col("entity_type").replace_strict(caps, default=OTHER_CAP, return_dtype=pl.Int64)
    crowded = crowded.filter(pl.col("queries") > cap)
    if not crowded.height:
        return pairs
    within = pairs.join(crowded, on=group, how="anti")
    over = pairs.join(crowded, on=group, how="semi")
    distinct = over.select([*group, "query"]).unique()
    queries = hash_texts(distinct["query"].to_list())
    entities = hash_texts(distinct["entity_id"].to_list())
    random_order = seeded_hash(combine_keys(queries, entities), config.seed)
    chosen = (
        distinct.with_columns(pl.Series("random_order", random_order))
        .sort("random_order", "query")
        .with_columns(pl.int_range(pl.len()).over(group).alias("place"))
        .filter(pl.col("place") < cap)
    )
    kept = over.join(chosen, on=[*group, "query"], how="semi")
    counts["dropped: pairs above the popularity cap"] = over.height - kept.height
    return pl.concat([within, kept])


class Leaks(NamedTuple):
    """Evaluation pairs that the model could see during training."""

    through_pairs: pl.DataFrame
    """Held-out pairs whose query (folded) and entity are a training pair."""
    through_features: pl.DataFrame
    """Held-out pairs whose query (folded) is among the entity's engaged-query features."""


def find_leaks(pairs: pl.DataFrame, engaged: pl.DataFrame | None = None) -> Leaks:
    """Find held-out pairs that a training pair or an engaged-query feature shows.

    Args:
        pairs: The pairs table.
        engaged: ``entity_type``, ``entity_id``, ``query`` of engaged-query features, one row each;
            None: not checked.
    """
    keys = ["folded", "entity_type", "entity_id"]
    folded = pairs.with_columns(fold_query(pl.col("query")).alias("folded"))
    heldout = folded.filter(pl.col("split") == "heldout")
    train = folded.filter(pl.col("split") == "train")
    seen = heldout.join(train, on=keys, how="semi").drop("folded")
    if engaged is None:
        return Leaks(seen, seen.clear())
    features = engaged.select(
        fold_query(pl.col("query")).alias("folded"), "entity_type", "entity_id"
    )
    return Leaks(seen, heldout.join(features, on=keys, how="semi").drop("folded"))


def refuse_leaks(leaks: Leaks, heldout_rows: int) -> None:
    """Fail when there is a leak.

    Raises:
        LeakError: Names the number of leaking pairs, three of them, and how to mend it.
    """
    fix_features = (
        "Use features from events before the training end (omni pairs writes them), or drop these"
        " pairs (--drop-leaks)."
    )
    for leaking, through, fix in (
        (leaks.through_pairs, "a training pair", "Build the pairs without --keep-seen."),
        (leaks.through_features, "an engaged-query feature", fix_features),
    ):
        if leaking.height:
            some = leaking.select("query", "entity_id").head(3).iter_rows()
            examples = "; ".join(f"{query!r} -> {entity}" for query, entity in some)
            raise LeakError(
                f"{leaking.height:,} of {heldout_rows:,} evaluation pairs are visible through"
                f" {through}: {examples}. {fix}"
            )


def pairs_table(pairs: pl.DataFrame | pl.LazyFrame) -> pl.DataFrame:
    """Make table 1 of the paper for these pairs: size per pair source.

    A lazy frame is streamed; in memory are its distinct queries and entities, as hashes.

    Returns:
        Per entity type and split, sorted: ``source``, ``actions``, ``pairs`` (rows), ``events``
            (sum of counts), ``queries``, ``entities``.
    """
    table = (
        pairs.lazy()
        .group_by("entity_type", "split")
        .agg(
            pl.col("action").unique().sort().str.join(", ").alias("actions"),
            pl.len().alias("pairs"),
            pl.col("count").sum().alias("events"),
            pl.col("query").hash().n_unique().alias("queries"),
            pl.col("entity_id").hash().n_unique().alias("entities"),
        )
        .select(
            pl.format("query-{}", "entity_type").alias("source"),
            "split",
            "actions",
            "pairs",
            "events",
            "queries",
            "entities",
        )
        .sort("source", "split", descending=[False, True])
    )
    return table.collect(engine="streaming")


def parse_day(text: str) -> datetime:
    """Read a date or ISO 8601 time as UTC.

    Raises:
        ConfigError: It is neither.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"expected a date such as 2026-01-31 or an ISO 8601 time, got {text!r}"
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
