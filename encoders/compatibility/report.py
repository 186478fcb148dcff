"""Measure whether a newer query tower can search an older index, and learn an adapter for it.

Everything is exact search: an index's own ANN recall comes on top and is measured by the index. The
adapter is learned from train queries only; its ridge and its targets are chosen on train queries
that were held back, by labelled Recall@10.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
    EvaluationSettings,
    TaskReport,
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

OLD = "old queries, old index"
PLAIN = "new queries, old index"
ADAPTED = "new + adapter, old index"
REEMBEDDED = "new queries, new index"
FIT_QUERIES = 20_000
"""Most train queries an adapter is learned from: a matrix of 256 x 256 needs no more."""
HELD_BACK = 0.1
"""Part of the train queries that chooses the adapter's ridge and targets."""
RIDGES = (1e-3, 1e-2, 1e-1)
OLD_QUERY_SHARES = (1.0, 0.5, 0.0)
"""Share of the old tower's query vector in the target of an adapted query.

The rest is the mean of its train entities' old vectors.
"""


class CrossSpace:
    """A system with queries of one function and entities of the older bundle."""

    def __init__(
        self, embed_queries: Callable[[Sequence[str]], Float32], entities: _OldIndex
    ) -> None:
        self.embed_queries = embed_queries
        self.embed_entities = entities.embed_entities


class _OldIndex:
    """The older bundle's entity vectors; those of the last catalogue are cached."""

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle
        self._last: tuple[pl.DataFrame, Float32] | None = None

    def embed_entities(self, catalogue: pl.DataFrame) -> Float32:
        if self._last is None or self._last[0] is not catalogue:
            self._last = (catalogue, self._bundle.embed_entities(catalogue))
        return self._last[1]


@dataclass(frozen=True)
class SpacesReport:
    """How well a newer query tower searches an older index."""

    evaluation: EvaluationReport
    adapter: SpaceAdapter | None
    """The adapter of a declaration; None: query vectors search as they are."""
    learned: dict[str, Any]
    """How the adapter was learned; empty where none was."""
    measured: dict[str, Any]
    """Entity type -> system -> labelled Recall@10 with its interval.

    Beside it stand the paired difference to the old tower, and the share of the old tower's exact
    top 10 that the system returns too.
    """
    way: str
    """The system that a declaration stands for: ``PLAIN`` or ``ADAPTED``."""

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of systems worth comparing."""
        systems = list(next(iter(self.evaluation.tasks.values())).overall)
        return [(name, OLD) for name in systems if name != OLD]

    def worst_loss(self) -> tuple[str, float]:
        """Find the entity type that loses the largest part of the old tower's labelled Recall@10.

        Returns:
            The type and that part (negative: a gain).
        """
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
    settings: EvaluationSettings | None = None,
    *,
    adapter: str = "auto",
    rank: int = 0,
) -> SpacesReport:
    """Evaluate the newer query tower on the older bundle's entity vectors.

    Args:
        new: The bundle whose query tower is to search.
        old: The bundle that embedded the index.
        dataset: Train pairs to learn from, held-out pairs to measure on.
        settings: What to measure; None: all held-out pairs of the types that both bundles embed.
            The seed also chooses the adapter's train queries.
        adapter: ``never``; ``always``: learn one, and a declaration goes through it; ``auto``:
            learn one, and a declaration goes through it if held-back train queries find more with
            it than without.
        rank: Its rank; 0: full.

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
    settings = settings or EvaluationSettings()
    fitted: SpaceAdapter | None = None
    learned: dict[str, Any] = {}
    if adapter != "never":
        fitted, learned = learn_adapter(new, old, dataset, rank=rank, seed=settings.seed)
    index = _OldIndex(old)
    crossed = {OLD: CrossSpace(old.embed_queries, index)}
    if new.dimension == old.dimension:
        crossed[PLAIN] = CrossSpace(new.embed_queries, index)
    if fitted is not None:
        apply = fitted.apply
        crossed[ADAPTED] = CrossSpace(lambda texts: apply(new.embed_queries(texts)), index)
    systems = {name: bundle_system(system) for name, system in crossed.items()}
    systems[REEMBEDDED] = bundle_system(new)
    lacking = types_without_tower((old, new), dataset.entity_types)
    report = evaluate_systems(dataset, systems, settings, without_tower=lacking)
    measured = {name: _measure(task, crossed) for name, task in report.tasks.items()}
    gain = learned.get("held_back_recall@10", 0.0) - learned.get(
        "held_back_recall@10_without", -1.0
    )
    if fitted is None or (adapter == "auto" and gain <= 0):
        return SpacesReport(report, None, learned, measured, PLAIN)
    return SpacesReport(report, fitted, learned, measured, ADAPTED)


