"""Measure whether a newer query tower can search an older index, and learn the adapter that lets it.

Everything is exact search: an index's own ANN recall comes on top and is measured by the index. The
adapter is learned from train queries only; its ridge and its targets are chosen on train queries
that were held back, by labelled Recall@10.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.compatibility.adapter import SpaceAdapter, fit_adapter
from encoders.datasets.dataset import Dataset
from encoders.errors import ConfigError
from encoders.evaluation.report import (
    EvaluationReport,
    bundle_system,
    comparison_dict,
    evaluate_systems,
    types_without_tower,
)
from encoders.exact_search import exact_top_k
from encoders.text.hashing import text_bucket
from encoders.towers.bundle import ModelBundle

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]

OLD, PLAIN, ADAPTED, REEMBEDDED = (
    "old queries, old index",
    "new queries, old index",
    "new + adapter, old index",
    "new queries, new index",
)
FIT_QUERIES = 20_000
"""Most train queries an adapter is learned from: a matrix of 256 x 256 needs no more."""
HELD_BACK = 0.1
RIDGES = (1e-3, 1e-2, 1e-1)
OLD_QUERY_SHARES = (1.0, 0.5, 0.0)
"""What an adapted query should become: this share of the old tower's vector of it, and the rest of its train entities' old vectors."""


class CrossSpace:
    """Queries through one function, entities through the older bundle; the entities last embedded are kept for the next system."""

    def __init__(
        self, embed_queries: Callable[[Sequence[str]], Float32], entities: _OldIndex
    ) -> None:
        self.embed_queries = embed_queries
        self.embed_entities = entities.embed_entities


class _OldIndex:
    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle
        self._last: tuple[pl.DataFrame, Float32] | None = None

    def embed_entities(self, catalogue: pl.DataFrame) -> Float32:
        if self._last is None or self._last[0] is not catalogue:
            self._last = (catalogue, self._bundle.embed_entities(catalogue))
        return self._last[1]


@dataclass(frozen=True)
class SpacesReport:
    """What was found."""

    evaluation: EvaluationReport
    adapter: SpaceAdapter | None
    """What a declaration would hold; None: query vectors search as they are."""
    learned: dict[str, Any]
    """How the adapter was learned; empty where none was."""
    measured: dict[str, Any]
    """By entity type: labelled Recall@10 of every way with its interval, the paired difference to the old tower, and the share of the old
    tower's exact top 10 that the way returns too.
    """
    way: str
    """The way that a declaration would stand for."""

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of systems worth comparing."""
        systems = list(next(iter(self.evaluation.tasks.values())).overall)
        return [(name, OLD) for name in systems if name != OLD]

    def worst_loss(self) -> tuple[str, float]:
        """The entity type that loses the largest part of the old tower's labelled Recall@10, and that part (negative: a gain)."""
        losses = {}
        for entity_type, found in self.measured.items():
            before, after = found[OLD]["recall@10"], found[self.way]["recall@10"]
            losses[entity_type] = 1 - after / before if before else 0.0
        worst = max(losses, key=lambda name: losses[name])
        return worst, losses[worst]


