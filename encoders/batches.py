"""Tables to training batches: pairs of several datasets by share, shared random negatives, and everything derived from seed and step alone.

Notable: texts become integers once (queries are tokenised, entities featurised, frequencies counted) and a batch is a few numpy selections;
nothing remembers the previous step, so a run resumed at any step sees the same batches to the bit, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from encoders.console import say
from encoders.count_min_sketch import CountMinSketch, combine_keys, hash_texts, mix64
from encoders.entity_features import row_vectors as column_vectors
from encoders.errors import ConfigError, DataError, SchemaError
from encoders.text import fold, normalize_query
from encoders.train_config import ENTITY, PAPER_SHARES, VECTOR_PREFIX, DatasetConfig, LossConfig, TrainConfig

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

VALIDATION_BUCKETS = 1_000_000


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        catalogue: Entities of all types (DESIGN section 4, table catalogue).
        pairs: ``query``, ``entity_type``, ``entity_id``; optional ``count`` (1), ``action``, ``language``, ``split`` (``train``).
            Rows whose split is neither ``train`` nor the validation split are not looked at. Related-query pairs have entity type
            ``query``, and ``entity_id`` is the text of the candidate query (no catalogue row needed).
    """

    catalogue: pl.DataFrame
    pairs: pl.DataFrame


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


@dataclass(frozen=True)
class DatasetBatch:
    """One step's pairs and negatives of one dataset, over all processes."""

    pairs: Int64
    """Pair numbers, ``(G,)``."""
    negatives: Int64
    """Places in the pool, ``(R,)``."""
    negative_folds: Int64
    """Cross-fit view each negative is seen in, ``(R,)``."""


@dataclass(frozen=True)
class PreparedData:
    """Everything the loop reads; made once by ``prepare``."""

    texts: list[str]
    """Distinct normalised query texts; a query number is a place here."""
    catalogue: pl.DataFrame
    """The catalogue as given."""
    visible_catalogue: pl.DataFrame
    """The catalogue without the held-back queries: what n-grams are counted in."""
    catalogue_views: list[pl.DataFrame]
    """The visible catalogue per cross-fit fold, without the queries of the fold; one view when cross-fitting is off."""
    pair_sets: list[PairSet]
    validation: dict[str, tuple[Int64, Int64]]
    """Per entity type: query numbers and catalogue rows (query numbers for type query) of the held-back pairs."""
    validation_pools: dict[str, Int64]
    pairs_per_step: list[int]
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Frozen vector columns, ``(catalogue rows, D)`` unit rows; zeros where absent."""
    notes: tuple[str, ...] = ()
    """What the start of a run says: types of pairs that no dataset trains, and optional datasets that have no pairs."""

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
        SchemaError: A column is missing.
        DataError: A query is blank, there are no train pairs, most name no entity of the catalogue, a dataset that is not optional has no
            pairs, or a frozen vector column is unusable.
        ConfigError: The batch is too small for the datasets, or a vector column has another width than the model.
    """
    _require(data.catalogue, ("id", "entity_type"), "catalogue")
    _require(data.pairs, ("query", "entity_type", "entity_id"), "pairs")
    balances = sorted({d.balance_by for d in config.datasets if d.balance_by in data.pairs.columns})
    _require_plain(data.pairs, balances, "pairs")
    pairs = _with_defaults(data.pairs, config.validation.split, balances)
    blank = pairs.with_row_index("row").filter(pl.col("query") == "")
    if blank.height:
        raise DataError(f"{blank.height} pairs have a query of only white space (first: row {blank['row'][0]}). Drop these rows.")
    pairs = _hold_back(pairs, config)
    _require_train_pairs(data.pairs, pairs, config)
    texts = pl.concat((pairs["query"], pairs.filter(pl.col("entity_type") == "query")["entity_id"])).unique(maintain_order=True)
    numbers = pl.DataFrame({"text": texts, "number": np.arange(len(texts), dtype=np.int64)})
    pairs = _number(pairs, numbers, data.catalogue, {dataset.entity_type for dataset in config.datasets})
    train = pairs.filter(pl.col("split") == "train")
    datasets, notes = _choose_datasets(train, config)
    folds = _fold_of(texts, config)
    vectors = {
        name: _frozen_vectors(data.catalogue, name, config.model.dimension)
        for name in sorted({c.removeprefix(VECTOR_PREFIX) for d in datasets for c in d.candidates if c.startswith(VECTOR_PREFIX)})
    }
    pools = {
        entity_type: np.arange(len(texts))
        if entity_type == "query"
        else np.flatnonzero((data.catalogue["entity_type"] == entity_type).to_numpy())
        for entity_type in sorted({d.entity_type for d in datasets})
    }
    pair_sets = [_pair_set(dataset, train, data.catalogue, pools[dataset.entity_type], folds, vectors, config) for dataset in datasets]
    validation = pairs.filter(pl.col("split") == "validation")
    visible = _without_held_back(data.catalogue, validation["query"].unique())
    return PreparedData(
        texts=texts.to_list(),
        catalogue=data.catalogue,
        visible_catalogue=visible,
        catalogue_views=_views(visible, config),
        pair_sets=pair_sets,
        validation=_validation_pairs(validation, config),
        validation_pools=pools,
        pairs_per_step=split_by_share([d.share for d in datasets], config.batch.pairs, processes),
        vectors=vectors,
        notes=notes,
    )