def _measure(task: TaskReport, crossed: Mapping[str, CrossSpace]) -> dict[str, Any]:
    """Collect one entity type's figures of ``SpacesReport.measured``."""
    rows = {}
    for name, system in crossed.items():
        entities = system.embed_entities(task.task.candidates)
        rows[name] = _top_10(system.embed_queries(task.task.queries), entities)
    found: dict[str, Any] = {}
    for name, metrics in task.overall.items():
        ten = metrics.recall[10]
        found[name] = {"recall@10": ten.value, "low": ten.low, "high": ten.high}
        if name != OLD:
            found[name]["minus_old"] = comparison_dict(task.compare(name, OLD))
        if name in rows:
            found[name]["overlap@10_with_old"] = _overlap(rows[name], rows[OLD])
    return {**found, "pairs": task.overall[OLD].pairs}


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
        dataset: Only the train split is read.
        rank: 0: full.
        queries: At most this many train queries.
        seed: Chooses them.

    Returns:
        The adapter fitted on all of them, and how it was chosen.

    Raises:
        ConfigError: There are no train pairs.
    """
    train = _TrainQueries.sample(old, dataset, queries, seed)
    count = len(train.texts)
    log.info(f"learning the adapter from {count:,} train queries and {len(train.of_query):,} pairs")
    source = new.embed_queries(train.texts)
    old_queries = old.embed_queries(train.texts)
    centres = train.entity_means()
    held = text_bucket(pl.Series(train.texts), seed + 404, 1000) < HELD_BACK * 1000
    trial = {}
    for share in OLD_QUERY_SHARES:
        target = _mix(old_queries, centres, share)
        for ridge in RIDGES:
            fitted = fit_adapter(source[~held], target[~held], rank=rank, ridge=ridge)
            trial[share, ridge] = train.recall_at_10(fitted.apply(source[held]), held)
    share, ridge = max(trial, key=lambda key: trial[key])
    fitted = fit_adapter(source, _mix(old_queries, centres, share), rank=rank, ridge=ridge)
    learned = {
        "train_queries": count,
        "ridge": ridge,
        "old_query_share": share,
        "held_back_recall@10": round(trial[share, ridge], 6),
    }
    if new.dimension == old.dimension:
        learned["held_back_recall@10_without"] = round(train.recall_at_10(source[held], held), 6)
    return fitted, learned


@dataclass(frozen=True)
class _TrainQueries:
    """Train queries with the older bundle's vectors of their entities."""

    texts: list[str]
    entities: Float32
    """``(N, D)``: old vectors of the train entities."""
    of_query: npt.NDArray[np.int64]
    """``(P,)``: place in ``texts`` of each pair's query."""
    of_entity: npt.NDArray[np.int64]
    """``(P,)``: row in ``entities`` of each pair's entity."""

    @classmethod
    def sample(cls, old: ModelBundle, dataset: Dataset, queries: int, seed: int) -> _TrainQueries:
        """Choose at most ``queries`` random train queries and embed their entities."""
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
                f"an adapter is learned from train pairs, but data set {dataset.name!r} has none."
                " Use --adapter none."
            )
        texts = texts.sample(min(queries, len(texts)), seed=seed, shuffle=True)
        pairs = pairs.filter(pl.col("query").is_in(texts.implode()))
        paired = pl.col("id").is_in(pairs["entity_id"].unique().implode())
        known = dataset.catalogue.filter(paired & pl.col("entity_type").is_in(embedded))
        row = pl.int_range(pl.len(), dtype=pl.Int64)
        place = known.select("entity_type", entity_id="id", row=row)
        number = pl.DataFrame({"query": texts, "number": np.arange(len(texts))})
        pairs = pairs.join(place, on=["entity_type", "entity_id"], how="inner")
        pairs = pairs.join(number, on="query", how="inner")
        return cls(
            texts.to_list(),
            old.embed_entities(known),
            pairs["number"].to_numpy(),
            pairs["row"].to_numpy(),
        )

    def entity_means(self) -> Float32:
        """Average the vectors of each query's entities; ``(Q, D)`` unit rows, zeros without any."""
        sums = np.zeros((len(self.texts), self.entities.shape[1]), np.float32)
        np.add.at(sums, self.of_query, self.entities[self.of_entity])
        means: Float32 = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        return means

    def recall_at_10(self, vectors: Float32, held: npt.NDArray[np.bool_]) -> float:
        """Measure the share of the held-back queries' pairs that ``vectors`` find in the top 10."""
        rows = _top_10(vectors, self.entities)
        place = np.cumsum(held) - 1  # of each held-back query among the held-back ones
        chosen = held[self.of_query]
        if not chosen.any():
            return 0.0
        found = rows[place[self.of_query[chosen]]] == self.of_entity[chosen, None]
        return float(found.any(axis=1).mean())


def _mix(first: Float32, second: Float32, share: float) -> Float32:
    mixed: Float32 = (share * first + (1 - share) * second).astype(np.float32)
    return mixed


def _top_10(queries: Float32, entities: Float32) -> npt.NDArray[np.int64]:
    return exact_top_k(queries, entities, min(10, len(entities)))[0]


def _overlap(rows: npt.NDArray[np.int64], reference: npt.NDArray[np.int64]) -> float:
    """Average the share of each query's reference rows that are among its rows."""
    shares = [
        len(set(mine) & set(theirs)) / max(1, len(theirs))
        for mine, theirs in zip(rows.tolist(), reference.tolist(), strict=True)
    ]
    return float(np.mean(shares))
