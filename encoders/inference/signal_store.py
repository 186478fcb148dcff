"""Store embeddings on disk, one row per entity, for index builds and ranking models.

They are written in parts and published all at once.

Layout of ``<root>/<entity_type>/``::

    signals.json              names the parts that belong together, with rows, dimension and
                              space id; replaced atomically
    part-<run>-00000.parquet  id, embedding fixed_size_list<float>[D], space_id, content_hash,
                              updated_at
    _staging/                 parts of a run that is not finished; a later run resumes with them

Each part's schema metadata names the runtime form that made its vectors (``form_id``); vectors of
two forms never stand in one run's parts.

Any Parquet reader opens the parts. A reader of ours trusts only what ``signals.json`` names, so a
killed run changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.errors import DataError, InvalidVectors, SpaceMismatch

Float32 = npt.NDArray[np.float32]
STORE_FORMAT = 1
STAGING = "_staging"
_FORM_MARK = b"form_id"
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Signals:
    """The embeddings of one entity type; row ``i`` of every member belongs together."""

    ids: list[str]
    """N ids, distinct, in the order of the catalogue."""
    vectors: Float32
    """(N, D) float32, C-contiguous, unit rows."""
    space_id: str
    """The one space of all vectors."""
    content_hashes: list[str]
    """Hash of each row's inputs, ``""`` where the writer gave none."""
    updated_at: npt.NDArray[np.datetime64] = field(
        default_factory=lambda: np.empty(0, "datetime64[us]")
    )
    """(N,) UTC times at which the vectors were computed; empty where unknown."""
    form_id: str = ""
    """Runtime form that made the vectors (``torch-fp32``, ...), as a part file states it.

    ``""`` where it states none.
    """

    def __len__(self) -> int:
        return len(self.ids)


def check_vectors(vectors: Float32, ids: Sequence[str], dimension: int | None = None) -> None:
    """Refuse vectors that must never enter a store or an index.

    Args:
        vectors: (N, D) float32, unit rows.
        ids: N ids, for the message.
        dimension: D, or None for any.

    Raises:
        InvalidVectors: Wrong shape or dtype, NaN, Inf, or a norm further than ``NORM_TOLERANCE``
            from 1; the first bad id is named.
    """
    if (
        vectors.ndim != 2
        or vectors.shape[0] != len(ids)
        or vectors.dtype != np.float32
        or dimension not in (None, vectors.shape[-1])
    ):
        wanted = f"({len(ids)}, {dimension if dimension is not None else 'D'}) float32"
        raise InvalidVectors(
            f"expected vectors of {wanted}, but got {vectors.shape} {vectors.dtype}; embed again"
            " with one bundle"
        )
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))  # NaN and Inf fail the comparison
    if len(bad):
        row = int(bad[0])
        raise InvalidVectors(
            f"{len(bad)} of {len(ids)} vectors are not unit vectors; the first is id {ids[row]!r}"
            f" with norm {norms[row]:.6g}. NaN or 0 points to a broken model or features; otherwise"
            " normalise the rows"
        )