def require_entity_tower(prepared: PreparedData) -> None:
    """Refuse what trains a query tower alone: a model bundle holds both.

    Raises:
        ConfigError: No dataset has candidates that the entity tower embeds.
    """
    tasks = {pair_set.config.name: ", ".join(pair_set.config.candidates) for pair_set in prepared.pair_sets}
    if not any(ENTITY in pair_set.config.candidates for pair_set in prepared.pair_sets):
        found = "; ".join(f"{name}: {candidates}" for name, candidates in tasks.items())
        raise ConfigError(
            f"no dataset trains an entity tower, and a bundle needs one (candidates of {found}). Add a dataset of an entity type "
            'to the config, e.g. [[datasets]] name = "pin", or candidates = ["entity"] to one that is there, and such pairs to the data.'
        )


def _require_train_pairs(given: pl.DataFrame, pairs: pl.DataFrame, config: TrainConfig) -> None:
    if (pairs["split"] == "train").any():
        return
    if "split" not in given.columns or (given["split"] == "train").any():
        raise DataError(
            f"no train pairs: validation.fraction = {config.validation.fraction} holds back every query. Lower it, or add pairs."
        )
    splits = given["split"].value_counts(sort=True)
    found = ", ".join(f"{count:,} {split}" for split, count in splits.iter_rows())
    raise DataError(
        f"no train pairs: all {given.height:,} are held out (by split: {found}). Make the pairs again with a smaller --heldout-days or "
        "--gap-days, or a later --train-end, of `omni pairs`, or from more days of logs."
    )


def _require(frame: pl.DataFrame, columns: Sequence[str], table: str) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise SchemaError(f"table {table}: missing column(s) {', '.join(missing)}; it has {', '.join(frame.columns)}. Rename or add them.")
    if frame.is_empty():
        raise DataError(f"table {table} has no rows; there is nothing to train on.")


def _with_defaults(pairs: pl.DataFrame, validation_split: str, balances: Sequence[str]) -> pl.DataFrame:
    defaults = {"count": pl.lit(1), "action": pl.lit(""), "split": pl.lit("train")}
    pairs = pairs.with_columns(expr.alias(name) for name, expr in defaults.items() if name not in pairs.columns)
    collapsed = pl.col("query").fill_null("").str.replace_all(r"\s+", " ").str.strip_chars()
    return (
        pairs.select(
            "query",
            "entity_type",
            "entity_id",
            "action",
            pl.col("count").cast(pl.Float64),
            "split",
            *(pl.col(name).cast(pl.String).alias(_balance_column(name)) for name in balances),
        )
        .filter(pl.col("split").is_in(["train", validation_split]))
        .with_columns(
            collapsed,
            pl.when(pl.col("split") == validation_split).then(pl.lit("validation")).otherwise(pl.lit("train")).alias("split"),
            pl.when(pl.col("entity_type") == "query")
            .then(pl.col("entity_id").str.replace_all(r"\s+", " ").str.strip_chars())
            .otherwise(pl.col("entity_id"))
            .alias("entity_id"),
        )
    )


def _balance_column(name: str) -> str:
    """Where a pairs column to balance by is kept while the pairs are prepared: apart from the columns that are rewritten on the way."""
    return f"balance:{name}"


