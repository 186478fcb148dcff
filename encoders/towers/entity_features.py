"""Turn catalogue rows into inputs of the entity tower.

These are ragged n-gram ids per text field and one row of continuous features.

Notable: a whole catalogue is featurised once into flat tensors; a training batch is then a
vectorised selection of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from encoders.errors import BundleError, ConfigError, RowError, SchemaError
from encoders.tables.cells import cell_texts
from encoders.text.vocabulary import NgramConfig, NgramCounter, Vocabulary
from encoders.towers.text_embedding import (
    FULL_TEXT_FIELDS,
    TEXT_EMBEDDING_FIELDS,
    TextEmbedding,
    other_tower,
    save_tower,
    text_embedding,
    tower_fingerprint,
)

TEXT_FIELDS = (
    "title",
    "description",
    "caption",
    "board_titles",
    "engaged_queries",
    "domain",
    "brand",
    "category",
    "color",
    "material",
    "pattern",
    "size",
)
FEATURES_FORMAT = 1
TEXT_TOWER = "text_tower"
"""Folder of the frozen tower of the text embedding, beside ``features.json``."""


@dataclass(frozen=True, kw_only=True)
class EntityFeatureConfig:
    """Which catalogue columns the entity tower reads."""

    FORMER_NAMES: ClassVar[Mapping[str, str]] = {
        "whole_text_weight": "full_text_weight",
        "whole_text_queries": "full_text_queries",
    }
    """Names of settings in TOML files and ``features.json`` of version 0.1 -> present names."""

    text_fields: tuple[str, ...] = TEXT_FIELDS
    """Text or list-of-text columns, one bag of n-grams each.

    A column that a catalogue lacks reads as empty.
    """
    continuous: Mapping[str, int] = field(default_factory=dict)
    """Vector columns and their widths, concatenated in this order, e.g.
    ``{"visual": 1024, "pinsage": 256}``.
    """
    engaged_queries: int = 20
    """Engaged queries that are read, from the first; 0: all that the catalogue holds.

    Data sets that make the column of their train pairs make it this long (0: 20).
    """
    ngrams: NgramConfig = field(default_factory=NgramConfig)
    """Vocabulary sizes."""
    text_embedding: str = ""
    """A query tower (shipped name or folder) that embeds title and engaged queries; empty: none.

    Its frozen vector is one more continuous feature, the last. It costs a transformer pass per
    distinct text.
    """
    full_text_weight: float = 0.0
    """Weight of the full text in the text embedding; 0: without it.

    The full text is title, description, category and boards in one.

    The engaged queries weigh 1, the title 0.5.
    """
    full_text_queries: int = 0
    """Number of engaged queries, from the first, that the full text also holds."""
    text_embedding_fingerprint: str = ""
    """SHA-256 of that tower; filled in, and checked on load."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_fields", tuple(self.text_fields))
        if self.text_embedding:
            found = tower_fingerprint(self.text_embedding)
            expected = self.text_embedding_fingerprint
            if expected not in ("", found):
                raise ConfigError(other_tower(self.text_embedding, found, expected))
            object.__setattr__(self, "text_embedding_fingerprint", found)
        weight = self.full_text_weight
        if not (0 <= weight <= 100 and (self.text_embedding or not weight)):
            raise ConfigError(
                f"EntityFeatureConfig.full_text_weight ({weight}) must lie in [0, 100], above 0"
                " only with a text_embedding"
            )
        if self.full_text_queries < 0 or (self.full_text_queries and not weight):
            raise ConfigError(
                f"EntityFeatureConfig.full_text_queries ({self.full_text_queries}) must be at"
                " least 0, and 0 without full_text_weight"
            )
        if self.engaged_queries < 0:
            raise ConfigError(
                f"EntityFeatureConfig.engaged_queries ({self.engaged_queries}) must be at least 0"
            )
        object.__setattr__(self, "continuous", dict(self.continuous))
        if isinstance(self.ngrams, Mapping):
            object.__setattr__(self, "ngrams", NgramConfig(**self.ngrams))
        if not self.text_fields:
            raise ConfigError(
                "EntityFeatureConfig.text_fields is empty; name at least one text column, e.g."
                " title"
            )
        doubled = sorted(
            {name for name in self.text_fields if self.text_fields.count(name) > 1}
            | set(self.text_fields) & set(self.continuous)
        )
        if doubled:
            raise ConfigError(
                f"EntityFeatureConfig: {', '.join(doubled)} is declared twice; name each column"
                " once"
            )
        for name, width in self.continuous.items():
            if not isinstance(width, int) or width < 1:
                raise ConfigError(
                    f"EntityFeatureConfig.continuous[{name!r}] ({width!r}) must be a whole number"
                    " of at least 1"
                )

    @property
    def text_columns(self) -> frozenset[str]:
        """Every text column that a vector depends on.

        These are the fields with n-grams, and those that only the text embedding reads.
        """
        embedded = TEXT_EMBEDDING_FIELDS if self.text_embedding else ()
        full = FULL_TEXT_FIELDS if self.full_text_weight else ()
        return frozenset((*self.text_fields, *embedded, *full))

    def columns_read(self, catalogue: pl.DataFrame) -> pl.DataFrame:
        """Return a catalogue with no more engaged queries than are read."""
        column = "engaged_queries"
        if not self.engaged_queries or not isinstance(catalogue.schema.get(column), pl.List):
            return catalogue
        return catalogue.with_columns(pl.col(column).list.head(self.engaged_queries))

    @property
    def continuous_width(self) -> int:
        """Total width of the continuous features."""
        return sum(self.continuous.values()) + self.text_embedding_width

    @property
    def text_embedding_width(self) -> int:
        """Width of the text embedding, 0 for none."""
        return self.open_text_embedding().dimension if self.text_embedding else 0

    def open_text_embedding(self) -> TextEmbedding:
        """Load the text embedding; it must not be empty."""
        return text_embedding(self.text_embedding, self.text_embedding_fingerprint)


