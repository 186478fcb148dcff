"""The training pairs of each dataset as integers: which are drawn how often, and how often each candidate is then met.

The frequencies are those of the loss's correction for sampling (paper section 4.3), counted with
sketches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from encoders.config.train_config import (
    PAPER_SHARES,
    VECTOR_PREFIX,
    DatasetConfig,
    LossConfig,
    TrainConfig,
)
from encoders.errors import DataError
from encoders.text.hashing import combine_keys
from encoders.training.data.balancing import balance_values, balance_weights
from encoders.training.data.count_min_sketch import CountMinSketch

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TaskData:
    """One (dataset, candidate tower): whose vectors are candidates, and how often each candidate is met."""

    name: str
    candidate: str
    pair_log_q: Float32
    """``log(C(q, p) / C(q))`` of each pair of the dataset, ``(P,)``."""
    in_batch_frequency: Float32
    """``C(e) / N`` of each pair's candidate among the positives, ``(P,)``."""
    random_frequency: Float32
    """``C(e) / N`` of each member of the pool, ``(pool,)``."""


@dataclass(frozen=True)
class PairSet:
    """The training pairs of one dataset as integers."""

    config: DatasetConfig
    queries: Int64
    """Query number of each pair, ``(P,)``."""
    candidates: Int64
    """Catalogue row, or query number for related queries, ``(P,)``."""
    weights: Float32
    """How often each pair is drawn, relative, ``(P,)``."""
    weighted: bool
    """Whether pairs are drawn by ``weights``; otherwise every pair once per epoch."""
    folds: Int64
    """Cross-fit fold of each pair's query, ``(P,)``."""
    pool: Int64
    """Candidates random negatives are drawn from: every catalogue row of the entity type, or every query, ``(pool,)``."""
    tasks: tuple[TaskData, ...]

    @property
    def is_related_queries(self) -> bool:
        """Whether both sides are queries."""
        return self.config.entity_type == "query"


def choose_datasets(
    train: pl.DataFrame, config: TrainConfig
) -> tuple[tuple[DatasetConfig, ...], tuple[str, ...]]:
    """The datasets to train, and what to say about those and about pairs that are left out."""
    counts = dict(train.group_by("entity_type").len().sort("entity_type").iter_rows())
    if not config.datasets:
        if not counts:
            raise DataError(
                "no train pair is left: none names an entity of the catalogue. Write the ids alike"
                " in both tables."
            )
        return _default_datasets(train), ()
    datasets = tuple(
        d for d in config.datasets if not d.optional or not _rows_of(d, train).is_empty()
    )
    if not datasets:
        names, types = ", ".join(d.name for d in config.datasets), ", ".join(counts) or "none"
        raise DataError(
            f"no dataset has train pairs: the config names {names}; the pairs have {types}. Name"
            " one of these, or add pairs."
        )
    notes = [
        f"dataset {d.name!r} has no train pairs; left out"
        for d in config.datasets
        if d not in datasets
    ]
    unused = {
        name: count
        for name, count in counts.items()
        if name not in {d.entity_type for d in config.datasets}
    }
    if unused:
        told = ", ".join(f"{count:,} {name}" for name, count in unused.items())
        notes.append(f"not trained on: {told} pairs, which no [[datasets]] of the config takes")
    return datasets, tuple(notes)


def _default_datasets(train: pl.DataFrame) -> tuple[DatasetConfig, ...]:
    present = train["entity_type"].unique().to_list()
    return tuple(
        DatasetConfig(name=name)
        for name in sorted(present, key=lambda n: (-PAPER_SHARES.get(n, 1.0), n))
    )


def _rows_of(dataset: DatasetConfig, train: pl.DataFrame) -> pl.DataFrame:
    """The train pairs of a dataset; a query that is its own related query teaches nothing."""
    rows = train.filter(pl.col("entity_type") == dataset.entity_type)
    if dataset.actions:
        rows = rows.filter(pl.col("action").is_in(dataset.actions))
    if dataset.entity_type == "query":
        rows = rows.filter(pl.col("query_number") != pl.col("candidate"))
    return rows