def text_bucket(texts: pl.Series, seed: int, buckets: int) -> Int64:
    """A stable bucket of each text's folded form, int64 ``(N,)`` in ``[0, buckets)``: texts that fold alike share one."""
    return (mix64(hash_texts(fold(normalize_query(text)) for text in texts.to_list()), seed) % np.uint64(buckets)).astype(np.int64)


def _hold_back(pairs: pl.DataFrame, config: TrainConfig) -> pl.DataFrame:
    """Move ``fraction`` of the distinct train queries to the validation split when no pair is in it.

    Both sides of a related-query pair are read by the query tower: train pairs whose related query is a validation query are left out.
    """
    if config.validation.fraction and not (pairs["split"] == "validation").any():
        queries = pairs["query"].unique(maintain_order=True)
        buckets = text_bucket(queries, config.seed + 101, VALIDATION_BUCKETS)
        held = queries.filter(pl.Series(buckets < config.validation.fraction * VALIDATION_BUCKETS))
        is_held = pl.col("query").is_in(held.implode())
        pairs = pairs.with_columns(pl.when(is_held).then(pl.lit("validation")).otherwise(pl.col("split")).alias("split"))
    validation = pairs.filter(pl.col("split") == "validation")["query"].unique()
    shown = (
        (pl.col("split") == "train") & (pl.col("entity_type") == "query") & _folded("entity_id").is_in(_fold_texts(validation).implode())
    )
    return pairs.filter(~shown)


def _folded(name: str) -> pl.Expr:
    return pl.col(name).map_batches(_fold_texts, return_dtype=pl.String)


def _fold_texts(texts: pl.Series) -> pl.Series:
    return pl.Series([fold(normalize_query(text)) for text in texts.to_list()], dtype=pl.String)


def _number(pairs: pl.DataFrame, numbers: pl.DataFrame, catalogue: pl.DataFrame, trained: Collection[str]) -> pl.DataFrame:
    """Add ``query_number`` and ``candidate`` (catalogue row or query number); leave out pairs whose entity is not in the catalogue.

    When that is more than half of the pairs of the entity types in ``trained`` (empty: of all), it is a mistake in the ids: an error.
    """
    rows = catalogue.select(pl.col("entity_type").cast(pl.String), entity_id=pl.col("id"), row=pl.int_range(pl.len(), dtype=pl.Int64))
    if rows.select("entity_type", "entity_id").is_duplicated().any():
        doubled = rows.filter(rows.select("entity_type", "entity_id").is_duplicated())["entity_id"][0]
        raise DataError(
            f"the catalogue holds {doubled!r} twice under one entity type; ids must be unique. `omni data validate` lists them."
        )
    pairs = pairs.with_columns(pl.col("entity_type").cast(pl.String)).join(
        rows, on=["entity_type", "entity_id"], how="left", maintain_order="left"
    )
    pairs = pairs.join(numbers.rename({"text": "query", "number": "query_number"}), on="query", how="left", maintain_order="left")
    pairs = pairs.join(
        numbers.rename({"text": "entity_id", "number": "candidate_number"}), on="entity_id", how="left", maintain_order="left"
    )
    is_query = pl.col("entity_type") == "query"
    pairs = pairs.with_columns(pl.when(is_query).then(pl.col("candidate_number")).otherwise(pl.col("row")).alias("candidate"))
    lost = pairs.filter(pl.col("candidate").is_null())
    if lost.height == pairs.height:
        raise DataError(
            f"none of the {pairs.height} pairs names an entity of the catalogue (first: {lost['entity_type'][0]} {lost['entity_id'][0]!r})."
        )
    _refuse_most_lost(pairs, catalogue, trained)
    if lost.height:
        say(f"{lost.height:,} of {pairs.height:,} pairs name entities that the catalogue lacks (first: {lost['entity_id'][0]!r}); left out")
    return pairs.filter(pl.col("candidate").is_not_null())


