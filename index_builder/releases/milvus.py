"""Releases in a Milvus cluster: a collection per entity type and release, an alias for the active.

The release directory stays the source of truth; this adapter copies its vectors, ids and
attributes, checks that the copy answers the golden queries, and only then moves the aliases. Each
collection names its release, space and attributes in its description, and a reader refuses a
foreign space. Filters are translated (``milvus_filters.py``), or refused with the reason. Aliases
of several entity types move one after the other (Milvus knows no transaction), so a reader that
needs several types from one release asks for them by ``release_id``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from encoders.errors import InvalidVectors, MissingDependency, SpaceMismatch
from index_builder.errors import GateFailed, ReleaseError, ReleaseNotFound
from index_builder.filters.field_types import FieldType
from index_builder.filters.selection import ID_FIELD
from index_builder.filters.times import period_of
from index_builder.releases.milvus_filters import milvus_expression, time_field
from index_builder.releases.release import Release
from index_builder.search.entity_index import EntityIndex, SearchResult
from index_builder.storage.corpus import unit_vector

VECTOR_FIELD = "embedding"
MAX_ID_BYTES = 2048
NAME_LIMIT = 255
_ALIAS_NOT_FOUND = 1600
_NORM_TOLERANCE = 0.005
_ABSENT = re.compile(r"not found|n[o']t exist", re.IGNORECASE)
"""How servers without that code say that there is no such alias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MilvusConfig:
    """Where and how releases are kept in Milvus."""

    uri: str = "http://localhost:19530"
    token: str = field(default="", repr=False)
    prefix: str = "omni"
    """Collections are ``<prefix>_<entity type>_<release>``, aliases ``<prefix>_<entity type>``."""
    index_type: str = "HNSW"
    index_params: dict[str, Any] = field(default_factory=lambda: {"M": 16, "efConstruction": 200})
    search_params: dict[str, Any] = field(default_factory=lambda: {"ef": 128})
    min_recall: float = 0.95
    """ANN recall@10 on the release's golden queries below which nothing is activated."""
    batch_rows: int = 5_000
    timeout_seconds: float = 600.0


def connect(config: MilvusConfig) -> Any:
    """Open a ``pymilvus.MilvusClient``.

    Raises:
        MissingDependency: pymilvus is not installed.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise MissingDependency("pymilvus", "milvus", "Serving a release from Milvus") from error
    return MilvusClient(config.uri, token=config.token, timeout=config.timeout_seconds)


def collection_name(prefix: str, entity_type: str, release_id: str) -> str:
    """Return a name Milvus allows (letters, digits, ``_``), different for every release id."""
    plain = re.sub(r"\W", "_", release_id, flags=re.ASCII)[: NAME_LIMIT - 64]
    return f"{prefix}_{entity_type}_{plain}_{hashlib.sha256(release_id.encode()).hexdigest()[:8]}"


def alias_name(prefix: str, entity_type: str) -> str:
    """Return the alias that names the active release's collection."""
    return f"{prefix}_{entity_type}"