def compare_spaces(
    new: ModelBundle,
    old: ModelBundle,
    dataset: Dataset,
    *,
    adapter: str = "auto",
    rank: int = 0,
    entity_types: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> SpacesReport:
    """Evaluate the newer query tower on the older bundle's entity vectors.

    Args:
        new: The bundle whose query tower is to search.
        old: The bundle that embedded the index.
        dataset: Train pairs to learn from, held-out pairs to measure on.
        adapter: ``never``; ``always``: learn one, and a declaration goes through it; ``auto``:
            learn one, and a declaration goes through it if train queries that it did not learn from
            find more with it than without.
        rank: Its rank; 0: full.
        entity_types: Types to measure; None: all of the catalogue that both bundles embed.
        seed: Of every choice.
        options: Further ones of ``evaluate_systems``: ``split``, ``corpus_size``, ``max_queries``,
            ``resamples``, ``slices``.

    Raises:
        ConfigError: Both bundles have one space, or vectors of different widths are to be compared
            without an adapter.
    """
    if new.space_id == old.space_id:
        raise ConfigError(
            f"both bundles have space {new.space_id[:16]}: an index of one is an index of the"
            " other. Nothing to measure."
        )
    if adapter == "never" and new.dimension != old.dimension:
        raise ConfigError(
            f"vectors of {new.dimension} numbers cannot search vectors of {old.dimension} as they"
            " are: leave --adapter none out, so that an adapter is learned."
        )
    fitted, learned = (
        learn_adapter(new, old, dataset, rank=rank, seed=seed) if adapter != "never" else (None, {})
    )
    index = _OldIndex(old)
    ways = {OLD: CrossSpace(old.embed_queries, index)}
    if new.dimension == old.dimension:
        ways[PLAIN] = CrossSpace(new.embed_queries, index)
    if fitted is not None:
        ways[ADAPTED] = CrossSpace(lambda texts: fitted.apply(new.embed_queries(texts)), index)
    systems = {name: bundle_system(way) for name, way in ways.items()}
    systems[REEMBEDDED] = bundle_system(new)
    lacking = types_without_tower((old, new), dataset.entity_types)
    report = evaluate_systems(
        dataset, systems, entity_types=entity_types, without_tower=lacking, seed=seed, **options
    )
    measured: dict[str, Any] = {}
    for entity_type, task in report.tasks.items():
        found: dict[str, Any] = {}
        entities = index.embed_entities(task.task.candidates)
        rows = {
            name: _top_10(way.embed_queries(task.task.queries), entities)
            for name, way in ways.items()
        }
        for name, metrics in task.overall.items():
            ten = metrics.recall[10]
            found[name] = {"recall@10": ten.value, "low": ten.low, "high": ten.high}
            if name != OLD:
                found[name]["minus_old"] = comparison_dict(task.compare(name, OLD))
            if name in rows:
                found[name]["overlap@10_with_old"] = _overlap(rows[name], rows[OLD])
        measured[entity_type] = {**found, "pairs": next(iter(task.overall.values())).pairs}
    with_it, without = (
        learned.get("held_back_recall@10", 0.0),
        learned.get("held_back_recall@10_without", -1.0),
    )
    if fitted is None or (adapter == "auto" and with_it <= without):
        return SpacesReport(report, None, learned, measured, PLAIN)
    return SpacesReport(report, fitted, learned, measured, ADAPTED)


def learn_adapter(
    new: ModelBundle,
    old: ModelBundle,
    dataset: Dataset,
    *,
    rank: int = 0,
    queries: int = FIT_QUERIES,
    seed: int = 0,
) -> tuple[SpaceAdapter, dict[str, Any]]:
    """Learn a linear map from the newer query space to the older space, from train queries.

    Args:
        new: Its query tower makes what is mapped.
        old: Its towers make what it is mapped to.
        dataset: Only the train split is looked at.
        rank: 0: full.
        queries: At most this many train queries.
        seed: Chooses them.

    Returns:
        The adapter fitted on all of them, and how it was chosen.

    Raises:
        ConfigError: There are no train pairs.
    """
    embedded = [name for name in dataset.entity_types if name != "query" and old.embeds(name)]
    pairs = (
        dataset.split("train")
        .filter(pl.col("entity_type").is_in(embedded))
        .select("query", "entity_type", "entity_id")
        .unique(maintain_order=True)
    )
    texts = pairs["query"].unique(maintain_order=True)
    if texts.is_empty():
        raise ConfigError(
            f"an adapter is learned from train pairs, but data set {dataset.name!r} has none. Use"
            " --adapter none."
        )
    texts = texts.sample(min(queries, len(texts)), seed=seed, shuffle=True)
    pairs = pairs.filter(pl.col("query").is_in(texts.implode()))
    log.info(f"learning the adapter from {len(texts):,} train queries and {pairs.height:,} pairs")
    source, old_queries = new.embed_queries(texts.to_list()), old.embed_queries(texts.to_list())
    paired = pl.col("id").is_in(pairs["entity_id"].unique().implode())
    known = dataset.catalogue.filter(paired & pl.col("entity_type").is_in(embedded))
    entities = old.embed_entities(known)
    place = known.select(
        "entity_type", entity_id=pl.col("id"), row=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    number = pl.DataFrame({"query": texts, "number": np.arange(len(texts))})
    pairs = pairs.join(place, on=["entity_type", "entity_id"], how="inner").join(
        number, on="query", how="inner"
    )
    of_query, of_entity = pairs["number"].to_numpy(), pairs["row"].to_numpy()
    centres = np.zeros_like(old_queries)
    np.add.at(centres, of_query, entities[of_entity])
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    held = text_bucket(texts, seed + 404, 1000) < HELD_BACK * 1000
    trial = {}
    for share in OLD_QUERY_SHARES:
        target = _mix(old_queries, centres, share)
        for ridge in RIDGES:
            fitted = fit_adapter(source[~held], target[~held], rank=rank, ridge=ridge)
            rows = _top_10(fitted.apply(source[held]), entities)
            trial[share, ridge] = _hits(rows, np.flatnonzero(held), of_query, of_entity)
    share, ridge = max(trial, key=lambda key: trial[key])
    fitted = fit_adapter(source, _mix(old_queries, centres, share), rank=rank, ridge=ridge)
    learned = {
        "train_queries": len(texts),
        "ridge": ridge,
        "old_query_share": share,
        "held_back_recall@10": round(trial[share, ridge], 6),
    }
    if new.dimension == old.dimension:
        plain = _hits(_top_10(source[held], entities), np.flatnonzero(held), of_query, of_entity)
        learned["held_back_recall@10_without"] = round(plain, 6)
    return fitted, learned


def _mix(first: Float32, second: Float32, share: float) -> Float32:
    mixed: Float32 = (share * first + (1 - share) * second).astype(np.float32)
    return mixed


def _top_10(queries: Float32, entities: Float32) -> npt.NDArray[np.int64]:
    return exact_top_k(queries, entities, min(10, len(entities)))[0]


def _overlap(rows: npt.NDArray[np.int64], reference: npt.NDArray[np.int64]) -> float:
    return float(
        np.mean(
            [
                len(set(a) & set(b)) / max(1, len(b))
                for a, b in zip(rows.tolist(), reference.tolist(), strict=True)
            ]
        )
    )


def _hits(
    rows: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    of_query: npt.NDArray[np.int64],
    of_entity: npt.NDArray[np.int64],
) -> float:
    """Share of the held-back queries' pairs whose entity is among the query's rows."""
    where = np.full(int(of_query.max(initial=0)) + 1, -1)
    numbers = numbers[numbers < len(where)]
    where[numbers] = np.arange(len(numbers))
    chosen = where[of_query] >= 0
    if not chosen.any():
        return 0.0
    return float((rows[where[of_query[chosen]]] == of_entity[chosen, None]).any(axis=1).mean())