def _refuse_most_lost(pairs: pl.DataFrame, catalogue: pl.DataFrame, trained: Collection[str]) -> None:
    entities = pairs.filter(pl.col("entity_type") != "query")
    if trained:
        entities = entities.filter(pl.col("entity_type").is_in(list(trained)))
    lost = entities.filter(pl.col("candidate").is_null())
    if 2 * lost.height <= entities.height:
        return
    first = lost["entity_type"][0]
    same_type = catalogue.filter(pl.col("entity_type").cast(pl.String) == first)
    examples = (lost.filter(pl.col("entity_type") == first)["entity_id"], same_type["id"])
    wanted, there = (", ".join(map(repr, ids.unique(maintain_order=True).head(3).to_list())) or "none" for ids in examples)
    raise DataError(
        f"{lost.height:,} of {entities.height:,} entity pairs name entities that the catalogue lacks. Of type {first!r} the pairs have "
        f"{wanted}; the catalogue has {there}. Write the ids alike in both tables, or name only the types to train under [[datasets]]."
    )


def _choose_datasets(train: pl.DataFrame, config: TrainConfig) -> tuple[tuple[DatasetConfig, ...], tuple[str, ...]]:
    """The datasets to train, and what to say about those and about pairs that are left out."""
    counts = dict(train.group_by("entity_type").len().sort("entity_type").iter_rows())
    if not config.datasets:
        if not counts:
            raise DataError("no train pair is left: none names an entity of the catalogue. Write the ids alike in both tables.")
        return _default_datasets(train), ()
    datasets = tuple(d for d in config.datasets if not d.optional or not _rows_of(d, train).is_empty())
    if not datasets:
        names, types = ", ".join(d.name for d in config.datasets), ", ".join(counts) or "none"
        raise DataError(f"no dataset has train pairs: the config names {names}; the pairs have {types}. Name one of these, or add pairs.")
    notes = [f"dataset {d.name!r} has no train pairs; left out" for d in config.datasets if d not in datasets]
    unused = {name: count for name, count in counts.items() if name not in {d.entity_type for d in config.datasets}}
    if unused:
        told = ", ".join(f"{count:,} {name}" for name, count in unused.items())
        notes.append(f"not trained on: {told} pairs, which no [[datasets]] of the config takes")
    return datasets, tuple(notes)


def _rows_of(dataset: DatasetConfig, train: pl.DataFrame) -> pl.DataFrame:
    """The train pairs of a dataset; a query that is its own related query teaches nothing."""
    rows = train.filter(pl.col("entity_type") == dataset.entity_type)
    if dataset.actions:
        rows = rows.filter(pl.col("action").is_in(dataset.actions))
    if dataset.entity_type == "query":
        rows = rows.filter(pl.col("query_number") != pl.col("candidate"))
    return rows


def _default_datasets(train: pl.DataFrame) -> tuple[DatasetConfig, ...]:
    present = train["entity_type"].unique().to_list()
    return tuple(DatasetConfig(name=name) for name in sorted(present, key=lambda n: (-PAPER_SHARES.get(n, 1.0), n)))


def _fold_of(texts: pl.Series, config: TrainConfig) -> Int64:
    if not config.batch.cross_fit:
        return np.zeros(len(texts), dtype=np.int64)
    return text_bucket(texts, config.seed + 202, config.batch.cross_fit)


def _without_held_back(catalogue: pl.DataFrame, held_back: pl.Series) -> pl.DataFrame:
    """The catalogue without the engaged queries that are held back for validation."""
    if held_back.is_empty() or not _has_engaged_queries(catalogue):
        return catalogue
    long = _engaged_queries(catalogue)
    distinct = long["text"].unique(maintain_order=True)
    hidden = set(text_bucket(held_back, 0, 1 << 62).tolist())
    held = distinct.filter(pl.Series([key in hidden for key in text_bucket(distinct, 0, 1 << 62).tolist()], dtype=pl.Boolean))
    return _with_engaged_queries(catalogue, long.filter(~pl.col("text").is_in(held.implode())))


def _views(visible: pl.DataFrame, config: TrainConfig) -> list[pl.DataFrame]:
    """The catalogue as pairs of each fold see it: without the engaged queries of the fold."""
    folds = config.batch.cross_fit
    if not folds or not _has_engaged_queries(visible):
        return [visible]
    long = _engaged_queries(visible)
    distinct = long["text"].unique(maintain_order=True)
    fold = pl.DataFrame({"text": distinct, "fold": _fold_of(distinct, config)})
    long = long.join(fold, on="text", how="left", maintain_order="left")
    return [_with_engaged_queries(visible, long.filter(pl.col("fold") != f)) for f in range(folds)]


