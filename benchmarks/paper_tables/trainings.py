"""Run one training of the tables and rank held-out pairs with it.

Plain trainings, a new entity type added to a trained model, and versions of frozen vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.paper_tables.data import (
    FROZEN,
    FROZEN_WIDTH,
    Float32,
    TableData,
    use_queries,
    vector_column,
)
from benchmarks.paper_tables.settings import (
    ONE_ROW_PER_TOKEN,
    PREFIXES,
    TYPES,
    VERSION_NAMES,
    Training,
)
from encoders.commands.console import stage
from encoders.config.train_config import (
    ENTITY,
    VECTOR_PREFIX,
    BatchConfig,
    EntityTowerSettings,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
    ValidationConfig,
    to_table,
)
from encoders.datasets.dataset import Dataset, with_engaged_queries
from encoders.evaluation.baselines import unit_rows
from encoders.evaluation.ranking import (
    EvaluationTask,
    TaskSettings,
    build_task,
    rank_task,
    vector_scores,
)
from encoders.evaluation.slices import pair_slices
from encoders.towers.entity_features import TEXT_FIELDS, EntityFeatureConfig, row_vectors
from encoders.towers.entity_tower import EntityEncoder, create_entity_encoder
from encoders.towers.pretrained_models import create_query_encoder
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.batches import BatchPlan
from encoders.training.data.source_tables import TrainingData
from encoders.training.inputs import UNIFIED, Towers, build_inputs
from encoders.training.loop import TrainResult, TrainStart, train
from encoders.training.step import loss_and_gradients

QUERY_CORPUS = 10_000
"""Related queries are ranked against so many random train queries; entities against all of their
type."""
OPTIMISER = OptimiserConfig(
    learning_rate=4e-3, query_learning_rate=1e-3, token_embedding_learning_rate=1e-3
)
"""Peak rates, twice those of the recipes because the trainings are short."""
GOING_ON = 0.25
"""Peak rates of a training that goes on from another, relative to ``OPTIMISER``."""
GOING_ON_STEPS = 3
"""A training that goes on takes a third of the steps."""
HASHING: dict[str, Any] = {"token_dimension": 128, "hidden": (512,)}
GRADIENT_BATCHES = 4


@dataclass(frozen=True)
class Study:
    """The data, the sizes and the evaluation tasks all trainings share."""

    data: TableData
    sizes: Mapping[str, int]
    """``steps``, ``batch_pairs`` (of the whole mix), ``max_queries``."""
    work: Path
    _tasks: dict[str, EvaluationTask] = field(default_factory=dict)

    def task(self, entity_type: str) -> EvaluationTask:
        """The held-out pairs of a type; the same for every training."""
        if entity_type not in self._tasks:
            corpus = QUERY_CORPUS if entity_type == "query" else None
            self._tasks[entity_type] = build_task(
                self.data.dataset,
                entity_type,
                TaskSettings(corpus_size=corpus, max_queries=self.sizes["max_queries"], seed=5),
            )
        return self._tasks[entity_type]

    @cached_property
    def train_pairs(self) -> pl.DataFrame:
        """Train-split pairs, for head, torso and tail."""
        return self.data.dataset.split("train")


def run(study: Study, training: Training, seed: int) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        ``{variant: {"recall": {metric: figures}, ...}}``; a plain training has the one variant
        ``""``.
    """
    kinds: dict[str, Callable[[Study, Training, int], dict[str, Any]]] = {
        "plain": _plain,
        "reference": _reference,
        "new_type": _new_type,
        "versions": _versions,
    }
    return kinds[training.kind](study, training, seed)


# -------------------------------------------------------------------------------------------- kinds
def _plain(study: Study, training: Training, seed: int) -> dict[str, Any]:
    data = training_data(study.data.dataset, training)
    config = train_settings(training, study, seed)
    start = None
    if training.table_rows == ONE_ROW_PER_TOKEN:
        start = _one_row_per_token(data, config)
    result = train(config, data, start=start, quiet=True)
    learns_entities = ENTITY in training.towers
    towers = (
        {
            name: encoder
            for name, encoder in result.entity_encoders.items()
            if name in training.datasets
        }
        if learns_entities
        else {}
    )
    frozen = [name for name in TYPES if name in training.datasets and len(training.datasets) > 1]
    recall = evaluate(
        study,
        data.catalogue,
        result.query_encoder,
        towers,
        frozen,
        queries="query" in training.datasets,
    )
    gradients = gradient_norms(result, data, config) if training.gradients else {}
    return {"": {"recall": recall, "gradients": gradients, **_facts(result)}}


