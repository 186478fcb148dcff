"""Turn each dataset's pairs into integers: what is drawn how often, and each candidate's frequency.

The sampling frequencies are those of the loss's logQ correction (paper section 4.3): exact, or from
count-min sketches where ``loss.sketch_width`` asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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
    """One (dataset, candidate tower): what embeds the candidates, and how often each is drawn."""

    name: str
    candidate: str
    """As in ``DatasetConfig.candidates``."""
    pair_log_q: Float32
    """``log(C(q, p) / C(q))`` of each pair of the dataset, ``(P,)``."""
    in_batch_frequency: Float32
    """``C(e) / N`` of each pair's candidate among the positives, ``(P,)``."""
    random_frequency: Float32
    """``C(e) / N`` of each member of the pool, ``(pool,)``."""

    @property
    def vector_column(self) -> str | None:
        """Name of the frozen vector column that the candidates are; None: a tower embeds them."""
        return vector_column(self.candidate)


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
    """What random negatives are drawn from, ``(pool,)``: rows of the type, or all query numbers."""
    tasks: tuple[TaskData, ...]

    @property
    def is_related_queries(self) -> bool:
        """Whether both sides are queries."""
        return self.config.entity_type == "query"


class SharedTables(NamedTuple):
    """What the pairs of all datasets are made from."""

    train: pl.DataFrame
    """All train pairs, from ``pairs.number_pairs``."""
    catalogue: pl.DataFrame
    """What ``candidate`` of the pairs counts rows of."""
    pools: Mapping[str, Int64]
    """Candidates of random negatives, by entity type."""
    folds: Int64
    """Cross-fit fold of every query."""
    vectors: Mapping[str, Tensor]
    """Frozen vector columns, by name."""


def vector_column(candidate: str) -> str | None:
    """Return the column that a candidate ``vector:COLUMN`` names; None: a tower embeds it."""
    if not candidate.startswith(VECTOR_PREFIX):
        return None
    return candidate.removeprefix(VECTOR_PREFIX)


def choose_datasets(
    train: pl.DataFrame, config: TrainConfig
) -> tuple[tuple[DatasetConfig, ...], tuple[str, ...]]:
    """Choose the datasets to train; also return notes on datasets and pairs that are left out."""
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
        found = ", ".join(f"{count:,} {name}" for name, count in unused.items())
        notes.append(f"not trained on: {found} pairs, which no [[datasets]] of the config takes")
    return datasets, tuple(notes)


def _default_datasets(train: pl.DataFrame) -> tuple[DatasetConfig, ...]:
    present = train["entity_type"].unique().to_list()
    return tuple(
        DatasetConfig(name=name)
        for name in sorted(present, key=lambda n: (-PAPER_SHARES.get(n, 1.0), n))
    )


def _rows_of(dataset: DatasetConfig, train: pl.DataFrame) -> pl.DataFrame:
    """Select the train pairs of a dataset; a query that is its own related query is left out."""
    rows = train.filter(pl.col("entity_type") == dataset.entity_type)
    if dataset.actions:
        rows = rows.filter(pl.col("action").is_in(dataset.actions))
    if dataset.entity_type == "query":
        rows = rows.filter(pl.col("query_number") != pl.col("candidate"))
    return rows


def make_pair_set(dataset: DatasetConfig, tables: SharedTables, config: TrainConfig) -> PairSet:
    """Make the pairs of one dataset.

    Args:
        dataset: Which of the train pairs, and which candidates they have.
        tables: What they are made from.
        config: The run.

    Raises:
        SchemaError: The column to balance by is nowhere.
        DataError: There is no such pair, none of them has a vector, or their counts are no weights.
    """
    rows = _rows_of(dataset, tables.train)
    _require_rows(rows, dataset, tables.train)
    weights = _weights(rows, dataset, tables.catalogue, config)
    draws = _Draws(
        rows["query_number"].to_numpy(), rows["candidate"].to_numpy(), whole_counts(weights)
    )
    pool = tables.pools[dataset.entity_type]
    tasks = []
    for candidate in dataset.candidates:
        present = _have_vector(draws.candidates, candidate, dataset, tables.vectors)
        pair_log_q, in_batch_frequency = _count_draws(draws, present, config.loss)
        task = TaskData(
            name=f"{dataset.name}/{candidate}",
            candidate=candidate,
            pair_log_q=pair_log_q,
            in_batch_frequency=in_batch_frequency,
            random_frequency=np.full(len(pool), 1 / len(pool), np.float32),
        )
        tasks.append(task)
    return PairSet(
        config=dataset,
        queries=draws.queries,
        candidates=draws.candidates,
        weights=weights.astype(np.float32),
        weighted=config.batch.weighting == "count" or bool(dataset.balance_by),
        folds=tables.folds[draws.queries],
        pool=pool,
        tasks=tuple(tasks),
    )


class _Draws(NamedTuple):
    """The pairs of a dataset and how often each is drawn."""

    queries: Int64
    candidates: Int64
    counts: Int64
    """Relative, ``(P,)``."""