class SignalStore:
    """A folder of embeddings per entity type.

    Args:
        root: The folder.
        source_written_ns: For writing: when the catalogue that is embedded was written (its files'
            time), nanoseconds since 1970; None: not known.
    """

    def __init__(self, root: Path | str, source_written_ns: int | None = None) -> None:
        self.root = Path(root)
        self.source_written_ns = source_written_ns

    def entity_types(self) -> list[str]:
        """List the entity types that have been published, sorted."""
        return sorted(path.parent.name for path in self.root.glob("*/signals.json"))

    def describe(self, entity_type: str) -> dict[str, Any]:
        """Read the rows, dimension, space id and parts of one entity type.

        Raises:
            DataError: Nothing was published for it, or ``signals.json`` is damaged or of another
                format version.
        """
        path = self.root / entity_type / "signals.json"
        try:
            described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.root} holds no signals of {entity_type!r}; it holds {self.entity_types()}."
                " Run: omni embed"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); embed {entity_type!r} again"
            ) from error
        if described.get("format_version") != STORE_FORMAT:
            raise DataError(
                f"{path} has format {described.get('format_version')!r}, but this code reads"
                f" {STORE_FORMAT}; embed again"
            )
        strange = [p["file"] for p in described["parts"] if p["file"] != Path(p["file"]).name]
        if strange:
            raise DataError(
                f"{path} names the part {strange[0]!r}, which is no plain file name; embed again"
            )
        return described

    def part_paths(self, entity_type: str) -> list[Path]:
        """List the published part files in row order. See ``describe`` for errors."""
        return [
            self.root / entity_type / part["file"] for part in self.describe(entity_type)["parts"]
        ]

    def source_time_ns(self, entity_type: str) -> int:
        """Return the time after which no embedded row can have been written, ns since 1970.

        It is that of the catalogue which was embedded; of a store that does not say, the time at
        which the embeddings were published. Times of embedding (``updated_at``) say how old a
        vector is, never how old its row is. See ``describe`` for errors.
        """
        written = self.describe(entity_type).get("source_written_ns")
        if isinstance(written, int):
            return written
        return (self.root / entity_type / "signals.json").stat().st_mtime_ns

    def read(self, entity_type: str) -> Signals:
        """Read all embeddings of one entity type into memory.

        Raises:
            DataError: Nothing was published, or a part is missing, damaged or not what
                ``signals.json`` says.
            SpaceMismatch: A part was made under another space id.
            InvalidVectors: A stored vector is not a unit vector.
        """
        described = self.describe(entity_type)
        vectors = np.empty((described["rows"], described["dimension"]), dtype=np.float32)
        ids: list[str] = []
        hashes: list[str] = []
        stamps = np.empty(described["rows"], "datetime64[us]")
        for part in described["parts"]:
            held = read_part(self.root / entity_type / part["file"])
            if held.space_id != described["space_id"]:
                path = self.root / entity_type / part["file"]
                raise SpaceMismatch(described["space_id"], held.space_id, str(path))
            if (
                len(held) != part["rows"]
                or held.vectors.shape[1] != vectors.shape[1]
                or len(ids) + len(held) > len(vectors)
            ):
                raise DataError(
                    f"{part['file']} of {entity_type!r} holds other rows than signals.json says;"
                    " embed again"
                )
            vectors[len(ids) : len(ids) + len(held)] = held.vectors
            stamps[len(ids) : len(ids) + len(held)] = held.updated_at
            ids += held.ids
            hashes += held.content_hashes
        if len(ids) != len(vectors):
            raise DataError(
                f"signals.json of {entity_type!r} promises {len(vectors)} rows, but the parts hold"
                f" {len(ids)}; embed again"
            )
        check_vectors(vectors, ids)
        return Signals(ids, vectors, described["space_id"], hashes, stamps)

    def write(
        self,
        entity_type: str,
        ids: Sequence[str],
        vectors: Float32,
        space_id: str,
        content_hashes: Sequence[str] | None = None,
        *,
        part_rows: int = 32_768,
    ) -> None:
        """Replace all embeddings of one entity type.

        Args:
            entity_type: Name of the folder.
            ids: N distinct, non-empty ids.
            vectors: (N, D) float32 unit rows.
            space_id: The space of the vectors.
            content_hashes: N hashes of the inputs, or None.
            part_rows: Rows per file.

        Raises:
            InvalidVectors: See ``check_vectors``.
            DataError: An id is doubled or the lengths differ.
        """
        hashes = [""] * len(ids) if content_hashes is None else list(content_hashes)
        with SignalWriter(self, entity_type, space_id, vectors.shape[-1], resume=False) as writer:
            for start in range(0, len(ids), part_rows):
                rows = slice(start, start + part_rows)
                writer.add(list(ids[rows]), vectors[rows], hashes[rows])
            writer.publish()