def _reference(study: Study, training: Training, seed: int) -> dict[str, Any]:
    recall = {}
    for name in TYPES:
        task = study.task(name)
        recall[f"{name}/frozen"] = _figures(
            study, task, use_queries(task.queries, study.data.projection), _frozen(task)
        )
    return {"": {"recall": recall}}


def _new_type(study: Study, training: Training, seed: int) -> dict[str, Any]:
    """Train without ads, then go on in three ways."""
    catalogue, pairs = study.data.dataset.catalogue, study.data.dataset.split("train")
    before = pl.col("entity_type") != "ad"
    result = train(
        train_settings(training, study, seed),
        TrainingData(catalogue.filter(before), pairs.filter(before)),
        quiet=True,
    )
    tower = result.entity_encoders["pin"]
    everything = dict.fromkeys(TYPES, tower)
    out = {
        "before": {
            "recall": evaluate(
                study, catalogue, result.query_encoder, everything, [], queries=True
            ),
            **_facts(result),
        }
    }
    for variant, datasets in (
        ("ads only", ("ad",)),
        ("with others", ("pin", "product", "query", "ad")),
        ("own tower", ("ad",)),
    ):
        own = variant == "own tower"
        setting = replace(
            training, datasets=datasets, entity_towers="separate" if own else "unified"
        )
        known = copy.deepcopy(result)
        start = known.start
        if own:
            own_tower = {"ad": known.entity_encoders["pin"]}
            start = TrainStart(fixed(known.query_encoder), own_tower, known.featurizer)
        config = going_on(train_settings(setting, study, seed), frozen_queries=own)
        after = train(config, TrainingData(catalogue, pairs), start=start, quiet=True)
        encoders = (
            everything | after.entity_encoders
            if own
            else dict.fromkeys(TYPES, after.entity_encoders["ad"])
        )
        out[variant] = {
            "recall": evaluate(study, catalogue, after.query_encoder, encoders, [], queries=True),
            **_facts(after),
        }
    return out


def _versions(study: Study, training: Training, seed: int) -> dict[str, Any]:
    """Train a query tower for version 1 of frozen vectors, then bring it up to versions 2 and 3.

    Each is ranked against every version.
    """
    versions = frozen_versions(study, training)
    pins = study.data.dataset.of_type("pin").with_columns(
        vector_column(name, vectors) for name, vectors in versions.items()
    )
    pairs = study.train_pairs.filter(pl.col("entity_type") == "pin")
    task, out = study.task("pin"), {}
    query_encoder: QueryEncoder | None = None
    for number, name in enumerate(VERSION_NAMES[:3]):
        setting = replace(training, towers=(VECTOR_PREFIX + name,))
        config = replace(
            train_settings(setting, study, seed),
            features=EntityFeatureConfig(text_fields=("title",)),
            batch=_batch(setting, study, 0),
        )
        config = going_on(config) if number else config
        start = TrainStart(query_encoder)
        result = train(config, TrainingData(pins, pairs), start=start, quiet=True)
        query_encoder = result.query_encoder
        queries = query_encoder.encode(task.queries)
        recall = {
            f"pin/{other}": _figures(study, task, queries, vectors)
            for other, vectors in versions.items()
        }
        cosines = {
            other: float((vectors * versions[name]).sum(axis=1).mean())
            for other, vectors in versions.items()
        }
        out[name] = {"recall": recall, "cosines": cosines, **_facts(result)}
    return out


def frozen_versions(study: Study, training: Training) -> dict[str, Float32]:
    """Vectors of all pins ``(N, 256)`` by version, made once per work folder.

    Version 1: an entity tower trained on half of the pairs; 2 and 3: gone on with, each on another
    quarter, as an embedding is refreshed with new logs; cold retrain: towers trained anew on all
    pairs.
    """
    path = study.work / f"versions-{study.sizes['steps']}-{study.sizes['batch_pairs']}.npz"
    if not path.is_file():
        pins = study.data.dataset.of_type("pin")
        pairs = study.train_pairs.filter(pl.col("entity_type") == "pin").sample(
            fraction=1.0, shuffle=True, seed=3
        )
        half, quarter = pairs.height // 2, pairs.height // 4
        parts = [pairs[:half], pairs[half : half + quarter], pairs[half + quarter :], pairs]
        result: TrainResult | None = None
        vectors = {}
        for number, (name, part) in enumerate(zip(VERSION_NAMES, parts, strict=True)):
            config = train_settings(training, study, 1000 + number)
            goes_on = number in (1, 2)
            with stage(f"frozen vectors, {name}"):
                config = going_on(config) if goes_on else config
                result = train(
                    config,
                    TrainingData(pins, part),
                    start=result.start if result and goes_on else None,
                    quiet=True,
                )
            vectors[name] = result.entity_encoders["pin"].encode(pins)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, allow_pickle=False, **vectors)
        partial.replace(path)
    with np.load(path) as arrays:
        return {name: arrays[name] for name in VERSION_NAMES}