def _require_rows(rows: pl.DataFrame, dataset: DatasetConfig, train: pl.DataFrame) -> None:
    if not rows.is_empty():
        return
    actions = f" with action {' or '.join(dataset.actions)}" if dataset.actions else ""
    types = ", ".join(sorted(train["entity_type"].unique().to_list()))
    raise DataError(
        f"dataset {dataset.name!r} is empty: no training pair of entity type"
        f" {dataset.entity_type!r}{actions}; the pairs have {types}. Remove the dataset, say"
        " optional = true in it, or add pairs."
    )


def _weights(
    rows: pl.DataFrame, dataset: DatasetConfig, catalogue: pl.DataFrame, config: TrainConfig
) -> npt.NDArray[np.float64]:
    """Compute how often each pair is drawn, relative, ``(P,)``."""
    weights = np.ones(rows.height)
    if config.batch.weighting == "count":
        weights = rows["count"].to_numpy().astype(np.float64)
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
            raise DataError(
                f"dataset {dataset.name!r}: weighting by count needs counts of 0 or more that are"
                " not all 0."
            )
    if dataset.balance_by:
        values = balance_values(dataset, rows, catalogue)
        weights = balance_weights(values, weights, dataset.balance_exponent)
    return weights


def whole_counts(weights: npt.NDArray[np.float64]) -> Int64:
    """Turn weights into the whole numbers that are counted, int64 ``(N,)``.

    Whole weights stay as they are; others are scaled so that the least is 100, or their sum 2^52.
    """
    whole = np.rint(weights)
    if not np.array_equal(whole, weights):
        scale = 100 / max(weights[weights > 0].min(), 100 * weights.sum() / 2.0**52)
        whole = np.maximum(np.rint(weights * scale), weights > 0)
    return whole.astype(np.int64)


def _have_vector(
    candidates: Int64, candidate: str, dataset: DatasetConfig, vectors: Mapping[str, Tensor]
) -> npt.NDArray[np.bool_]:
    """Say of each pair whether its candidate has a vector, bool ``(P,)``; with a tower all have."""
    column = vector_column(candidate)
    if column is None:
        return np.ones(len(candidates), dtype=bool)
    present: npt.NDArray[np.bool_] = (vectors[column].abs().sum(dim=1).numpy() > 0)[candidates]
    if not present.any():
        raise DataError(f"dataset {dataset.name!r}: no positive has a vector in column {column!r}.")
    return present


def _count_draws(
    draws: _Draws, present: npt.NDArray[np.bool_], loss: LossConfig
) -> tuple[Float32, Float32]:
    """Count ``log(C(q, p) / C(q))`` and ``C(e) / N`` of each pair, ``(P,)`` each.

    Candidates without a vector are drawn like the others and then left out, so the share of one
    that has a vector is of all draws.
    """
    counted = draws.counts * present
    if loss.sketch_width:
        counts = _sketched_counts(draws, counted, loss)
    else:
        counts = _exact_counts(draws, counted)
    total = max(draws.counts.sum(), 1)
    frequency = np.maximum(counts.candidates, 1) / total
    return positive_log_q(counts.pairs, counts.queries), frequency.astype(np.float32)


class _Counts(NamedTuple):
    """How often each pair, its query and its candidate are drawn, ``(P,)`` each."""

    pairs: Int64
    queries: Int64
    candidates: Int64


def _exact_counts(draws: _Draws, counted: Int64) -> _Counts:
    queries, candidates = draws.queries, draws.candidates
    pairs = queries * (int(candidates.max()) + 1) + candidates  # distinct: both are row numbers
    return _Counts(*(_sums_by_key(keys, counted) for keys in (pairs, queries, candidates)))


def _sums_by_key(keys: Int64, counted: Int64) -> Int64:
    """Sum ``counted`` over equal keys, for each key ``(P,)``."""
    distinct, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(sums, place, counted)
    return sums[place]


def _sketched_counts(draws: _Draws, counted: Int64, loss: LossConfig) -> _Counts:
    """Count in fixed memory, as the released trainer does; collisions make counts too high."""
    queries, candidates = draws.queries.astype(np.uint64), draws.candidates.astype(np.uint64)
    found = []
    for seed, keys in enumerate((combine_keys(queries, candidates), queries, candidates)):
        sketch = CountMinSketch(loss.sketch_width, loss.sketch_depth, seed)
        sketch.add(keys, counted)
        found.append(sketch.count(keys))
    return _Counts(*found)


def positive_log_q(pair_counts: Int64, query_counts: Int64) -> Float32:
    """Return ``log(C(q, p) / C(q))`` of each pair, what the logit of its positive is lowered by.

    It is the log of how often the positive is drawn given the query, never above 0: a sketch may
    over-count a pair beyond its query. A count of 0 is read as 1.
    """
    conditional = np.log(np.maximum(pair_counts, 1) / np.maximum(query_counts, 1))
    return np.minimum(conditional, 0).astype(np.float32)
