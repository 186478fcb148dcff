"""Build what training reads and learns before its first step: features, towers, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from encoders.config.train_config import ENTITY, TrainConfig, to_table
from encoders.errors import ConfigError
from encoders.towers.entity_features import (
    EntityBatch,
    EntityFeatureConfig,
    EntityFeaturizer,
    concatenate,
    row_texts,
)
from encoders.towers.entity_tower import EntityEncoder, create_entity_encoder
from encoders.towers.query_tower import QueryEncoder
from encoders.training.data.prepare import PreparedData, prepare
from encoders.training.data.source_tables import TrainingData
from encoders.training.data.tokenised_texts import TokenisedTexts
from encoders.training.device import computes_bf16
from encoders.training.losses import initial_log_scale

UNIFIED = "unified"
"""Key of the one entity tower that serves all entity types."""


class Towers(nn.Module):
    """All that is learned: the query tower, entity towers by key, and one log scale per task.

    Attribute names are the keys of checkpoints.
    """

    def __init__(
        self,
        query_encoder: QueryEncoder,
        entity_encoders: Mapping[str, EntityEncoder],
        tasks: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.query = query_encoder
        self.entities = nn.ModuleDict(dict(entity_encoders))
        self.log_scales = nn.Parameter(torch.full((tasks,), initial_log_scale(temperature)))

    def by_type(self, entity_types: Iterable[str]) -> dict[str, EntityEncoder]:
        """Return the tower of each entity type: of those given when one tower serves all."""
        towers: dict[str, EntityEncoder] = dict(self.entities.items())  # type: ignore[arg-type]
        if UNIFIED in towers:
            return {name: towers[UNIFIED] for name in sorted(entity_types)}
        return towers


@dataclass(frozen=True)
class TrainInputs:
    """Everything the towers read, as tensors."""

    prepared: PreparedData
    featurizer: EntityFeaturizer
    tokens: TokenisedTexts
    """Of ``prepared.texts``."""
    features: EntityBatch
    """All catalogue views below each other: view v of row r is at ``v * rows + r``."""
    vectors: dict[str, Tensor]
    """``prepared.vectors`` on the device."""
    device: torch.device
    config: TrainConfig

    @property
    def task_count(self) -> int:
        """Tasks of all datasets."""
        return sum(len(pair_set.tasks) for pair_set in self.prepared.pair_sets)

    def autocast(self) -> AbstractContextManager[object]:
        """Return bf16 autocast when the config asks for it and the device computes in it."""
        if self.config.precision == "bf16" and computes_bf16(self.device.type):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def tower_of(self, entity_type: str) -> str:
        """Return the key of the entity tower for a type."""
        return UNIFIED if self.config.model.entity_towers == UNIFIED else entity_type


def build_inputs(
    data: TrainingData,
    config: TrainConfig,
    query_encoder: QueryEncoder,
    device: torch.device,
    processes: int = 1,
    featurizer: EntityFeaturizer | None = None,
) -> TrainInputs:
    """Turn tables into tensors.

    Args:
        data: Catalogue and pairs.
        config: The run.
        query_encoder: Its tokenizer reads the queries.
        device: Where the tensors go.
        processes: Batches are cut into this many equal parts.
        featurizer: What makes the features of entities; None: fitted on the catalogue.

    Raises:
        SchemaError, DataError, ConfigError: The tables or the config cannot be trained on.
    """
    if query_encoder.dimension != config.model.dimension:
        raise ConfigError(
            f"the query tower gives {query_encoder.dimension} numbers, but model.dimension is"
            f" {config.model.dimension}."
        )
    prepared = prepare(data, config, processes)
    if featurizer is None:
        featurizer = EntityFeaturizer.fit(prepared.visible_catalogue, config.features)
    features = concatenate([featurizer(view) for view in prepared.catalogue_views]).to(device)
    return TrainInputs(
        prepared=prepared,
        featurizer=featurizer,
        tokens=TokenisedTexts(query_encoder.tokenize(prepared.texts), query_encoder.pad_id),
        features=features,
        vectors={name: value.to(device) for name, value in prepared.vectors.items()},
        device=device,
        config=config,
    )


def build_towers(
    query_encoder: QueryEncoder,
    inputs: TrainInputs,
    known: Mapping[str, EntityEncoder] | None = None,
) -> Towers:
    """Put together all that is learned, on the inputs' device.

    Args:
        query_encoder: The query tower.
        inputs: What the towers will read.
        known: Entity towers to go on with, by entity type; the others are new.
    """
    config, known = inputs.config, known or {}
    types = sorted(
        {s.config.entity_type for s in inputs.prepared.pair_sets if ENTITY in s.config.candidates}
    )
    shape = {**to_table(config.entity_tower), "dimension": config.model.dimension}
    entity_encoders: dict[str, EntityEncoder] = {}
    for key in dict.fromkeys(inputs.tower_of(name) for name in types):
        old = next(iter(known.values()), None) if key == UNIFIED else known.get(key)
        entity_encoders[key] = old or create_entity_encoder(inputs.featurizer, **shape)
    towers = Towers(query_encoder, entity_encoders, inputs.task_count, config.loss.temperature)
    return towers.to(inputs.device)


_MAY_CHANGE = ("log_every", "checkpoint_every", "tensorboard", "max_seconds")
"""Config keys a resumed run may change without becoming another run."""

_AT_THE_END = ("residual_weights", "query_interpolation")
"""Keys of ``validation`` that act after the last step: a finished run may be ended with others."""


def run_fingerprint(inputs: TrainInputs) -> str:
    """Hash what decides a run's course: config, pairs and all that the towers read (SHA-256).

    Logging and saving do not count. Vectors that a frozen tower makes of texts are not hashed,
    their texts are: the last bits of the former depend on the number of threads.
    """
    prepared = inputs.prepared
    table = json.dumps(_hashed_config(inputs.config), sort_keys=True, default=str)
    digest = hashlib.sha256(table.encode())
    for pair_set in prepared.pair_sets:
        digest.update(pair_set.queries.tobytes())
        digest.update(pair_set.candidates.tobytes())
        digest.update(pair_set.weights.tobytes())
        digest.update(pair_set.folds.tobytes())
        digest.update(pair_set.pool.tobytes())
    for name, held_back in sorted(prepared.validation.items()):
        digest.update(name.encode())
        digest.update(held_back.queries.tobytes() + held_back.candidates.tobytes())
    for texts in _texts_read(inputs):
        digest.update("\x1e".join(texts).encode("utf-8", "surrogatepass"))
    for tensor in _tensors_read(inputs):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def initial_towers_fingerprint(
    query_encoder: QueryEncoder, entity_encoders: Mapping[str, EntityEncoder] | None
) -> str:
    """Hash the towers that a run begins with: weights, tokenizer, longest text (SHA-256)."""
    query_encoder.reset_tokenizer()
    digest = hashlib.sha256(query_encoder.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(query_encoder.max_tokens).encode())
    for name, tower in [("query", query_encoder), *sorted((entity_encoders or {}).items())]:
        digest.update(name.encode())
        for key, value in sorted(tower.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hashed_config(config: TrainConfig) -> dict[str, Any]:
    table = {key: value for key, value in to_table(config).items() if key not in _MAY_CHANGE}
    # Which optional datasets are left out shows in the pairs.
    table["datasets"] = [_without(dataset, ("optional",)) for dataset in table["datasets"]]
    # Version 0.1 had no dropout; the n-gram table is made after the last step.
    model = _without(table["model"], ("query_ngrams",))
    table["model"] = model if model["query_dropout"] else _without(model, ("query_dropout",))
    table["validation"] = _without(table["validation"], _AT_THE_END)
    # Under the names that checkpoints of version 0.1 were made with, so that those runs resume.
    former = {name: old for old, name in EntityFeatureConfig.FORMER_NAMES.items()}
    features = _without(table["features"], ("engaged_queries",))  # shows in the texts
    table["features"] = {former.get(key, key): value for key, value in features.items()}
    return table


def _without(table: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _texts_read(inputs: TrainInputs) -> Iterator[list[str]]:
    catalogue = inputs.prepared.catalogue
    yield inputs.prepared.texts
    yield catalogue["id"].to_list()
    yield catalogue["entity_type"].cast(pl.String).to_list()
    columns = sorted(inputs.config.features.text_columns)
    for catalogue_view in inputs.prepared.catalogue_views:
        view = inputs.config.features.columns_read(catalogue_view)
        for name in columns:
            if name in view.columns:
                yield [name, *row_texts(view[name])]


def _tensors_read(inputs: TrainInputs) -> Iterator[Tensor]:
    features = inputs.features
    yield features.token_ids
    yield features.offsets
    if features.continuous is not None:
        embedded = inputs.config.features.text_embedding_width
        yield features.continuous[:, : features.continuous.shape[1] - embedded]
    yield from inputs.vectors.values()