class SignalWriter:
    """Writes one entity type part by part into a staging folder, and publishes all parts at once.

    A part is complete or absent (it is renamed into place), so after a kill the staged parts are
    worth keeping: with ``resume`` they can be read through ``staged`` and reused by ``keep``.
    """

    def __init__(
        self,
        store: SignalStore,
        entity_type: str,
        space_id: str,
        dimension: int,
        *,
        resume: bool = True,
        form_id: str = "",
    ) -> None:
        self.folder = store.root / entity_type
        self.source_written_ns = store.source_written_ns
        self.staging = self.folder / STAGING
        self.space_id = space_id
        self.dimension = dimension
        self.form_id = form_id
        self._parts: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            # Released by the system when the process dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DataError(
                f"another run is writing the signals of {entity_type!r} in {store.root}; wait for"
                " it to end"
            ) from error
        if not resume and self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir(parents=True, exist_ok=True)

    def staged(self, number: int) -> Path:
        """Name the file where part ``number`` of this run is staged.

        It exists if an earlier run finished that part.
        """
        return self.staging / f"part-{number:05d}.parquet"

    def add(
        self,
        ids: Sequence[str],
        vectors: Float32,
        content_hashes: Sequence[str],
        updated_at: npt.NDArray[np.datetime64] | None = None,
    ) -> None:
        """Write the next part durably.

        Args:
            ids: N ids.
            vectors: (N, D) float32 unit rows.
            content_hashes: N hashes.
            updated_at: (N,) datetime64[us], UTC, when the vectors were computed; None: now.

        Raises:
            InvalidVectors: See ``check_vectors``.
            DataError: The lengths differ, or an id was added before.
        """
        check_vectors(vectors, ids, self.dimension)
        if len(content_hashes) != len(ids) or (
            updated_at is not None and len(updated_at) != len(ids)
        ):
            raise DataError(
                f"{len(ids)} ids need as many content hashes and times, but got"
                f" {len(content_hashes)}; pass one per row"
            )
        self._check_ids(ids)
        stamps = updated_at
        if stamps is None:
            stamps = np.full(len(ids), np.datetime64("now", "us"))
        part = Signals(
            list(ids), vectors, self.space_id, list(content_hashes), stamps, self.form_id
        )
        _write_part(self.staged(len(self._parts)), part)
        self._note(ids)

    def keep(self, ids: Sequence[str]) -> None:
        """Take the staged part at the next place as it is, instead of adding one.

        The caller has found that it holds exactly ``ids`` under this space id and form.

        Raises:
            DataError: An id was added before.
        """
        self._check_ids(ids)
        self._note(ids)

    def _check_ids(self, ids: Sequence[str]) -> None:
        distinct = set(ids)
        if len(distinct) == len(ids) and self._ids.isdisjoint(distinct):
            return
        seen = set(self._ids)
        for id_ in ids:
            if id_ in seen:
                raise DataError(
                    f"id {id_!r} occurs twice among the signals of {self.folder.name!r}; ids must"
                    " be distinct. Nothing was published"
                )
            seen.add(id_)

    def _note(self, ids: Sequence[str]) -> None:
        self._parts.append({"rows": len(ids)})
        self._ids.update(ids)

    def publish(self) -> None:
        """Publish the parts all at once; the earlier parts are deleted afterwards."""
        run = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        parts = [
            {"file": f"part-{run}-{number:05d}.parquet", **part}
            for number, part in enumerate(self._parts)
        ]
        for number, part in enumerate(parts):
            os.replace(self.staged(number), self.folder / part["file"])
        described = {
            "format_version": STORE_FORMAT,
            "entity_type": self.folder.name,
            "space_id": self.space_id,
            "form_id": self.form_id,
            "dimension": self.dimension,
            "rows": len(self._ids),
            "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "source_written_ns": self.source_written_ns,
            "parts": parts,
        }
        _replace_durably(
            self.folder / "signals.json", (json.dumps(described, indent=2) + "\n").encode()
        )
        named = {part["file"] for part in parts}
        for path in self.folder.glob("part-*.parquet"):
            if path.name not in named:
                path.unlink()
        shutil.rmtree(self.staging)
        self.close()

    def close(self) -> None:
        """Release the lock; staged parts stay for the next writer to resume with."""
        self._lock.close()

    def __enter__(self) -> SignalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_part(path: Path) -> Signals:
    """Read one part file.

    Raises:
        DataError: The file is missing, damaged, lacks a column, or mixes spaces.
    """
    try:
        table = pq.read_table(
            path, columns=["id", "embedding", "space_id", "content_hash", "updated_at"]
        )
        lists = table["embedding"].combine_chunks()
        lists = lists if isinstance(lists, pa.FixedSizeListArray) else lists.chunk(0)
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        vectors = flat.reshape(len(table), lists.type.list_size)
    except (OSError, pa.ArrowException, AttributeError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a readable part of a signal store ({error}); embed again"
        ) from error
    spaces = table["space_id"].unique().to_pylist()
    if len(spaces) != 1 or vectors.dtype != np.float32:
        raise DataError(
            f"{path}: expected float32 vectors of one space id, but got {vectors.dtype} and"
            f" {len(spaces)} space ids; embed again"
        )
    stamps = table["updated_at"].cast(pa.int64()).to_numpy().astype("datetime64[us]")
    hashes = table["content_hash"].to_pylist()
    return Signals(
        table["id"].to_pylist(),
        np.ascontiguousarray(vectors),
        spaces[0],
        hashes,
        stamps,
        part_form(table.schema),
    )


def part_form(part: pa.Schema) -> str:
    """Read the runtime form that a part's schema states; ``""`` if it states none."""
    mark: bytes = (part.metadata or {}).get(_FORM_MARK, b"")
    return mark.decode("utf-8", "replace")


def _write_part(path: Path, part: Signals) -> None:
    """Write one part file durably and rename it into place."""
    rows = len(part)
    flat = pa.array(np.ascontiguousarray(part.vectors).reshape(-1))
    one_space = pa.array([part.space_id], pa.string())
    stamps = pa.array(part.updated_at.astype("datetime64[us]").astype(np.int64), pa.int64())
    table = pa.table(
        {
            "id": pa.array(part.ids, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, part.vectors.shape[1]),
            "space_id": one_space.take(pa.array(np.zeros(rows, np.int32))),
            "content_hash": pa.array(part.content_hashes, pa.string()),
            "updated_at": stamps.cast(pa.timestamp("us", "UTC")),
        }
    )
    if part.form_id:
        table = table.replace_schema_metadata({_FORM_MARK: part.form_id.encode()})
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        pq.write_table(
            table,
            file,
            compression="none",
            use_dictionary=["space_id", "updated_at"],
            write_statistics=["id"],
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _replace_durably(path: Path, content: bytes) -> None:
    """Replace a file so that a crash leaves the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