class MilvusReleases:
    """Copies releases into Milvus and switches between them.

    Args:
        config: Where and how.
    """

    def __init__(self, config: MilvusConfig | None = None) -> None:
        self.config = config or MilvusConfig()
        self.client = connect(self.config)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def publish(
        self, release: Release, *, progress: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """Copy every entity type of a release, index and load it, and check the golden queries.

        Readers see nothing of it yet.

        A collection that an interrupted copy left behind is dropped and made again. One that an
        alias serves is never touched: it is only checked.

        Returns:
            ANN recall@10 on the golden queries by entity type.

        Raises:
            GateFailed: The copy is short of rows or its recall is below ``min_recall``; what was
                copied now is dropped.
        """
        recall: dict[str, float] = {}
        copied: list[str] = []
        try:
            for entity_type, index in release.entities.items():
                name = collection_name(self.config.prefix, entity_type, release.release_id)
                if self._is_served(entity_type, name):
                    self._check_count(name, entity_type, len(index.ids))
                else:
                    copied.append(entity_type)
                    self._copy(name, release, entity_type, index, progress)
                recall[entity_type] = self._golden_recall(name, release, entity_type)
                progress(
                    f"{entity_type}: {len(index.ids):,} rows in {name}, ANN recall@10"
                    f" {recall[entity_type]:.3f}"
                )
                if recall[entity_type] < self.config.min_recall:
                    raise GateFailed(
                        f"Milvus answers the golden queries of {entity_type!r} with ANN recall@10"
                        f" {recall[entity_type]:.3f}, below {self.config.min_recall}. Nothing was"
                        " activated. Raise search_params ef or index_params M."
                    )
        except BaseException:
            self.drop(release.release_id, copied)
            raise
        return recall

    def activate(self, release_id: str, entity_types: Iterable[str]) -> None:
        """Point every alias at this release's collections, once all of them exist.

        Raises:
            ReleaseNotFound: A collection of this release is not in Milvus.
        """
        names = {
            entity_type: collection_name(self.config.prefix, entity_type, release_id)
            for entity_type in entity_types
        }
        missing = [kind for kind, name in names.items() if not self.client.has_collection(name)]
        if missing:
            raise ReleaseNotFound(
                f"Milvus holds no {', '.join(missing)} of release {release_id!r}. Publish it there"
                " first."
            )
        for entity_type, name in names.items():
            alias = alias_name(self.config.prefix, entity_type)
            if self._target_of(alias) is None:
                self.client.create_alias(name, alias)
            else:
                self.client.alter_alias(name, alias)

    def active(self, entity_type: str) -> str | None:
        """Return the release id behind an entity type's alias; None before the first activation."""
        target = self._target_of(alias_name(self.config.prefix, entity_type))
        return None if target is None else str(self._about(target)["release_id"])

    def drop(self, release_id: str, entity_types: Iterable[str]) -> None:
        """Remove a release's collections.

        Raises:
            ReleaseError: It is the active one.
        """
        names = {
            entity_type: collection_name(self.config.prefix, entity_type, release_id)
            for entity_type in entity_types
        }
        served = [kind for kind, name in names.items() if self._is_served(kind, name)]
        if served:
            raise ReleaseError(
                f"release {release_id!r} is active in Milvus for {', '.join(served)}. Activate"
                " another one first. Nothing was removed."
            )
        for name in names.values():
            if self.client.has_collection(name):
                self.client.drop_collection(name)

    def index(
        self, entity_type: str, *, space_id: str, release_id: str | None = None
    ) -> MilvusIndex:
        """Open an entity type for searching: the active release, or the one named.

        Raises:
            ReleaseNotFound: It is not in Milvus.
            SpaceMismatch: Its vectors belong to another space than ``space_id``.
        """
        if release_id is not None:
            name: str | None = collection_name(self.config.prefix, entity_type, release_id)
        else:
            name = self._target_of(alias_name(self.config.prefix, entity_type))
        if name is None or not self.client.has_collection(name):
            raise ReleaseNotFound(
                f"Milvus holds no {'active release' if release_id is None else release_id} of"
                f" {entity_type!r}. Publish it there first."
            )
        about = self._about(name)
        if about["space_id"] != space_id:
            raise SpaceMismatch(space_id, str(about["space_id"]), f"Milvus collection {name}")
        collection = MilvusCollection(
            name,
            entity_type,
            str(about["release_id"]),
            int(about["dimension"]),
            about["attributes"],
        )
        return MilvusIndex(self.client, collection, self.config)

    def _target_of(self, alias: str) -> str | None:
        """Return the collection behind an alias; None where there is no such alias.

        Raises:
            MilvusException: Milvus does not answer, which says nothing about the alias.
        """
        from pymilvus import MilvusException

        try:
            return str(self.client.describe_alias(alias)["collection_name"])
        except MilvusException as error:
            if error.code == _ALIAS_NOT_FOUND or _ABSENT.search(str(error)):
                return None
            raise

    def _is_served(self, entity_type: str, name: str) -> bool:
        """Return whether readers are sent to a collection."""
        return self._target_of(alias_name(self.config.prefix, entity_type)) == name

    def _about(self, name: str) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads(self.client.describe_collection(name)["description"])
            needed = {key: about[key] for key in ("release_id", "space_id", "dimension")}
            return {**needed, "attributes": about.get("attributes")}
        except (ValueError, KeyError) as error:
            raise ReleaseError(
                f"Milvus collection {name} does not say which release it holds ({error}). Publish"
                " the release again."
            ) from error

    def _copy(
        self,
        name: str,
        release: Release,
        entity_type: str,
        index: EntityIndex,
        progress: Callable[[str], None],
    ) -> None:
        from pymilvus import DataType

        if self.client.has_collection(name):
            self.client.drop_collection(name)
        about = {
            "release_id": release.release_id,
            "space_id": release.space_id,
            "dimension": release.dimension,
            "entity_type": entity_type,
            "attributes": _copied(index),
        }
        schema = self.client.create_schema(
            auto_id=False, enable_dynamic_field=True, description=json.dumps(about)
        )
        schema.add_field(ID_FIELD, DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field(VECTOR_FIELD, DataType.FLOAT_VECTOR, dim=release.dimension)
        self.client.create_collection(name, schema=schema)
        self._insert(name, index, progress)
        params = self.client.prepare_index_params()
        params.add_index(
            VECTOR_FIELD,
            index_type=self.config.index_type,
            metric_type="IP",
            params=self.config.index_params,
        )
        self.client.create_index(name, params)
        self.client.load_collection(name)

    def _insert(self, name: str, index: EntityIndex, progress: Callable[[str], None]) -> None:
        """Copy the rows of an index and count them.

        Raises:
            GateFailed: Some are missing.
        """
        total = len(index.ids)
        for start in range(0, total, self.config.batch_rows):
            rows = np.arange(start, min(total, start + self.config.batch_rows))
            self.client.insert(name, list(_rows(index, rows)))
            progress(f"{index.entity_type}: {start + len(rows):,} of {total:,} rows copied")
        self.client.flush(name)
        self._check_count(name, index.entity_type, total)

    def _check_count(self, name: str, entity_type: str, rows: int) -> None:
        """Compare the rows of a collection with those of the release.

        Raises:
            GateFailed: Some are missing.
        """
        count = int(self.client.get_collection_stats(name)["row_count"])
        if count != rows:
            raise GateFailed(
                f"Milvus holds {count:,} rows of {entity_type!r}, but the release has {rows:,}."
                " Nothing was activated."
            )

    def _golden_recall(self, name: str, release: Release, entity_type: str) -> float:
        golden = release.golden(entity_type)
        index = MilvusIndex(
            self.client,
            MilvusCollection(name, entity_type, release.release_id, release.dimension, {}),
            self.config,
        )
        exact = release.entities[entity_type]
        shares = []
        for vector in golden.vectors:
            wanted = set(exact.search(vector, 10, exact=True, live=None).ids)
            shares.append(len(wanted & set(index.search(vector, 10).ids)) / max(1, len(wanted)))
        return float(np.mean(shares))


def _copied(index: EntityIndex) -> dict[str, FieldType]:
    """Return the attributes that a copy holds, with their types."""
    schema = index.attribute_table.schema
    return {name: schema[name] for name in schema if name not in (ID_FIELD, VECTOR_FIELD)}


def _rows(index: EntityIndex, rows: np.ndarray) -> Iterable[dict[str, Any]]:
    """Return base rows as Milvus takes them: missing values are missing keys."""
    types = _copied(index)
    ids = index.ids.take(rows)
    nodes = index.corpus.node_of_row
    vectors = index.corpus.vectors[rows if nodes is None else nodes[rows]]
    attributes = index.attribute_table.values(rows, list(types))
    dtypes = index.attribute_table.frame.schema
    singles = {name for name in types if dtypes[name] in (pl.Float32, pl.List(pl.Float32))}
    for id_, vector, values in zip(ids, vectors, attributes, strict=True):
        fields = {
            name: _shortest(value) if name in singles else value
            for name, value in values.items()
            if not _is_missing(value)
        }
        times = {
            time_field(name): _instants(value)
            for name, value in fields.items()
            if types[name] in ("time", "list<time>")
        }
        yield {ID_FIELD: id_, VECTOR_FIELD: vector, **fields, **times}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shortest(value: Any) -> Any:
    """Return the shortest decimal that a float32 reads as, which filters write; of lists, each."""
    if isinstance(value, list):
        return [_shortest(item) for item in value]
    return None if value is None else float(str(np.float32(value)))


def _instants(value: str | list[str]) -> int | list[int]:
    """Return the microseconds since 1970 of a time or of each of a list."""
    if isinstance(value, str):
        period = period_of(value)
        assert period is not None, "every value of the column is a time"
        return period.low
    return [_instants(text) for text in value if text is not None]  # type: ignore[misc]


class MilvusCollection(NamedTuple):
    """A release's entity type in Milvus."""

    name: str
    entity_type: str
    release_id: str
    dimension: int
    attributes: Mapping[str, FieldType] | None
    """Types by name; None where an earlier version copied it."""


class MilvusIndex:
    """One entity type of one release in Milvus, with the search of ``EntityIndex``."""

    def __init__(self, client: Any, collection: MilvusCollection, config: MilvusConfig) -> None:
        self._client = client
        self._collection = collection
        self._config = config
        self.entity_type = collection.entity_type
        self.release_id = collection.release_id
        self.dimension = collection.dimension

    def search(
        self,
        query: np.ndarray,
        k: int = 10,
        *,
        filter: str | None = None,
        exclude_ids: Collection[str] = (),
        min_score: float | None = None,
    ) -> SearchResult:
        """Find the k best entities for one query ``(D,)`` float32; best first.

        Raises:
            InvalidVectors: The query has another shape, or another norm than 1.
            FilterError: The filter does not parse or fit, or Milvus cannot ask it.
            ReleaseError: The copy does not say which attributes it holds.
        """
        vector = np.asarray(query, dtype=np.float32)
        if vector.shape != (self.dimension,):
            raise InvalidVectors(
                f"the query must have shape ({self.dimension},), but got {vector.shape}."
            )
        norm = float(np.linalg.norm(vector))
        if not abs(norm - 1) < _NORM_TOLERANCE:  # of NaN, too
            raise InvalidVectors(f"the query must have norm 1, but got {norm:.4f}. Normalise it.")
        vector = unit_vector(vector)
        parameters = {**self._config.search_params}
        if "ef" in parameters:
            parameters["ef"] = max(int(parameters["ef"]), k)
        parts = [] if filter is None else [self._translated(filter)]
        if exclude_ids:
            listed = json.dumps(sorted(exclude_ids), ensure_ascii=False)
            parts.append(f"{ID_FIELD} not in {listed}")
        expression = " and ".join(f"({part})" for part in parts)
        found = self._client.search(
            self._collection.name,
            [vector],
            limit=k,
            filter=expression,
            anns_field=VECTOR_FIELD,
            search_params={"metric_type": "IP", "params": parameters},
            consistency_level="Strong",
        )[0]
        hits = [
            (str(hit[ID_FIELD]), float(hit["distance"]))
            for hit in found
            if min_score is None or hit["distance"] >= min_score
        ]
        scores = np.array([score for _, score in hits], dtype=np.float32)
        return SearchResult(
            [id_ for id_, _ in hits], scores, "milvus", int(parameters.get("ef", 0)), None, None
        )

    def _translated(self, expression: str) -> str:
        attributes = self._collection.attributes
        if attributes is None:
            raise ReleaseError(
                f"Milvus collection {self._collection.name} was copied by an earlier version and"
                " does not say which attributes it holds. Publish the release again to filter it."
            )
        return milvus_expression(expression, attributes)
