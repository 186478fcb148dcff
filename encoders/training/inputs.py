"""What a training reads and builds before its first step: tables, features, towers, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    """All that is learned: the query tower, entity towers by key and one log scale per task."""

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


@dataclass(frozen=True)
class TrainInputs:
    """Everything the towers read, as tensors."""

    prepared: PreparedData
    tokens: TokenisedTexts
    features: EntityBatch
    """All catalogue views below each other: view v of row r is at ``v * rows + r``."""
    vectors: dict[str, Tensor]
    device: torch.device
    config: TrainConfig

    @property
    def task_count(self) -> int:
        """Tasks of all datasets."""
        return sum(len(pair_set.tasks) for pair_set in self.prepared.pair_sets)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order of their log scales."""
        return [task.name for pair_set in self.prepared.pair_sets for task in pair_set.tasks]

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast when the config asks for it and the device computes in it."""
        if self.config.precision == "bf16" and computes_bf16(self.device.type):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def tower_of(self, entity_type: str) -> str:
        """Key of the entity tower for a type."""
        return UNIFIED if self.config.model.entity_towers == UNIFIED else entity_type


_MAY_CHANGE = ("log_every", "checkpoint_every", "tensorboard", "max_seconds")
"""Config keys a resumed run may change without becoming another run."""


_AT_THE_END = ("residual_weights", "query_interpolation")
"""Keys of ``validation`` that act after the last step: a finished run may be ended again with others."""


def build_inputs(
    data: TrainingData,
    config: TrainConfig,
    query_encoder: QueryEncoder,
    device: torch.device,
    processes: int = 1,
    featurizer: EntityFeaturizer | None = None,
) -> tuple[TrainInputs, EntityFeaturizer]:
    """Tables to integers and tensors, and the featuriser fitted on the catalogue (or the one given).

    Raises:
        SchemaError, DataError, ConfigError: The tables or the config cannot be trained on.
    """
    if query_encoder.dimension != config.model.dimension:
        raise ConfigError(
            f"the query tower gives {query_encoder.dimension} numbers, but model.dimension is"
            f" {config.model.dimension}."
        )
    prepared = prepare(data, config, processes)
    featurizer = featurizer or EntityFeaturizer.fit(prepared.visible_catalogue, config.features)
    features = concatenate([featurizer(view) for view in prepared.catalogue_views]).to(device)
    tokens = TokenisedTexts(
        query_encoder.tokenize(prepared.texts), int(query_encoder.tokenizer.pad_token_id or 0)
    )
    vectors = {name: value.to(device) for name, value in prepared.vectors.items()}
    return TrainInputs(prepared, tokens, features, vectors, device, config), featurizer


def build_towers(
    query_encoder: QueryEncoder,
    featurizer: EntityFeaturizer,
    inputs: TrainInputs,
    known: Mapping[str, EntityEncoder] | None = None,
) -> Towers:
    """All that is learned, on the inputs' device; ``known`` entity towers (by entity type) go on, the others are new."""
    config, known = inputs.config, known or {}
    types = sorted(
        {s.config.entity_type for s in inputs.prepared.pair_sets if ENTITY in s.config.candidates}
    )
    shape = {**to_table(config.entity_tower), "dimension": config.model.dimension}
    entity_encoders: dict[str, EntityEncoder] = {}
    for key in dict.fromkeys(inputs.tower_of(name) for name in types):
        old = next(iter(known.values()), None) if key == UNIFIED else known.get(key)
        entity_encoders[key] = old or create_entity_encoder(featurizer, **shape)
    return Towers(query_encoder, entity_encoders, inputs.task_count, config.loss.temperature).to(
        inputs.device
    )


def run_fingerprint(inputs: TrainInputs) -> str:
    """SHA-256 of what decides a run's course: the config (but for logging and saving), the pairs, and all that the towers read.

    Vectors that a frozen tower makes of texts are not hashed, their texts are: the last bits of the
    former depend on the number of threads.
    """
    prepared, features, read = inputs.prepared, inputs.features, inputs.config.features
    table = {key: value for key, value in to_table(inputs.config).items() if key not in _MAY_CHANGE}
    table["datasets"] = [
        {key: value for key, value in d.items() if key != "optional"} for d in table["datasets"]
    ]  # their pairs are hashed
    table["validation"] = {
        key: value for key, value in table["validation"].items() if key not in _AT_THE_END
    }
    # Under the names that checkpoints of version 0.1 were made with, so that those runs resume.
    former = {name: old for old, name in EntityFeatureConfig.FORMER_NAMES.items()}
    table["features"] = {former.get(key, key): value for key, value in table["features"].items()}
    digest = hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode())
    for pair_set in prepared.pair_sets:
        for array in (
            pair_set.queries,
            pair_set.candidates,
            pair_set.weights,
            pair_set.folds,
            pair_set.pool,
        ):
            digest.update(array.tobytes())
    for name, (queries, candidates) in sorted(prepared.validation.items()):
        digest.update(name.encode() + queries.tobytes() + candidates.tobytes())
    texts = [
        prepared.texts,
        prepared.catalogue["id"].to_list(),
        prepared.catalogue["entity_type"].cast(pl.String).to_list(),
    ]
    for view in prepared.catalogue_views:
        texts += [
            [name, *row_texts(view[name])]
            for name in sorted(read.text_columns)
            if name in view.columns
        ]
    for part in texts:
        digest.update("\x1e".join(part).encode("utf-8", "surrogatepass"))
    continuous = features.continuous
    given = (
        None
        if continuous is None
        else continuous[:, : continuous.shape[1] - read.text_embedding_width]
    )
    for tensor in (features.token_ids, features.offsets, given, *inputs.vectors.values()):
        if tensor is not None:
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