@dataclass(frozen=True)
class EntityBatch:
    """Inputs of N entities with F text fields, T tokens in all and C continuous features."""

    token_ids: Tensor
    """(T,) int32 vocabulary ids."""
    offsets: Tensor
    """(N * F + 1,) int64; field f of entity n is bag ``n * F + f``.

    Bag b owns ``token_ids[offsets[b] : offsets[b + 1]]``.
    """
    continuous: Tensor | None
    """(N, C) float32, or None when no continuous feature is declared."""
    fields: int
    """F."""

    def __len__(self) -> int:
        """Number of entities."""
        return (len(self.offsets) - 1) // self.fields

    def select(self, rows: Tensor | npt.NDArray[np.int64] | Sequence[int]) -> EntityBatch:
        """Select the entities at ``rows`` (any order, repeats allowed), on the same device."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.offsets.device)
        field = torch.arange(self.fields, device=index.device)
        bags = (index[:, None] * self.fields + field).reshape(-1)  # (R * F,)
        starts = self.offsets[bags]
        lengths = self.offsets[bags + 1] - starts
        offsets = torch.zeros(len(bags) + 1, dtype=torch.int64, device=index.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        # An entity's fields are neighbours, so tokens move in one piece per entity.
        first = offsets[:-1].view(-1, self.fields)[:, 0]
        counts = offsets[1:].view(-1, self.fields)[:, -1] - first
        shift = torch.repeat_interleave(self.offsets[index * self.fields] - first, counts)
        positions = torch.arange(len(shift), device=index.device) + shift
        continuous = None if self.continuous is None else self.continuous[index]
        return EntityBatch(self.token_ids[positions], offsets, continuous, self.fields)

    def slice(self, start: int, stop: int) -> EntityBatch:
        """Take entities ``start`` to ``stop`` (exclusive) without copying tokens."""
        offsets = self.offsets[start * self.fields : stop * self.fields + 1]
        tokens = self.token_ids[int(offsets[0]) : int(offsets[-1])]
        continuous = None if self.continuous is None else self.continuous[start:stop]
        return EntityBatch(tokens, offsets - offsets[0], continuous, self.fields)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EntityBatch:
        """Copy the batch to another device."""
        continuous = self.continuous
        if continuous is not None:
            continuous = continuous.to(device, non_blocking=non_blocking)
        token_ids = self.token_ids.to(device, non_blocking=non_blocking)
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        return EntityBatch(token_ids, offsets, continuous, self.fields)

    def pin_memory(self) -> EntityBatch:
        """Copy the batch to page-locked memory, for asynchronous copies to a GPU."""
        continuous = None if self.continuous is None else self.continuous.pin_memory()
        return EntityBatch(
            self.token_ids.pin_memory(), self.offsets.pin_memory(), continuous, self.fields
        )


def concatenate(batches: Sequence[EntityBatch]) -> EntityBatch:
    """Join batches of the same featuriser, in order.

    Raises:
        ValueError: There is no batch, or they differ in fields or continuous features.
    """
    if not batches:
        raise ValueError("concatenate needs at least one batch")
    shapes = {
        (batch.fields, None if batch.continuous is None else batch.continuous.shape[1])
        for batch in batches
    }
    if len(shapes) > 1:
        raise ValueError("batches of different featurisers cannot be concatenated")
    lengths = torch.cat([batch.offsets.diff() for batch in batches])
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    continuous = [batch.continuous for batch in batches if batch.continuous is not None]
    return EntityBatch(
        torch.cat([batch.token_ids for batch in batches]),
        offsets,
        torch.cat(continuous) if continuous else None,
        batches[0].fields,
    )


class EntityFeaturizer:
    """Turns catalogue rows into ``EntityBatch`` by the vocabulary counted from a catalogue."""

    def __init__(self, config: EntityFeatureConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    @classmethod
    def fit(
        cls,
        catalogue: pl.DataFrame | Iterable[pl.DataFrame],
        config: EntityFeatureConfig | None = None,
    ) -> EntityFeaturizer:
        """Count the vocabulary of a catalogue, or of a stream of its parts, in bounded memory.

        Args:
            catalogue: Rows of the table ``catalogue``, or an iterable of such frames.
            config: What to read; the default reads every known text field and no vectors.

        Raises:
            SchemaError: Not one of the text fields, or a declared vector, is a column of the
                catalogue.
            DataError: No n-gram at all was found.
        """
        config = config or EntityFeatureConfig()
        counter = NgramCounter(config.ngrams)
        columns: set[str] = set()
        for part in [catalogue] if isinstance(catalogue, pl.DataFrame) else catalogue:
            columns |= set(part.columns)
            part = config.columns_read(part)
            for name in config.text_fields:
                if name in part.columns:
                    counter.add(row_texts(part[name]))
        if not columns & set(config.text_fields):
            raise SchemaError(
                f"the catalogue has none of the text fields {list(config.text_fields)}; it has"
                f" {sorted(columns)}. Rename or configure"
            )
        absent = [name for name in config.continuous if name not in columns]
        if absent:
            raise SchemaError(
                f"the catalogue lacks the declared vector column(s) {absent}; it has"
                f" {sorted(columns)}. Add them or drop them"
            )
        return cls(config, counter.vocabulary())

    def missing_columns(self, catalogue: pl.DataFrame) -> list[str]:
        """List the declared columns that this catalogue lacks; they read as empty and zero."""
        return [
            name
            for name in (*self.config.text_fields, *self.config.continuous)
            if name not in catalogue.columns
        ]

    def __call__(self, catalogue: pl.DataFrame) -> EntityBatch:
        """Featurise rows, in order.

        Args:
            catalogue: N rows, N may be 0. Nulls and absent columns read as empty text and zero
                vectors; a list of vectors as its mean.

        Returns:
            The inputs of N entities, on the CPU.

        Raises:
            SchemaError: A column has a type that is neither text, list of text, nor vector(s).
            RowError: A vector has another width than declared, or holds NaN or Inf; the id is
                named.
        """
        catalogue = self.config.columns_read(catalogue)
        rows = catalogue.height
        names = self.config.text_fields
        lengths = np.zeros((rows, len(names)), dtype=np.int64)
        per_field: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = []
        for i, name in enumerate(names):
            if name not in catalogue.columns:
                per_field.append((np.empty(0, np.int32), np.zeros(rows + 1, np.int64)))
                continue
            ids, offsets = self.vocabulary.tokenize(row_texts(catalogue[name]))
            lengths[:, i] = np.diff(offsets)
            per_field.append((ids, offsets))
        offsets = np.zeros(rows * len(names) + 1, dtype=np.int64)
        np.cumsum(lengths.reshape(-1), out=offsets[1:])
        token_ids = np.empty(int(offsets[-1]), dtype=np.int32)
        for i, (ids, own) in enumerate(per_field):
            if len(ids):
                # (N,) from a place in the field's ids to its place among all
                shift = offsets[i : -1 : len(names)] - own[:-1]
                token_ids[np.arange(len(ids)) + np.repeat(shift, lengths[:, i])] = ids
        continuous = [
            row_vectors(catalogue, name, width) for name, width in self.config.continuous.items()
        ]
        if self.config.text_embedding:
            embed = self.config.open_text_embedding()
            continuous.append(
                embed(catalogue, self.config.full_text_weight, self.config.full_text_queries)
            )
        joined = torch.from_numpy(np.concatenate(continuous, axis=1)) if continuous else None
        return EntityBatch(
            torch.from_numpy(token_ids), torch.from_numpy(offsets), joined, len(names)
        )

    def save(self, folder: Path) -> None:
        """Write vocabulary files, ``features.json`` and the text embedding's tower into ``folder``.

        Nothing outside the folder is needed to load it.

        Raises:
            BundleError: The text embedding's tower is no longer the one of the features.
        """
        self.vocabulary.save(folder)
        described = {"format_version": FEATURES_FORMAT, **asdict(self.config)}
        if self.config.text_embedding:
            config = self.config
            save_tower(
                config.text_embedding, config.text_embedding_fingerprint, folder / TEXT_TOWER
            )
            described["text_embedding"] = TEXT_TOWER
            found = tower_fingerprint(str(folder / TEXT_TOWER))
            described["text_embedding_fingerprint"] = found
        (folder / "features.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> EntityFeaturizer:
        """Read what ``save`` wrote.

        Raises:
            BundleError: A file is missing, damaged or of another format version.
        """
        try:
            described: dict[str, Any] = json.loads(
                (folder / "features.json").read_text(encoding="utf-8")
            )
            version = described.pop("format_version", None)
        except (OSError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{folder}: no readable features.json ({error}); copy the whole entity_encoder"
                " folder again"
            ) from error
        if version != FEATURES_FORMAT:
            raise BundleError(
                f"{folder}: features format {version!r}, but this code reads {FEATURES_FORMAT}; use"
                " the release that wrote it"
            )
        try:
            former = EntityFeatureConfig.FORMER_NAMES
            described.setdefault("engaged_queries", 0)  # version 0.1 read all
            if described.get("text_embedding") == TEXT_TOWER:
                described["text_embedding"] = str(folder / TEXT_TOWER)
            config = EntityFeatureConfig(**{former.get(k, k): v for k, v in described.items()})
        except (TypeError, ConfigError) as error:
            raise BundleError(
                f"{folder}: features.json is not what this code writes ({error}); use the release"
                " that wrote it"
            ) from error
        return cls(config, Vocabulary.load(folder))


def row_texts(column: pl.Series) -> list[str]:
    """Read a text or list-of-text column as one string per row.

    List items stand on lines of their own; null is empty.
    """
    if isinstance(column.dtype, pl.List | pl.Array):
        column = cell_texts(column).list.join("\n", ignore_nulls=True)
    elif isinstance(column.dtype, pl.Struct | pl.Object | pl.Binary):
        raise SchemaError(
            f"text field {column.name!r} must be text or a list of texts, but is {column.dtype};"
            " convert it"
        )
    return cell_texts(column).fill_null("").to_list()


def vector_column_of(catalogue: pl.DataFrame, name: str) -> npt.NDArray[np.float32]:
    """Read one vector column as float32 (N, W), as wide as its first vector; 0 without any.

    Raises:
        SchemaError: There is no such column, or it holds no vectors.
        RowError: A vector is of another width, or not finite.
    """
    if name not in catalogue.columns:
        raise SchemaError(
            f"vector column {name!r} is not in the catalogue; it has"
            f" {', '.join(catalogue.columns)}."
        )
    present = catalogue[name].drop_nulls()
    first = present[0] if len(present) else []
    if not len(first):
        return np.zeros((catalogue.height, 0), np.float32)
    width = len(first[0]) if isinstance(first[0], list | pl.Series) else len(first)
    return row_vectors(catalogue, name, width)


def row_vectors(catalogue: pl.DataFrame, name: str, width: int) -> npt.NDArray[np.float32]:
    """Read one vector column as float32 (N, width).

    Null, absent and empty are zeros; several vectors are averaged.
    """
    vectors = np.zeros((catalogue.height, width), dtype=np.float32)
    if name not in catalogue.columns or catalogue[name].dtype == pl.Null:
        return vectors
    column = catalogue[name]
    inner = getattr(column.dtype, "inner", None)
    if inner is None or not (
        inner.is_numeric() or isinstance(inner, pl.List | pl.Array) or inner == pl.Null
    ):
        raise SchemaError(
            f"vector column {name!r} must be a list of {width} numbers or a list of such lists, but"
            f" is {column.dtype}"
        )
    several = isinstance(inner, pl.List | pl.Array)
    row_of = np.arange(catalogue.height)
    if several:
        frame = (
            pl.DataFrame({"row": row_of, "vector": column.cast(pl.List(pl.List(pl.Float32)))})
            .explode("vector")
            .drop_nulls()
        )
        row_of, column = frame["row"].to_numpy(), frame["vector"]
    column = column.cast(pl.List(pl.Float32))
    lengths = column.list.len().fill_null(0).to_numpy()
    wrong = np.flatnonzero((lengths != 0) & (lengths != width))
    if len(wrong):
        raise RowError(
            f"{_where(catalogue, row_of[wrong[0]])}: {name} must hold {width} numbers, but holds"
            f" {lengths[wrong[0]]}; fix or drop the row"
        )
    present = row_of[lengths == width]
    flat = column.filter(pl.Series(lengths == width)).explode().to_numpy().reshape(-1, width)
    bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(bad):
        raise RowError(
            f"{_where(catalogue, present[bad[0]])}: {name} holds NaN, Inf or null; a missing vector"
            " must be null as a whole"
        )
    if not several:
        vectors[present] = flat
        return vectors
    np.add.at(vectors, present, flat)
    counts = np.maximum(np.bincount(present, minlength=len(vectors)), 1).astype(np.float32)
    vectors /= counts[:, None]
    return vectors


def _where(catalogue: pl.DataFrame, row: int) -> str:
    """Name the entity by its id.

    A row number stands in only without ids, since rows may be part of a longer stream.
    """
    return f"entity {catalogue['id'][int(row)]!r}" if "id" in catalogue.columns else f"row {row}"
