"""Turn tables into what the training loop reads: texts, catalogue views, pairs, frozen vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from encoders.config.train_config import ENTITY, DatasetConfig, TrainConfig
from encoders.errors import ConfigError
from encoders.towers.entity_features import vector_column_of
from encoders.training.data.cross_fitting import catalogue_views, fold_of, without_held_back
from encoders.training.data.pairs import number_pairs, query_texts, usable_pairs
from encoders.training.data.sampling import (
    PairSet,
    SharedTables,
    choose_datasets,
    make_pair_set,
    vector_column,
)
from encoders.training.data.source_tables import TrainingData

Int64 = npt.NDArray[np.int64]


class HeldBackPairs(NamedTuple):
    """The validation pairs of an entity type."""

    queries: Int64
    """Query numbers, ``(P,)``."""
    candidates: Int64
    """Catalogue rows, or query numbers for type query, ``(P,)``."""


@dataclass(frozen=True)
class PreparedData:
    """The tables of a run as integers and vectors, made once by ``prepare``."""

    texts: list[str]
    """Distinct normalised query texts; a query number is a place here."""
    catalogue: pl.DataFrame
    """The catalogue as given."""
    visible_catalogue: pl.DataFrame
    """The catalogue without the held-back queries: what n-grams are counted in."""
    catalogue_views: list[pl.DataFrame]
    """The visible catalogue per cross-fit fold, without the queries of the fold."""
    pair_sets: list[PairSet]
    validation: dict[str, HeldBackPairs]
    """By entity type."""
    pools: dict[str, Int64]
    """Candidates of each entity type: catalogue rows, or all query numbers for type query."""
    pairs_per_step: list[int]
    """Pairs of each dataset in a step, over all processes."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Frozen vector columns, ``(catalogue rows, D)`` unit rows; zeros where absent."""
    notes: tuple[str, ...] = ()
    """For the start of a run: pairs that no dataset trains, optional datasets without pairs."""

    @property
    def pairs_total(self) -> int:
        """Training pairs of all datasets."""
        return sum(len(pair_set.queries) for pair_set in self.pair_sets)


def prepare(data: TrainingData, config: TrainConfig, processes: int = 1) -> PreparedData:
    """Check the tables and turn them into integers.

    Args:
        data: Catalogue and pairs.
        config: The run.
        processes: Batches are cut into this many equal parts.

    Raises:
        SchemaError: A column is missing, or engaged queries that must be hidden are no lists.
        DataError: A query is blank, there are no train pairs, most name no entity of the catalogue,
            a dataset that is not optional has no pairs, or a frozen vector column is unusable.
        ConfigError: The batch is too small for the datasets, or a vector column has another width
            than the model.
    """
    pairs = usable_pairs(data, config)
    texts = query_texts(pairs)
    pairs = number_pairs(
        pairs, texts, data.catalogue, {dataset.entity_type for dataset in config.datasets}
    )
    train = pairs.filter(pl.col("split") == "train")
    datasets, notes = choose_datasets(train, config)
    tables = SharedTables(
        train=train,
        catalogue=data.catalogue,
        pools=_pools(datasets, data.catalogue, len(texts)),
        folds=fold_of(texts, config),
        vectors={
            column: _frozen_vectors(data.catalogue, column, config.model.dimension)
            for column in _vector_columns(datasets)
        },
    )
    validation = pairs.filter(pl.col("split") == "validation")
    visible = without_held_back(data.catalogue, validation["query"].unique())
    return PreparedData(
        texts=texts.to_list(),
        catalogue=data.catalogue,
        visible_catalogue=visible,
        catalogue_views=catalogue_views(visible, config),
        pair_sets=[make_pair_set(dataset, tables, config) for dataset in datasets],
        validation=_validation_pairs(validation, config),
        pools=dict(tables.pools),
        pairs_per_step=split_by_share([d.share for d in datasets], config.batch.pairs, processes),
        vectors=dict(tables.vectors),
        notes=notes,
    )


def _pools(
    datasets: Sequence[DatasetConfig], catalogue: pl.DataFrame, queries: int
) -> dict[str, Int64]:
    pools: dict[str, Int64] = {}
    for entity_type in sorted({dataset.entity_type for dataset in datasets}):
        if entity_type == "query":
            pools[entity_type] = np.arange(queries)
        else:
            is_of_type = (catalogue["entity_type"] == entity_type).to_numpy()
            pools[entity_type] = np.flatnonzero(is_of_type)
    return pools


def _vector_columns(datasets: Sequence[DatasetConfig]) -> list[str]:
    columns = {vector_column(c) for dataset in datasets for c in dataset.candidates}
    return sorted(column for column in columns if column is not None)


def split_by_share(shares: Sequence[float], pairs: int, multiple: int = 1) -> list[int]:
    """Split ``pairs`` in proportion to ``shares`` into positive multiples of ``multiple``.

    Raises:
        ConfigError: ``pairs`` cannot give every dataset ``multiple`` pairs.
    """
    units = pairs // multiple
    if units < len(shares):
        raise ConfigError(
            f"batch.pairs ({pairs}) is too small for {len(shares)} datasets on {multiple}"
            f" process(es): needs {len(shares) * multiple}."
        )
    wanted = np.asarray(shares, dtype=np.float64) / sum(shares) * units
    given = np.maximum(np.floor(wanted).astype(int), 1)
    while given.sum() < units:
        given[int(np.argmax(wanted - given))] += 1
    while given.sum() > units:
        given[int(np.argmax(np.where(given > 1, given - wanted, -np.inf)))] -= 1
    return [int(g) * multiple for g in given]


def _frozen_vectors(catalogue: pl.DataFrame, name: str, dimension: int) -> Tensor:
    """Read a vector column as unit rows ``(N, W)``: zeros for null, the mean of several vectors.

    Raises:
        SchemaError: There is no such column.
        ConfigError: Its vectors are wider than those of the query tower, or there are none.
    """
    vectors = vector_column_of(catalogue, name)
    width = vectors.shape[1]
    if not 0 < width <= dimension:
        raise ConfigError(
            f"compatibility column {name!r} holds vectors of {width} numbers, but model.dimension"
            f" is {dimension}: a query's first numbers are compared with the frozen vector itself,"
            " so it may not be wider."
        )
    return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)


def _validation_pairs(validation: pl.DataFrame, config: TrainConfig) -> dict[str, HeldBackPairs]:
    chosen: dict[str, HeldBackPairs] = {}
    for entity_type in sorted(validation["entity_type"].unique().to_list()):
        rows = validation.filter(pl.col("entity_type") == entity_type)
        order = np.random.default_rng((config.seed, 303)).permutation(rows.height)
        order = order[: config.validation.pairs]
        queries, candidates = rows["query_number"].to_numpy(), rows["candidate"].to_numpy()
        chosen[entity_type] = HeldBackPairs(queries[order], candidates[order])
    return chosen


def require_entity_tower(prepared: PreparedData) -> None:
    """Refuse a run that trains a query tower alone: a model bundle holds both towers.

    Raises:
        ConfigError: No dataset has candidates that the entity tower embeds.
    """
    datasets = [pair_set.config for pair_set in prepared.pair_sets]
    if any(ENTITY in dataset.candidates for dataset in datasets):
        return
    found = "; ".join(f"{dataset.name}: {', '.join(dataset.candidates)}" for dataset in datasets)
    raise ConfigError(
        f"no dataset trains an entity tower, and a bundle needs one (candidates of {found})."
        ' Add a dataset of an entity type to the config, e.g. [[datasets]] name = "pin", or'
        ' candidates = ["entity"] to one that is there, and such pairs to the data.'
    )
