"""Find each entity's engaged queries, best first, in a window of events (paper 4.2)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import polars as pl

from encoders.errors import ConfigError
from encoders.tables.schemas import ACTIONS
from encoders.text.normal_forms import fold_query, folded_queries

FEATURE_SCHEMA: dict[str, pl.DataType] = {
    "entity_type": pl.String(),
    "entity_id": pl.String(),
    "query": pl.String(),
    "rank": pl.Int64(),
    "score": pl.Int64(),
    "users": pl.Int64(),
}
"""Columns of engaged-query features; ``rank`` counts from 1 within an entity."""

ENGAGEMENTS = ("click", "long_click", "save", "add_to_cart", "checkout")
"""Actions that count for engaged queries."""

ENGAGED_KEY = ["timestamp", "user_id", "entity_type", "entity_id", "query", "action"]
"""What makes two log rows the same engagement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngagedQueriesConfig:
    """How engaged queries are chosen."""

    weights: Mapping[str, int] = field(
        default_factory=lambda: {
            "click": 1,
            "long_click": 3,
            "save": 5,
            "add_to_cart": 5,
            "checkout": 10,
        }
    )
    """Weight of each action in the score; whole, so that sums do not depend on their order."""
    top: int = 20
    """Most queries per entity."""
    window_days: int = 730
    """Events older than this, counted back from the end of the window, no longer count."""
    min_users: int = 3
    """A query becomes a feature only when this many different users engaged through it.

    Events without a user id are one user.
    """

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(ENGAGEMENTS)
        if unknown:
            raise ConfigError(
                f"EngagedQueriesConfig.weights: expected actions {', '.join(ENGAGEMENTS)}, got"
                f" {', '.join(sorted(unknown))}"
            )
        if any(not isinstance(w, int) or w < 0 for w in self.weights.values()):
            raise ConfigError(
                "EngagedQueriesConfig.weights must be whole numbers of at least 0, got"
                f" {dict(self.weights)}"
            )
        if self.top < 1 or self.window_days < 1 or self.min_users < 1:
            raise ConfigError(
                "EngagedQueriesConfig: top, window_days and min_users must be at least 1"
            )

    def score(self) -> pl.Expr:
        """Return an expression for the weight of an event by its ``action``."""
        weights = {a: int(self.weights.get(a, 0)) for a in ACTIONS}
        return pl.col("action").replace_strict(weights, return_dtype=pl.Int64)


def engaged_queries(
    events: pl.DataFrame,
    config: EngagedQueriesConfig,
    until: datetime,
    *,
    deleted_users: Collection[str] = (),
    deleted_queries: Collection[str] = (),
) -> pl.DataFrame:
    """Find each entity's engaged queries in the window that ends at ``until``.

    Every step works within one entity, so calls on disjoint sets of entities give, together, what
    one call on all of them gives.

    Args:
        events: Columns of ``events.EVENT_SCHEMA``; repeated rows are one event. All events of an
            entity must be in one call.
        config: Weights, sizes and the privacy threshold.
        until: End of the window (exclusive): its start is ``config.window_days`` earlier.
        deleted_users: Users who asked to be deleted; their events do not count.
        deleted_queries: Queries that must not appear, however they are spelt (case, width, white
            space).

    Returns:
        Columns of ``FEATURE_SCHEMA``, sorted by entity and rank. Ranked by score, then users (both
        descending), then query.
    """
    start = until - timedelta(days=config.window_days)
    inside = (pl.col("timestamp") >= start) & (pl.col("timestamp") < until)
    kept = counted_events(events.filter(inside), config)
    if deleted_users:
        kept = kept.filter(~pl.col("user_id").is_in(list(deleted_users)))
    if deleted_queries:
        kept = kept.filter(~fold_query(pl.col("query")).is_in(folded_queries(deleted_queries)))
    totals = kept.group_by("entity_type", "entity_id", "query").agg(
        config.score().sum().alias("score"),
        pl.col("user_id").n_unique().cast(pl.Int64).alias("users"),
    )
    return best_queries(totals, config)


def counted_events(events: pl.DataFrame, config: EngagedQueriesConfig) -> pl.DataFrame:
    """Select the distinct events that count, with the columns of ``ENGAGED_KEY``.

    Events that differ in language or country alone are one.
    """
    actions = [a for a in ENGAGEMENTS if config.weights.get(a, 0) > 0]
    return (
        events.filter(pl.col("action").is_in(actions) & (pl.col("entity_type") != "query"))
        .select(ENGAGED_KEY)
        .unique()
    )


def best_queries(totals: pl.DataFrame, config: EngagedQueriesConfig) -> pl.DataFrame:
    """Rank totals and keep the best queries of each entity, as ``FEATURE_SCHEMA``.

    Args:
        totals: ``entity_type, entity_id, query, score, users``.
        config: How many users a query needs, and how many queries are kept.
    """
    order = totals.filter((pl.col("users") >= config.min_users) & (pl.col("score") > 0)).sort(
        "entity_type",
        "entity_id",
        "score",
        "users",
        "query",
        descending=[False, False, True, True, False],
    )
    ranked = order.with_columns(
        (pl.int_range(pl.len()) + 1).over("entity_type", "entity_id").cast(pl.Int64).alias("rank")
    )
    return ranked.filter(pl.col("rank") <= config.top).select(
        pl.col(name).cast(dtype) for name, dtype in FEATURE_SCHEMA.items()
    )


def attach_lists(
    catalogue: pl.DataFrame, features: pl.DataFrame, column: str, value: str
) -> pl.DataFrame:
    """Put ranked features on the catalogue as one list column; entities without get an empty list.

    Args:
        catalogue: With ``id``, and ``entity_type`` where the features have it.
        features: With ``entity_id``, ``rank``, the text column ``value`` and perhaps
            ``entity_type``; features of entities that are not in the catalogue find no row and are
            left out.
        column: Name of the list column (``engaged_queries``, ``board_titles``); an existing one is
            replaced.
        value: Column of ``features`` to collect, best first.
    """
    key = ["entity_type", "id"] if "entity_type" in features.columns else ["id"]
    ordered = features.rename({"entity_id": "id"}).sort(*key, "rank")
    lists = ordered.group_by(key, maintain_order=True).agg(pl.col(value).alias(column))
    kept = catalogue.drop(column, strict=False)
    joined = kept.join(lists, on=key, how="left", maintain_order="left")
    return joined.with_columns(pl.col(column).fill_null([]))