def _has_engaged_queries(catalogue: pl.DataFrame) -> bool:
    return "engaged_queries" in catalogue.columns and isinstance(catalogue["engaged_queries"].dtype, pl.List)


def _engaged_queries(catalogue: pl.DataFrame) -> pl.DataFrame:
    """One row per engaged query: ``row`` of the catalogue and ``text``."""
    rows = pl.int_range(pl.len(), dtype=pl.Int64)
    return catalogue.select(row=rows, text=pl.col("engaged_queries")).explode("text").drop_nulls("text")


def _with_engaged_queries(catalogue: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """The catalogue with these rows of ``_engaged_queries`` as its lists."""
    lists = kept.group_by("row", maintain_order=True).agg(pl.col("text").alias("engaged_queries"))
    rows = catalogue.drop("engaged_queries").with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    joined = rows.join(lists, on="row", how="left", maintain_order="left").with_columns(pl.col("engaged_queries").fill_null([]))
    return joined.select(catalogue.columns)


def balance_weights(values: pl.Series, weights: npt.NDArray[np.float64], exponent: float) -> npt.NDArray[np.float64]:
    """Weights that draw value v, whose rows weigh n(v) together, in proportion to ``n(v) ** exponent``; mean 1, float64 ``(N,)``.

    The sampling of languages in multilingual pretraining (Conneau and Lample, 2019, section 3.1), for any column; null is a value too.
    """
    totals = pl.DataFrame({"value": values, "weight": weights}).select(pl.col("weight").sum().over("value"))["weight"].to_numpy()
    drawn = totals > 0
    balanced = np.zeros(len(weights))
    balanced[drawn] = weights[drawn] * totals[drawn] ** (exponent - 1.0)
    scaled: npt.NDArray[np.float64] = balanced / balanced.mean()
    return scaled


def _require_plain(frame: pl.DataFrame, columns: Sequence[str], table: str) -> None:
    nested = [name for name in columns if frame.schema[name].is_nested()]
    if nested:
        raise SchemaError(
            f"balance_by names {nested[0]!r}, but that column of the {table} holds {frame.schema[nested[0]]}: one value a row is needed."
        )


def _balance_values(dataset: DatasetConfig, rows: pl.DataFrame, catalogue: pl.DataFrame) -> pl.Series:
    """The value each pair of a dataset is balanced by: of the pair itself, else of its entity."""
    name = dataset.balance_by
    if _balance_column(name) in rows.columns:
        return rows[_balance_column(name)]
    if name in catalogue.columns and dataset.entity_type != "query":
        _require_plain(catalogue, (name,), "catalogue")
        return catalogue[name].gather(rows["candidate"])
    where = "the pairs" if dataset.entity_type == "query" else f"the pairs or the catalogue (it has {', '.join(catalogue.columns)})"
    raise SchemaError(
        f"dataset {dataset.name!r}: balance_by names {name!r}, which is no column of {where}. Name one of them, or leave it out."
    )


def _pair_set(
    dataset: DatasetConfig,
    train: pl.DataFrame,
    catalogue: pl.DataFrame,
    pool: Int64,
    folds: Int64,
    vectors: dict[str, Tensor],
    config: TrainConfig,
) -> PairSet:
    rows = _rows_of(dataset, train)
    if rows.is_empty():
        actions = f" with action {' or '.join(dataset.actions)}" if dataset.actions else ""
        types = ", ".join(sorted(train["entity_type"].unique().to_list()))
        raise DataError(
            f"dataset {dataset.name!r} is empty: no training pair of entity type {dataset.entity_type!r}{actions}; "
            f"the pairs have {types}. Remove the dataset, say optional = true in it, or add pairs."
        )
    by_count = config.batch.weighting == "count"
    counts = rows["count"].to_numpy().astype(np.float64)
    if by_count and not (np.isfinite(counts).all() and counts.min() >= 0 and counts.sum() > 0):
        raise DataError(f"dataset {dataset.name!r}: weighting by count needs counts of 0 or more that are not all 0.")
    weights = counts if by_count else np.ones(len(counts))
    if dataset.balance_by:
        weights = balance_weights(_balance_values(dataset, rows, catalogue), weights, dataset.balance_exponent)
    queries, candidates = rows["query_number"].to_numpy(), rows["candidate"].to_numpy()
    counted = whole_counts(weights)
    tasks = []
    for candidate in dataset.candidates:
        present = np.ones(len(rows), dtype=bool)
        if candidate.startswith(VECTOR_PREFIX):
            has = vectors[candidate.removeprefix(VECTOR_PREFIX)].abs().sum(dim=1).numpy() > 0
            present = has[candidates]
            if not present.any():
                raise DataError(f"dataset {dataset.name!r}: no positive has a vector in column {candidate.removeprefix(VECTOR_PREFIX)!r}.")
        tasks.append(_task(f"{dataset.name}/{candidate}", candidate, queries, candidates, counted, present, pool, config.loss))
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

    Candidates without a vector are drawn like the others and then left out, so the share of one that has a vector is of all draws.
    """
    pair_counts, query_counts, in_batch = (CountMinSketch(loss.sketch_width, loss.sketch_depth, seed) for seed in range(3))
    query_keys, candidate_keys = queries.astype(np.uint64), candidates.astype(np.uint64)
    pair_keys = combine_keys(query_keys, candidate_keys)
    whole = counted * present
    pair_counts.add(pair_keys, whole)
    query_counts.add(query_keys, whole)
    in_batch.add(candidate_keys, whole)
    conditional = np.log(np.maximum(pair_counts.count(pair_keys), 1) / np.maximum(query_counts.count(query_keys), 1))
    return TaskData(
        name=name,
        candidate=candidate,
        pair_log_q=np.minimum(conditional, 0).astype(np.float32),
        in_batch_frequency=(np.maximum(in_batch.count(candidate_keys), 1) / max(counted.sum(), 1)).astype(np.float32),
        random_frequency=np.full(len(pool), 1 / len(pool), np.float32),
    )


def _frozen_vectors(catalogue: pl.DataFrame, name: str, dimension: int) -> Tensor:
    """A vector column as unit rows ``(N, D)``; null is a row of zeros, several vectors their mean."""
    if name not in catalogue.columns:
        raise SchemaError(f"compatibility column {name!r} is not in the catalogue; it has {', '.join(catalogue.columns)}.")
    present = catalogue[name].drop_nulls()
    first = present[0] if len(present) else []
    width = len(first[0]) if len(first) and isinstance(first[0], list | pl.Series) else len(first)
    if width != dimension:
        raise ConfigError(
            f"compatibility column {name!r} holds vectors of {width} numbers, but model.dimension is {dimension}: "
            "a query is compared with the frozen vector itself, so both must agree."
        )
    return torch.nn.functional.normalize(torch.from_numpy(column_vectors(catalogue, name, width)), dim=1)


def _validation_pairs(validation: pl.DataFrame, config: TrainConfig) -> dict[str, tuple[Int64, Int64]]:
    chosen: dict[str, tuple[Int64, Int64]] = {}
    for entity_type in sorted(validation["entity_type"].unique().to_list()):
        rows = validation.filter(pl.col("entity_type") == entity_type)
        order = np.random.default_rng((config.seed, 303)).permutation(rows.height)[: config.validation.pairs]
        chosen[entity_type] = rows["query_number"].to_numpy()[order], rows["candidate"].to_numpy()[order]
    return chosen


def split_by_share(shares: Sequence[float], pairs: int, multiple: int = 1) -> list[int]:
    """Pairs per dataset: proportional to ``shares``, each a positive multiple of ``multiple``, together at most ``pairs``.

    Raises:
        ConfigError: ``pairs`` cannot give every dataset ``multiple`` pairs.
    """
    units = pairs // multiple
    if units < len(shares):
        raise ConfigError(
            f"batch.pairs ({pairs}) is too small for {len(shares)} datasets on {multiple} process(es): needs {len(shares) * multiple}."
        )
    wanted = np.asarray(shares, dtype=np.float64) / sum(shares) * units
    given = np.maximum(np.floor(wanted).astype(int), 1)
    while given.sum() < units:
        given[int(np.argmax(wanted - given))] += 1
    while given.sum() > units:
        given[int(np.argmax(np.where(given > 1, given - wanted, -np.inf)))] -= 1
    return [int(g) * multiple for g in given]


@lru_cache(maxsize=32)
def _permutation(seed: int, dataset: int, epoch: int, size: int) -> Int64:
    return np.random.default_rng((seed, 1, dataset, epoch)).permutation(size)


class BatchPlan:
    """Which pairs and negatives each step sees: a pure function of seed and step, the same on every process.

    Args:
        prepared: From ``prepare``.
        config: The run.
        processes: Parts each batch is cut into.
    """

    def __init__(self, prepared: PreparedData, config: TrainConfig, processes: int = 1) -> None:
        self._prepared, self._config, self._processes = prepared, config, processes
        self._cumulative = [np.cumsum(s.weights, dtype=np.float64) if s.weighted else None for s in prepared.pair_sets]

    def negatives_per_step(self, dataset: int) -> int:
        """Random negatives of a dataset per step: the wanted ratio, at most the pool, a multiple of the processes."""
        pair_set, pairs = self._prepared.pair_sets[dataset], self._prepared.pairs_per_step[dataset]
        loss = self._config.loss
        ratio = loss.random_query_negatives if pair_set.is_related_queries else loss.random_negatives
        wanted = min(round(ratio * pairs), len(pair_set.pool))
        return wanted // self._processes * self._processes

    def step(self, step: int) -> list[DatasetBatch]:
        """The batch of one step, per dataset, of all processes together."""
        return [self._dataset(step, dataset) for dataset in range(len(self._prepared.pair_sets))]

    def _dataset(self, step: int, dataset: int) -> DatasetBatch:
        seed, pair_set = self._config.seed, self._prepared.pair_sets[dataset]
        rng = np.random.default_rng((seed, 2, dataset, step))
        size, wanted = len(pair_set.queries), self._prepared.pairs_per_step[dataset]
        cumulative = self._cumulative[dataset]
        if cumulative is not None:
            pairs = np.minimum(np.searchsorted(cumulative, rng.random(wanted) * cumulative[-1], side="right"), size - 1)
        else:
            places = np.arange(step * wanted, (step + 1) * wanted)
            epochs = places // size
            pairs = np.empty(wanted, dtype=np.int64)
            for epoch in np.unique(epochs).tolist():
                chosen = epochs == epoch
                pairs[chosen] = _permutation(seed, dataset, epoch, size)[places[chosen] % size]
        count = self.negatives_per_step(dataset)
        pool = len(pair_set.pool)
        negatives = np.arange(pool) if count == pool else rng.choice(pool, count, replace=False)
        folds = rng.integers(0, len(self._prepared.catalogue_views), count)
        return DatasetBatch(pairs=pairs, negatives=negatives, negative_folds=folds)


def process_slice(size: int, rank: int, processes: int) -> slice:
    """The part of ``size`` rows that process ``rank`` works on; parts are equal because sizes are multiples."""
    share = size // processes
    return slice(rank * share, (rank + 1) * share)


class TokenisedTexts:
    """Token ids of many texts, ragged and flat, so that a padded batch is two numpy selections.

    Args:
        sequences: Token ids of each text, special tokens included.
        pad_id: Id that fills the end of shorter rows.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], pad_id: int) -> None:
        self.lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        self.offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.lengths)))
        self.ids = np.fromiter((i for s in sequences for i in s), dtype=np.int64, count=int(self.offsets[-1]))
        self.pad_id = pad_id

    def padded(self, rows: Int64) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask`` of some texts, int64 ``(len(rows), longest)`` each."""
        lengths = self.lengths[rows]
        columns = np.arange(int(lengths.max()))
        inside = columns[None, :] < lengths[:, None]
        places = np.where(inside, self.offsets[rows][:, None] + columns, 0)
        return torch.from_numpy(np.where(inside, self.ids[places], self.pad_id)), torch.from_numpy(inside.astype(np.int64))

    def tokens_of(self, rows: Int64) -> Int64:
        """The token ids of some texts one after another, int64 ``(sum of their lengths,)``."""
        lengths = self.lengths[rows]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens: Int64 = self.ids[np.repeat(self.offsets[rows], lengths) + within]
        return tokens

    def by_length(self, rows: Int64, chunk: int) -> list[Int64]:
        """Cut ``rows`` into chunks of similar length (ties by place), so that little padding is computed."""
        order = np.argsort(self.lengths[rows], kind="stable")
        return [rows[order[start : start + chunk]] for start in range(0, len(rows), chunk)]
