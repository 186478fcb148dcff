"""The settings of a training run, as frozen dataclasses read from TOML.

They are checked on creation and saved in the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from encoders.config.toml_config import build_config, nearest, read_toml, to_table
from encoders.errors import ConfigError
from encoders.towers.entity_features import EntityFeatureConfig

DEFAULT_DEPTH = 2
"""Rows of a count-min sketch."""
DEFAULT_WIDTH = 1 << 20
"""Counters per row.

The released trainer uses 2 x 2^26; 2 x 2^20 (16 MiB) over-counts by less than 0.1% of a million
items.
"""

INITIAL_TEMPERATURE = 0.07
MATRYOSHKA_WEIGHTS: dict[int, float] = {16: 0.05, 32: 0.05, 64: 0.05, 128: 0.05}
"""Weight of the loss on each prefix of the vectors; the full vector always has weight 1."""

ENTITY = "entity"
QUERY = "query"
VECTOR_PREFIX = "vector:"
PAPER_SHARES = {"pin": 8.0, "product": 4.0, "query": 2.0, "product-offsite": 2.0, "ad": 2.0}
"""Shares of a batch by dataset; the paper gives none for ads."""


def _check(*rules: tuple[bool, str]) -> None:
    """Raise one ConfigError with the message of every rule that does not hold."""
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ConfigError("\n".join(broken))


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One source of pairs and the candidate towers it trains.

    Each (dataset, candidate) is a task with a loss of its own.
    """

    name: str
    """Name of the dataset, e.g. ``pin``; names its tasks in logs."""
    entity_type: str = ""
    """Pairs of this entity type; empty: the same as ``name``.

    ``query`` means related queries: ``entity_id`` is the candidate's text.
    """
    actions: tuple[str, ...] = ()
    """Keep pairs with one of these actions; empty: all.

    product-offsite, for one, has add_to_cart and checkout.
    """
    share: float = 0.0
    """Part of each batch, relative to the other datasets; 0: the paper's for this name, or 1."""
    balance_by: str = ""
    """A column of the pairs or the catalogue, e.g. ``language``; empty: every pair once per epoch.

    Pairs are drawn so that rare values of it come more often than they occur.
    """
    balance_exponent: float = 0.5
    """A value of ``balance_by`` with n pairs is drawn in proportion to n to this power.

    1: as often as it occurs; 0: all values equally often.
    """
    candidates: tuple[str, ...] = ()
    """Towers on the candidate side; empty: ``query`` for related queries, else ``entity``.

    ``entity``, ``query`` or ``vector:COLUMN`` (compatibility with a frozen embedding).
    """
    optional: bool = False
    """Leave the dataset out, with a note, when there is no train pair of it.

    Otherwise that stops the run.
    """

    def __post_init__(self) -> None:
        entity_type = self.entity_type or self.name
        candidates = self.candidates or ((QUERY,) if entity_type == "query" else (ENTITY,))
        share = self.share or PAPER_SHARES.get(self.name, 1.0)
        object.__setattr__(self, "entity_type", entity_type)
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "share", share)
        unknown = [
            c for c in candidates if c not in (ENTITY, QUERY) and not c.startswith(VECTOR_PREFIX)
        ]
        hints = ", ".join(f"{c!r}{nearest(c, (ENTITY, QUERY, VECTOR_PREFIX))}" for c in unknown)
        queries = entity_type == "query"
        wrong_side = [c for c in candidates if c not in unknown and (c == QUERY) != queries]
        _check(
            (self.name != "", "name must not be empty"),
            (self.share > 0, f"share must be above 0, but got {self.share}"),
            (
                0 <= self.balance_exponent <= 1,
                f"balance_exponent must lie in [0, 1], but got {self.balance_exponent}",
            ),
            (
                not unknown,
                f"candidates must be 'entity', 'query' or 'vector:COLUMN', but got {hints}",
            ),
            (
                not wrong_side,
                (
                    f"candidates {wrong_side} cannot embed a {entity_type!r}: related queries need"
                    " 'query', entities 'entity' or 'vector:COL'"
                ),
            ),
            (
                len(set(candidates)) == len(candidates),
                f"candidates must differ, but got {list(candidates)}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The towers."""

    query_encoder: str = "tiny-multilingual"
    """Pretrained query tower: the shipped one, a folder, or a Hugging Face name.

    For example ``distilbert-base-multilingual-cased``.
    """
    query_dropout: float = 0.0
    """Rate of the query tower's dropout layers in training."""
    query_ngrams: int = 0
    """Buckets of the query tower's table of words and character n-grams, a power of two; 0: none.

    The table is fitted after training, by ridge regression; held-back queries choose its weight.
    """
    dimension: int = 256
    """Width of all embeddings."""
    entity_towers: str = "unified"
    """``unified``: one entity tower for all entity types (paper); ``separate``: one per type."""

    def __post_init__(self) -> None:
        _check(
            (self.dimension >= 2, f"dimension must be at least 2, but got {self.dimension}"),
            (
                0 <= self.query_dropout < 1,
                f"query_dropout must lie in [0, 1), but got {self.query_dropout}",
            ),
            (
                self.query_ngrams >= 0 and self.query_ngrams & (self.query_ngrams - 1) == 0,
                f"query_ngrams must be 0 or a power of two, but got {self.query_ngrams}",
            ),
            (
                self.entity_towers in ("unified", "separate"),
                f"entity_towers must be 'unified' or 'separate', but got {self.entity_towers!r}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class EntityTowerSettings:
    """Shape of the entity tower; what it reads is ``features``."""

    table_rows: int = 100_000
    """Rows of the hash embedding table (paper: 100,000)."""
    token_dimension: int = 256
    """Width of a token vector."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the hidden layers."""
    dropout: float = 0.0
    """Dropout of the last hidden layer, for entity types with few pairs, which overfit."""

    def __post_init__(self) -> None:
        _check(
            (0 <= self.dropout < 1, f"dropout must lie in [0, 1), but got {self.dropout}"),
            (self.table_rows >= 1, f"table_rows must be at least 1, but got {self.table_rows}"),
            (
                self.token_dimension >= 1,
                f"token_dimension must be at least 1, but got {self.token_dimension}",
            ),
            (
                all(width >= 1 for width in self.hidden),
                f"hidden widths must be at least 1, but got {self.hidden}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss: two sampled softmax terms per task (paper, section 4.3)."""

    temperature: float = INITIAL_TEMPERATURE
    """Where the learned temperature starts."""
    random_negatives: float = 4.0
    """Uniform random catalogue negatives per positive, drawn without repeats; 0: no such term.

    Never more than the catalogue holds: then every entity is a negative once, and the term is the
    full softmax.
    """
    random_query_negatives: float = 4.0
    """The same for related-query tasks, whose negatives cost a transformer pass each."""
    log_q: bool = True
    """Correct every logit for the sampling frequency of its candidate."""
    matryoshka: Mapping[int, float] = field(default_factory=lambda: dict(MATRYOSHKA_WEIGHTS))
    """Prefix length -> weight of the loss on that prefix."""
    sketch_width: int = 0
    """0: logQ from exact counts.

    Otherwise counters per row of each count-min sketch, a power of two (released trainer: 2^26):
    fixed memory, counts too high by about pairs / width.
    """
    sketch_depth: int = DEFAULT_DEPTH
    """Rows of each sketch."""

    def __post_init__(self) -> None:
        _check(
            (self.temperature > 0, f"temperature must be above 0, but got {self.temperature}"),
            (
                self.random_negatives >= 0,
                f"random_negatives must not be negative, but got {self.random_negatives}",
            ),
            (
                self.random_query_negatives >= 0,
                (
                    "random_query_negatives must not be negative, but got"
                    f" {self.random_query_negatives}"
                ),
            ),
            (
                all(d >= 1 and w >= 0 for d, w in self.matryoshka.items()),
                f"matryoshka needs prefixes >= 1 and weights >= 0, but got {self.matryoshka}",
            ),
            (
                self.sketch_width >= 0 and self.sketch_width & (self.sketch_width - 1) == 0,
                f"sketch_width must be 0 or a power of two, but got {self.sketch_width}",
            ),
            (
                self.sketch_depth >= 1,
                f"sketch_depth must be at least 1, but got {self.sketch_depth}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one optimiser step sees."""

    pairs: int = 1024
    """Pairs of all datasets together, over all processes (paper: 10,240)."""
    weighting: str = "uniform"
    """``uniform``: every pair once per epoch; ``count``: in proportion to the pairs' ``count``."""
    gradient_cache: bool = False
    """Encode in chunks twice instead of keeping activations of the whole batch.

    Takes the memory of one chunk; the gradients are the same.
    """
    query_chunk: int = 0
    """Queries encoded together, after sorting by length; 0: 64 on a CPU, 1024 on a GPU."""
    entity_chunk: int = 4096
    """Entities encoded together."""
    cross_fit: int = 0
    """Number of folds of train queries for cross-fitting; 0: off.

    A pair of fold f reads its entity without the engaged queries of fold f. Otherwise the answer
    stands in the entity's text, as it never does for a new query.
    """

    def __post_init__(self) -> None:
        _check(
            (self.pairs >= 1, f"pairs must be at least 1, but got {self.pairs}"),
            (
                self.weighting in ("uniform", "count"),
                f"weighting must be 'uniform' or 'count', but got {self.weighting!r}",
            ),
            (
                self.query_chunk >= 0,
                f"query_chunk must not be negative, but got {self.query_chunk}",
            ),
            (
                self.entity_chunk >= 1,
                f"entity_chunk must be at least 1, but got {self.entity_chunk}",
            ),
            (
                self.cross_fit == 0 or self.cross_fit >= 2,
                f"cross_fit must be 0 (off) or at least 2 folds, but got {self.cross_fit}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """How parameters move. The learning rates are for the peak of the schedule."""

    name: str = "adamw"
    """``adamw`` (fused) or ``lamb`` (paper; from the package pytorch_optimizer)."""
    learning_rate: float = 2e-3
    """Entity tower, temperatures and the query tower's projection (paper: 10^-2.7 with LAMB)."""
    query_learning_rate: float = 3e-4
    """The pretrained query tower; 0 freezes it."""
    token_embedding_learning_rate: float = 3e-4
    """The query tower's token embeddings; 0 freezes them."""
    weight_decay: float = 0.01
    """On matrices; embeddings, biases, norms and temperatures have none."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.98
    """Decay of the gradient's square."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    warmup_steps: int = 100
    """Steps of linear warm-up (paper: 750)."""
    final_fraction: float = 0.02
    """Learning rate at the end of the cosine, relative to the peak."""

    def __post_init__(self) -> None:
        rates = (self.learning_rate, self.query_learning_rate, self.token_embedding_learning_rate)
        _check(
            (
                self.name in ("adamw", "lamb"),
                (
                    "name must be 'adamw' or 'lamb', but got"
                    f" {self.name!r}{nearest(self.name, ('adamw', 'lamb'))}"
                ),
            ),
            (
                self.learning_rate > 0,
                f"learning_rate must be above 0, but got {self.learning_rate}",
            ),
            (min(rates) >= 0, f"learning rates must not be negative, but got {rates}"),
            (
                self.weight_decay >= 0,
                f"weight_decay must not be negative, but got {self.weight_decay}",
            ),
            (
                0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
                f"betas must lie in [0, 1), but got {(self.beta1, self.beta2)}",
            ),
            (self.clip_norm >= 0, f"clip_norm must not be negative, but got {self.clip_norm}"),
            (
                self.warmup_steps >= 0,
                f"warmup_steps must not be negative, but got {self.warmup_steps}",
            ),
            (
                0 <= self.final_fraction <= 1,
                f"final_fraction must lie in [0, 1], but got {self.final_fraction}",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Labelled Recall@10 of held-back training pairs, for early stopping. Never the test pairs."""

    FORMER_NAMES: ClassVar[Mapping[str, str]] = {
        "residual_scales": "residual_weights",
        "query_scales": "query_interpolation",
    }
    split: str = "validation"
    """Pairs with this ``split`` validate.

    When there are none, ``fraction`` of the train queries is held back.
    """
    fraction: float = 0.01
    """Part of the distinct train queries held back (whole queries); 0: no validation."""
    pairs: int = 2000
    """At most so many pairs per entity type."""
    every_steps: int = 0
    """Validate every so many steps; 0: only at the end."""
    patience: int = 0
    """Stop after this many validations without a better mean Recall@10; 0: never."""
    residual_weights: tuple[float, ...] = ()
    """Candidate weights of the entity tower's residual on its text embedding, per entity type.

    After training each type gets the one that validates best (0: the text embedding alone, 1: as
    trained). For types with few pairs, which overfit. Needs ``features.text_embedding``.
    """
    query_interpolation: tuple[float, ...] = ()
    """Candidate weights of the interpolation between the query tower's initial and trained weights.

    After training the tower gets the smallest (0: initial, 1: as trained) that costs no entity type
    validation recall (WiSE-FT). For towers that start from a pretrained one and its projection.
    """

    def __post_init__(self) -> None:
        for name in ("residual_weights", "query_interpolation"):
            object.__setattr__(self, name, tuple(float(weight) for weight in getattr(self, name)))
        _check(
            (
                all(0 <= weight <= 1 for weight in self.query_interpolation),
                f"query_interpolation must lie in [0, 1], but got {self.query_interpolation}",
            ),
            (
                all(0 <= weight <= 1 for weight in self.residual_weights),
                f"residual_weights must lie in [0, 1], but got {self.residual_weights}",
            ),
            (0 <= self.fraction < 1, f"fraction must lie in [0, 1), but got {self.fraction}"),
            (self.pairs >= 1, f"pairs must be at least 1, but got {self.pairs}"),
            (
                self.every_steps >= 0,
                f"every_steps must not be negative, but got {self.every_steps}",
            ),
            (self.patience >= 0, f"patience must not be negative, but got {self.patience}"),
            (
                not (self.patience and not self.every_steps),
                "patience needs every_steps above 0: there is nothing to be patient about",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tables are; empty paths mean the sample data in the package."""

    catalogue: tuple[Path, ...] = ()
    """Catalogue tables (Parquet, CSV, JSONL), one or more."""
    pairs: tuple[Path, ...] = ()
    """Pairs tables."""
    related_queries: bool = True
    """Derive related-query pairs when the tables hold none and a dataset names them."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. ``load_train_config`` reads it from TOML."""

    steps: int = 0
    """Optimiser steps (paper: 150,000); 0: by ``epochs``, or 1,000 when that is 0 too."""
    epochs: float = 0.0
    """Passes over all pairs, instead of ``steps``; datasets with a small share pass less often."""
    max_seconds: float = 0.0
    """Stop after this much time in the loop, with a complete learning rate schedule; 0: no limit.

    Not reproducible to the bit.
    """
    seed: int = 0
    """Seed of everything random, together with the step."""
    device: str = "auto"
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda``."""
    precision: str = "fp32"
    """``fp32`` or ``bf16`` (autocast; on a CPU only where it has instructions for it, else fp32).

    Losses are always fp32.
    """
    log_every: int = 20
    """A line and TensorBoard scalars every so many steps."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end. Needs an output folder."""
    tensorboard: bool = False
    """Write TensorBoard events beside the checkpoints (package tensorboard)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    features: EntityFeatureConfig = field(default_factory=EntityFeatureConfig)
    """Which catalogue columns the entity tower reads, and the size of its vocabulary."""
    entity_tower: EntityTowerSettings = field(default_factory=EntityTowerSettings)
    """Shape of the entity tower."""
    datasets: tuple[DatasetConfig, ...] = ()
    """Empty: one per entity type found in the pairs."""
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if not self.steps and not self.epochs:
            object.__setattr__(self, "steps", 1000)
        names = [dataset.name for dataset in self.datasets]
        _check(
            (self.steps >= 0, f"steps must not be negative, but got {self.steps}"),
            (self.epochs >= 0, f"epochs must not be negative, but got {self.epochs}"),
            (
                not (self.steps and self.epochs),
                (
                    f"give steps or epochs, not both: got steps = {self.steps} and epochs ="
                    f" {self.epochs}"
                ),
            ),
            (
                self.max_seconds >= 0,
                f"max_seconds must not be negative, but got {self.max_seconds}",
            ),
            (
                self.precision in ("fp32", "bf16"),
                (
                    "precision must be 'fp32' or 'bf16', but got"
                    f" {self.precision!r}{nearest(self.precision, ('fp32', 'bf16'))}"
                ),
            ),
            (self.log_every >= 1, f"log_every must be at least 1, but got {self.log_every}"),
            (
                self.checkpoint_every >= 0,
                f"checkpoint_every must not be negative, but got {self.checkpoint_every}",
            ),
            (len(set(names)) == len(names), f"dataset names must differ, but got {names}"),
            (
                not self.validation.residual_weights or bool(self.features.text_embedding),
                "validation.residual_weights needs features.text_embedding: without one the entity"
                " tower has no residual",
            ),
        )


def train_config(table: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """Make a config of plain tables.

    Raises:
        ConfigError: All mistakes at once, one per line.
    """
    return build_config(TrainConfig, table, where)


def load_train_config(path: Path) -> TrainConfig:
    """Read a TOML config; relative data paths count from the config's folder.

    Raises:
        ConfigError: The file is missing or not TOML, or all its mistakes at once, one per line.
    """
    table = read_toml(path)
    data = table.get("data")
    if isinstance(data, dict):
        for key in ("catalogue", "pairs"):
            if isinstance(data.get(key), list):
                data[key] = [
                    str(path.parent / item) if isinstance(item, str) else item for item in data[key]
                ]
    return train_config(table, str(path))


__all__ = [
    "ENTITY",
    "QUERY",
    "VECTOR_PREFIX",
    "BatchConfig",
    "DataConfig",
    "DatasetConfig",
    "LossConfig",
    "ModelConfig",
    "OptimiserConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_train_config",
    "to_table",
    "train_config",
]