# -------------------------------------------------------------------------------------------- parts
def training_data(dataset: Dataset, training: Training) -> TrainingData:
    """Return catalogue and train pairs; few product pairs mean few engaged queries of products."""
    pairs = dataset.split("train")
    if not training.product_pairs:
        return TrainingData(dataset.catalogue, pairs)
    is_product = pl.col("entity_type") == "product"
    kept = pairs.filter(is_product).sample(training.product_pairs, seed=7)
    pairs = pl.concat((pairs.filter(~is_product), kept))
    rows = pl.int_range(pl.len())
    others = dataset.catalogue.with_columns(row=rows).filter(~is_product)
    few = with_engaged_queries(
        dataset.catalogue.with_columns(row=rows).filter(is_product), kept
    ).select(others.columns)
    return TrainingData(pl.concat((others, few)).sort("row").drop("row"), pairs)


def train_settings(training: Training, study: Study, seed: int) -> TrainConfig:
    """The run of a training at the study's sizes."""
    sizes = study.sizes
    return TrainConfig(
        steps=sizes["steps"],
        seed=seed,
        device="cpu",
        model=ModelConfig(dimension=FROZEN_WIDTH, entity_towers=training.entity_towers),
        features=EntityFeatureConfig(text_fields=TEXT_FIELDS, continuous=study.data.continuous),
        entity_tower=EntityTowerSettings(table_rows=training.table_rows or 1, **HASHING),
        datasets=training.dataset_configs(),
        loss=LossConfig(
            random_negatives=1.0,
            random_query_negatives=0.0,
            log_q=training.log_q,
            matryoshka=training.weights(),
        ),
        batch=BatchConfig(
            pairs=training.batch_pairs(sizes["batch_pairs"]), cross_fit=4, query_chunk=128
        ),
        optimiser=replace(OPTIMISER, warmup_steps=sizes["steps"] // 6),
        validation=ValidationConfig(fraction=0.0),
    )


def _batch(training: Training, study: Study, cross_fit: int) -> BatchConfig:
    return BatchConfig(
        pairs=training.batch_pairs(study.sizes["batch_pairs"]), cross_fit=cross_fit, query_chunk=128
    )


def going_on(config: TrainConfig, *, frozen_queries: bool = False) -> TrainConfig:
    """The same run, shorter and gentler, for a model that is trained already."""
    steps = max(1, config.steps // GOING_ON_STEPS)
    optimiser = replace(
        config.optimiser,
        learning_rate=GOING_ON * OPTIMISER.learning_rate,
        query_learning_rate=0.0 if frozen_queries else GOING_ON * OPTIMISER.query_learning_rate,
        token_embedding_learning_rate=(
            0.0 if frozen_queries else GOING_ON * OPTIMISER.token_embedding_learning_rate
        ),
        warmup_steps=steps // 6,
    )
    return replace(config, steps=steps, optimiser=optimiser)


class _FixedLinear(torch.nn.Module):
    """A linear layer without parameters to learn."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", layer.weight.detach().clone())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.nn.functional.linear(inputs, self.weight, self.bias)  # type: ignore[arg-type]


def fixed(encoder: QueryEncoder) -> QueryEncoder:
    """Give the tower a projection that nothing trains (in place); the rest has learning rate 0."""
    encoder.projection = _FixedLinear(encoder.projection)  # type: ignore[assignment]
    return encoder


def _one_row_per_token(data: TrainingData, config: TrainConfig) -> TrainStart:
    """Make towers where each token id reads one row twice: ``(w[i, 0] + w[i, 1]) * E[i]``."""
    query_encoder = create_query_encoder(config.model.query_encoder, config.model.dimension)
    featurizer = build_inputs(data, config, query_encoder, torch.device("cpu")).featurizer
    size = len(featurizer.vocabulary)
    torch.manual_seed(config.seed)
    shape = {
        **to_table(config.entity_tower),
        "dimension": config.model.dimension,
        "table_rows": size,
    }
    encoder = create_entity_encoder(featurizer, **shape)
    encoder.rows.copy_(torch.arange(size, dtype=encoder.rows.dtype)[:, None].expand(size, 2))
    return TrainStart(query_encoder, {UNIFIED: encoder}, featurizer)


def gradient_norms(
    result: TrainResult, data: TrainingData, config: TrainConfig
) -> dict[str, dict[str, float]]:
    """Return the mean norm of every dataset's gradient on the shared towers.

    The batches are unseen by the training, the temperature is the initial one.

    Returns:
        ``{dataset: {"query tower": norm, "entity tower": norm}}``.
    """
    inputs = build_inputs(
        data, config, result.query_encoder, torch.device("cpu"), featurizer=result.featurizer
    )
    plan = BatchPlan(inputs.prepared, config)
    encoders = {UNIFIED: next(iter(result.entity_encoders.values()))}
    towers = Towers(result.query_encoder, encoders, 1, config.loss.temperature).train()
    norms: dict[str, dict[str, list[float]]] = {}
    for step in range(config.steps, config.steps + GRADIENT_BATCHES):
        for pair_set, part in zip(inputs.prepared.pair_sets, plan.step(step), strict=True):
            towers.zero_grad(set_to_none=True)
            alone = replace(inputs, prepared=replace(inputs.prepared, pair_sets=[pair_set]))
            loss_and_gradients(towers, alone, [part])
            for name, module in (("query tower", towers.query), ("entity tower", towers.entities)):
                squares = sum(
                    float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None
                )
                norms.setdefault(pair_set.config.name, {}).setdefault(name, []).append(squares**0.5)
    towers.zero_grad(set_to_none=True)
    towers.eval()
    return {
        name: {tower: float(np.mean(values)) for tower, values in by_tower.items()}
        for name, by_tower in norms.items()
    }


def evaluate(
    study: Study,
    catalogue: pl.DataFrame,
    query_encoder: QueryEncoder,
    encoders: Mapping[str, EntityEncoder],
    frozen: list[str],
    *,
    queries: bool,
) -> dict[str, dict[str, Any]]:
    """Labelled Recall@10 of held-out pairs.

    Args:
        study: Tasks.
        catalogue: What the entity towers read.
        query_encoder: The query tower.
        encoders: Entity tower by type, each ranked as ``TYPE/entity``.
        frozen: Types also ranked as ``TYPE/frozen``: by the frozen vectors instead of the tower's.
        queries: Also rank related queries, as ``query/query``.
    """
    recall: dict[str, dict[str, Any]] = {}
    for name in TYPES:
        if name not in encoders and name not in frozen:
            continue
        task = study.task(name)
        query_vectors = query_encoder.encode(task.queries)
        if name in frozen:
            recall[f"{name}/frozen"] = _figures(study, task, query_vectors, _frozen(task))
        if name in encoders:
            rows = catalogue.filter(pl.col("entity_type") == name)
            recall[f"{name}/entity"] = _figures(
                study, task, query_vectors, encoders[name].encode(rows), prefixes=True
            )
    if queries:
        task = study.task("query")
        recall["query/query"] = _figures(
            study,
            task,
            query_encoder.encode(task.queries),
            query_encoder.encode(task.candidates["id"].to_list()),
        )
    return recall


def _figures(
    study: Study,
    task: EvaluationTask,
    queries: Float32,
    entities: Float32,
    *,
    prefixes: bool = False,
) -> dict[str, Any]:
    def hits(width: int) -> np.ndarray:
        score = vector_scores(unit_rows(queries[:, :width]), unit_rows(entities[:, :width]))
        found: np.ndarray = rank_task(task, score, "").ranks <= 10
        return found

    hit = hits(FROZEN_WIDTH)
    frame = task.pairs.select("language").with_columns(pl.Series("hit", hit))
    figures: dict[str, Any] = {
        "recall": float(hit.mean()),
        "pairs": len(hit),
        "languages": _means(frame, "language"),
    }
    if task.entity_type != "query":
        labels = pair_slices(task, study.train_pairs)["popularity"]
        figures["popularity"] = _means(frame.with_columns(labels.alias("popularity")), "popularity")
    if prefixes:
        figures["prefixes"] = {str(width): float(hits(width).mean()) for width in PREFIXES}
    return figures


def _means(frame: pl.DataFrame, by: str) -> dict[str, float]:
    means = (
        frame.group_by(by)
        .agg(pl.col("hit").mean(), pl.len())
        .sort("len", by, descending=[True, False])
    )
    return {str(label): float(mean) for label, mean, _ in means.iter_rows()}


def _frozen(task: EvaluationTask) -> Float32:
    return unit_rows(row_vectors(task.candidates, FROZEN, FROZEN_WIDTH))


def _facts(result: TrainResult) -> dict[str, float]:
    return {
        "last_loss": result.metrics["loss"],
        "pairs_per_cpu_second": result.pairs_per_cpu_second,
        "steps": result.steps,
    }
