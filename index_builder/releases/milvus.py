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
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from encoders.errors import ConfigError, InvalidVectors, MissingDependency, SpaceMismatch
from index_builder.errors import GateFailed, ReleaseError, ReleaseNotFound, RemoteUnreachable
from index_builder.filters.field_types import FieldType
from index_builder.filters.selection import ID_FIELD
from index_builder.releases.milvus_columns import (
    VECTOR_FIELD,
    copied_attributes,
    insert_request,
)
from index_builder.releases.milvus_filters import milvus_expression
from index_builder.releases.release import Release
from index_builder.search.entity_index import EntityIndex, SearchResult
from index_builder.storage.corpus import unit_vector

MAX_ID_BYTES = 2048
NAME_LIMIT = 255
CONNECT_SECONDS = 10.0
PLAN = "milvus"
"""Of answers that Milvus gave."""
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

    @classmethod
    def of_uri(cls, uri: str, **settings: Any) -> MilvusConfig:
        """Read ``milvus://HOST:PORT``, ``http://HOST:PORT`` or ``https://...``, with ``/PREFIX``.

        Args:
            uri: A path is the prefix of collections and aliases; without one it is ``omni``.
            settings: Other fields.

        Raises:
            ConfigError: It is no such URI.
        """
        parts = urlsplit(uri)
        prefix = parts.path.strip("/") or "omni"
        if parts.scheme not in ("milvus", "http", "https") or not parts.netloc:
            raise ConfigError(
                f"Milvus: expected milvus://HOST:PORT, or with /PREFIX behind it, but got {uri!r}."
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", prefix):
            raise ConfigError(
                "Milvus: expected a prefix of at most 32 letters a-z, digits and _, but got"
                f" {prefix!r}."
            )
        scheme = "https" if parts.scheme == "https" else "http"
        return cls(uri=f"{scheme}://{parts.netloc}", prefix=prefix, **settings)


class Pushed(NamedTuple):
    """What a push has done."""

    release_id: str
    recall: dict[str, float]
    """ANN recall@10 on the golden queries by entity type, as Milvus answers them."""
    active: bool
    removed: list[str]
    """Releases that were collected."""


def connect(config: MilvusConfig) -> Any:
    """Open a ``pymilvus.MilvusClient``.

    Raises:
        MissingDependency: pymilvus is not installed.
        RemoteUnreachable: Nobody answers there.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise MissingDependency("pymilvus", "milvus", "Serving a release from Milvus") from error
    with milvus_errors(config.uri):
        return MilvusClient(config.uri, token=config.token, timeout=CONNECT_SECONDS)


@contextmanager
def milvus_errors(uri: str) -> Iterator[None]:
    """Turn what pymilvus and gRPC raise into ``RemoteUnreachable``, which says what Milvus said."""
    try:
        from pymilvus import MilvusException
    except ImportError as error:
        raise MissingDependency("pymilvus", "milvus", "Serving a release from Milvus") from error
    import grpc

    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        said = str(getattr(error, "message", "") or error)[:300]
        raise RemoteUnreachable(f"Milvus at {uri} does not answer, or refuses: {said}") from error


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

    def push(
        self,
        release: Release,
        *,
        activate: bool = True,
        keep: int = 2,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Pushed:
        """Publish a release, move the aliases to it, and remove the oldest ones.

        Args:
            release: What to copy.
            activate: Whether the aliases move, once every golden query has been answered.
            keep: Releases that stay, this one included; 1 or more. One that an alias names stays in
                any case.
            progress: Told what goes on.

        Raises:
            GateFailed: As ``publish``; no alias has moved.
        """
        recall = self.publish(release, progress=progress)
        if activate:
            self.activate(release.release_id, release.entities)
        return Pushed(
            release.release_id, recall, activate, self.collect(keep, {release.release_id})
        )

    def held(self) -> dict[str, list[str]]:
        """Return the releases under this prefix, in the order of their copies, and their types."""
        found: dict[str, list[str]] = {}
        numbers: dict[str, int] = {}
        for name in self.client.list_collections():
            if not name.startswith(f"{self.config.prefix}_"):
                continue
            try:
                about = self._about(name)
            except ReleaseError:  # of somebody else
                continue
            release_id, entity_type = about["release_id"], about["entity_type"]
            if name != collection_name(self.config.prefix, entity_type, release_id):
                continue  # of another prefix that begins as this one does
            found.setdefault(release_id, []).append(entity_type)
            numbers[release_id] = max(numbers.get(release_id, 0), about["number"])
        return {
            release_id: sorted(found[release_id])
            for release_id in sorted(found, key=lambda one: (numbers[one], one))
        }

    def collect(self, keep: int, spared: Collection[str] = ()) -> list[str]:
        """Remove all but the ``keep`` newest releases; those active or spared stay, and count.

        Returns:
            Ids of the releases that went.
        """
        held = self.held()
        active = {self.active(kind) for kinds in held.values() for kind in kinds}
        safe = (active | set(spared)) & held.keys()
        others = [release_id for release_id in held if release_id not in safe]
        gone = others[: max(0, len(held) - max(keep, len(safe)))]
        for release_id in gone:
            self.drop(release_id, held[release_id])
        return gone

    def publish(
        self, release: Release, *, progress: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """Copy every entity type of a release, index and load it, and check the golden queries.

        Readers see nothing of it yet.

        A collection that holds all rows already is only checked, so an interrupted publishing goes
        on where it was; what it left half done is dropped and made again. One that an alias serves
        is never touched.

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
                    if not self._is_whole(name, len(index.ids)):
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

        if alias not in self.client.list_aliases("")["aliases"]:
            return None
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
            needed = {
                key: about[key] for key in ("release_id", "space_id", "dimension", "entity_type")
            }
            return {
                **needed,
                "attributes": about.get("attributes"),
                "number": int(about.get("number", 0)),
            }
        except (ValueError, KeyError) as error:
            raise ReleaseError(
                f"Milvus collection {name} does not say which release it holds ({error}). Publish"
                " the release again."
            ) from error

    def _is_whole(self, name: str, rows: int) -> bool:
        """Return whether a collection holds all rows and can be searched."""
        if not self.client.has_collection(name):
            return False
        if int(self.client.get_collection_stats(name)["row_count"]) != rows:
            return False
        if not self.client.list_indexes(name):
            return False
        self.client.load_collection(name)
        return True

    def _next_number(self) -> int:
        """Return a number above those of all copies here, whatever the clock says."""
        numbers = [0]
        for name in self.client.list_collections():
            if name.startswith(f"{self.config.prefix}_"):
                with suppress(ReleaseError):
                    numbers.append(self._about(name)["number"])
        return max(numbers) + 1

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
            "attributes": copied_attributes(index),
            "number": self._next_number(),
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
            self._send(name, insert_request(name, index, rows))
            progress(f"{index.entity_type}: {start + len(rows):,} of {total:,} rows copied")
        self.client.flush(name)
        self._check_count(name, index.entity_type, total)

    def _send(self, name: str, request: Any) -> None:
        """Insert columns; the client's own functions would make a Python object of each number."""
        handler = self.client._get_connection()
        handler.batch_insert(name, [], insert_param=request, schema={"fields": []})

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
        if not len(golden.vectors):
            return 1.0
        index = MilvusIndex(
            self.client,
            MilvusCollection(name, entity_type, release.release_id, release.dimension, {}),
            self.config,
        )
        exact = release.entities[entity_type]
        asked = MilvusSearch(10, consistency="Strong")  # the copy, whole, has just been made
        shares = []
        for vector, (found, _) in zip(
            golden.vectors, index.nearest(golden.vectors, asked), strict=True
        ):
            wanted = set(exact.search(vector, 10, exact=True, live=None).ids)
            shares.append(len(wanted & set(found)) / max(1, len(wanted)))
        return float(np.mean(shares))


class MilvusSearch(NamedTuple):
    """What Milvus is asked beside the queries."""

    k: int
    filter: str | None = None
    exclude_ids: Collection[str] = ()
    consistency: str = "Eventually"
    """A copy does not change once it is whole; ``Strong`` waits 0.2 s for the cluster's clock."""
    timeout_seconds: float | None = None
    """None: that of the configuration."""


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
        asked = MilvusSearch(k, filter, exclude_ids)
        ((ids, scores),) = self.nearest(unit_vector(vector)[None], asked)
        if min_score is not None:
            kept = int(np.count_nonzero(scores >= min_score))
            ids, scores = ids[:kept], scores[:kept]
        return SearchResult(ids, scores, PLAN, self.ef(k), None, None)

    def ef(self, k: int) -> int:
        """Return the candidate-list size of a search; 0 where the index has none."""
        given = self._config.search_params.get("ef")
        return 0 if given is None else max(int(given), k)

    def nearest(
        self, queries: np.ndarray, asked: MilvusSearch
    ) -> list[tuple[list[str], np.ndarray]]:
        """Find ids and scores for each of ``queries`` float32 ``(B, D)``, unit rows; best first.

        Raises:
            FilterError: The filter does not parse or fit, or Milvus cannot ask it.
            ReleaseError: The copy does not say which attributes it holds.
            MilvusException: Milvus does not answer in time.
        """
        parameters = {**self._config.search_params}
        if "ef" in parameters:
            parameters["ef"] = self.ef(asked.k)
        parts = [] if asked.filter is None else [self._translated(asked.filter)]
        if asked.exclude_ids:
            listed = json.dumps(sorted(asked.exclude_ids), ensure_ascii=False)
            parts.append(f"{ID_FIELD} not in {listed}")
        found = self._client.search(
            self._collection.name,
            list(queries),
            limit=asked.k,
            filter=" and ".join(f"({part})" for part in parts),
            anns_field=VECTOR_FIELD,
            search_params={"metric_type": "IP", "params": parameters},
            consistency_level=asked.consistency,
            timeout=asked.timeout_seconds or self._config.timeout_seconds,
        )
        return [
            (
                [str(hit[ID_FIELD]) for hit in hits],
                np.array([hit["distance"] for hit in hits], dtype=np.float32),
            )
            for hits in found
        ]

    def _translated(self, expression: str) -> str:
        attributes = self._collection.attributes
        if attributes is None:
            raise ReleaseError(
                f"Milvus collection {self._collection.name} was copied by an earlier version and"
                " does not say which attributes it holds. Publish the release again to filter it."
            )
        return milvus_expression(expression, attributes)