def make_pair_set(
    dataset: DatasetConfig,
    train: pl.DataFrame,
    catalogue: pl.DataFrame,
    pool: Int64,
    folds: Int64,
    vectors: dict[str, Tensor],
    config: TrainConfig,
) -> PairSet:
    """The pairs of one dataset.

    Args:
        dataset: Which of the train pairs, and which candidates they have.
        train: All train pairs, from ``training_pairs.number_pairs``.
        catalogue: What ``candidate`` of the pairs counts rows of.
        pool: Candidates of random negatives.
        folds: Cross-fit fold of every query.
        vectors: Frozen vector columns, by name.
        config: The run.

    Raises:
        SchemaError: The column to balance by is nowhere.
        DataError: There is no such pair, none of them has a vector, or their counts are no weights.
    """
    rows = _rows_of(dataset, train)
    if rows.is_empty():
        actions = f" with action {' or '.join(dataset.actions)}" if dataset.actions else ""
        types = ", ".join(sorted(train["entity_type"].unique().to_list()))
        raise DataError(
            f"dataset {dataset.name!r} is empty: no training pair of entity type"
            f" {dataset.entity_type!r}{actions}; the pairs have {types}. Remove the dataset, say"
            " optional = true in it, or add pairs."
        )
    by_count = config.batch.weighting == "count"
    counts = rows["count"].to_numpy().astype(np.float64)
    if by_count and not (np.isfinite(counts).all() and counts.min() >= 0 and counts.sum() > 0):
        raise DataError(
            f"dataset {dataset.name!r}: weighting by count needs counts of 0 or more that are not"
            " all 0."
        )
    weights = counts if by_count else np.ones(len(counts))
    if dataset.balance_by:
        weights = balance_weights(
            balance_values(dataset, rows, catalogue), weights, dataset.balance_exponent
        )
    queries, candidates = rows["query_number"].to_numpy(), rows["candidate"].to_numpy()
    counted = whole_counts(weights)
    tasks = []
    for candidate in dataset.candidates:
        present = np.ones(len(rows), dtype=bool)
        if candidate.startswith(VECTOR_PREFIX):
            has = vectors[candidate.removeprefix(VECTOR_PREFIX)].abs().sum(dim=1).numpy() > 0
            present = has[candidates]
            if not present.any():
                raise DataError(
                    f"dataset {dataset.name!r}: no positive has a vector in column"
                    f" {candidate.removeprefix(VECTOR_PREFIX)!r}."
                )
        tasks.append(
            _task(
                f"{dataset.name}/{candidate}",
                candidate,
                queries,
                candidates,
                counted,
                present,
                pool,
                config.loss,
            )
        )
    return PairSet(
        config=dataset,
        queries=queries,
        candidates=candidates,
        weights=weights.astype(np.float32),
        weighted=by_count or bool(dataset.balance_by),
        folds=folds[queries],
        pool=pool,
        tasks=tuple(tasks),
    )


def whole_counts(weights: npt.NDArray[np.float64]) -> Int64:
    """Weights as the whole numbers a sketch counts: as they are when whole, else scaled so that the least is 100, or their sum 2^52."""
    whole = np.rint(weights)
    if not np.array_equal(whole, weights):
        scale = 100 / max(weights[weights > 0].min(), 100 * weights.sum() / 2.0**52)
        whole = np.maximum(np.rint(weights * scale), weights > 0)
    return whole.astype(np.int64)


def _task(
    name: str,
    candidate: str,
    queries: Int64,
    candidates: Int64,
    counted: Int64,
    present: npt.NDArray[np.bool_],
    pool: Int64,
    loss: LossConfig,
) -> TaskData:
    """Count with sketches: the conditional of positives given the query, and the in-batch distribution; the random one is uniform.

    Candidates without a vector are drawn like the others and then left out, so the share of one
    that has a vector is of all draws.
    """
    pair_counts, query_counts, in_batch = (
        CountMinSketch(loss.sketch_width, loss.sketch_depth, seed) for seed in range(3)
    )
    query_keys, candidate_keys = queries.astype(np.uint64), candidates.astype(np.uint64)
    pair_keys = combine_keys(query_keys, candidate_keys)
    whole = counted * present
    pair_counts.add(pair_keys, whole)
    query_counts.add(query_keys, whole)
    in_batch.add(candidate_keys, whole)
    conditional = np.log(
        np.maximum(pair_counts.count(pair_keys), 1) / np.maximum(query_counts.count(query_keys), 1)
    )
    return TaskData(
        name=name,
        candidate=candidate,
        pair_log_q=np.minimum(conditional, 0).astype(np.float32),
        in_batch_frequency=(
            np.maximum(in_batch.count(candidate_keys), 1) / max(counted.sum(), 1)
        ).astype(np.float32),
        random_frequency=np.full(len(pool), 1 / len(pool), np.float32),
    )
