"""Embed a stream of catalogue rows into the signal store.

Unchanged rows are not embedded again, and a killed run resumes.

Notable: each worker thread takes rows through tokenising, features and tower by itself, on one
core; that keeps every core busy where parallel kernels would wait for the tokeniser.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import xxhash

from encoders.errors import ConfigError, DataError, SchemaError
from encoders.inference.signal_reuse import KnownSignals
from encoders.inference.signal_store import SignalStore, SignalWriter, read_part
from encoders.progress import Progress
from encoders.text.normal_forms import normalize_query
from encoders.towers.bundle import ModelBundle
from encoders.towers.entity_features import EntityFeatureConfig, row_texts, row_vectors
from encoders.towers.entity_tower import EntityEncoder
from encoders.towers.query_tower import QueryEncoder

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How a catalogue is embedded; nothing here changes what the vectors mean."""

    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, ...; auto: a GPU if there is one."""
    precision: str = "auto"
    """``fp32`` or ``bf16`` (cosine to fp32 at least 0.999); auto: bf16 on a GPU, fp32 on a CPU."""
    threads: int = 0
    """CPU worker threads; 0: as many as PyTorch uses."""
    batch_rows: int = 512
    """Entities per pass through the tower."""
    part_rows: int = 32_768
    """Rows per file of the store, and the most that a kill can cost."""

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"precision must be auto, fp32 or bf16, but is {self.precision!r}")
        for name, least in (("threads", 0), ("batch_rows", 1), ("part_rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"EmbedConfig.{name} ({getattr(self, name)}) must be at least {least}"
                )

    def resolved_device(self) -> torch.device:
        """Look the device up.

        Raises:
            ConfigError: There is no such device here.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(
                f"device {name!r} is unknown to PyTorch; use cpu, cuda or cuda:1"
            ) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device {name!r} was requested, but PyTorch finds no GPU here; use --device cpu"
            )
        return device

    def form_id(self) -> str:
        """Name the runtime form that makes the vectors: ``torch-fp32`` or ``torch-bf16``."""
        if self.precision == "auto":
            return "torch-bf16" if self.resolved_device().type == "cuda" else "torch-fp32"
        return f"torch-{self.precision}"


@dataclass
class TypeReport:
    """What happened to one entity type."""

    rows: int = 0
    """Rows in the store now."""
    embedded: int = 0
    """Rows that went through a tower in this run."""
    unchanged: int = 0
    """Rows copied from the published store because id, content and space are the same."""
    resumed: int = 0
    """Rows of parts that an earlier, unfinished run had staged."""
    other_form: int = 0
    """Embedded rows whose content was stored already, but made in another form (fp32, bf16)."""
    without_features: int = 0
    """Embedded rows with no known n-gram and no vector: they all share one meaningless vector."""
    missing_columns: list[str] = field(default_factory=list)
    """Columns the tower reads that this catalogue lacks (read as empty)."""


@dataclass
class EmbedReport:
    """What a run did."""

    space_id: str
    form_id: str
    device: str
    seconds: float = 0.0
    entity_types: dict[str, TypeReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, with rows embedded per second."""
        embedded = sum(report.embedded for report in self.entity_types.values())
        return asdict(self) | {
            "embedded_per_second": round(embedded / self.seconds, 1) if self.seconds else None
        }

    def notes(self) -> list[str]:
        """List what the towers could not read, and what was embedded again for another form."""
        lines = []
        for name, one in self.entity_types.items():
            if one.missing_columns:
                lines.append(
                    f"note: the catalogue of {name!r} lacks {', '.join(one.missing_columns)}; these"
                    " fields were read as empty"
                )
            if one.other_form:
                again = f"{one.other_form:,} {name} rows were embedded again"
                lines.append(
                    f"note: {again}, because the store held them in another form (precision)"
                )
            if one.without_features:
                blank = f"{one.without_features:,} {name} rows have no known n-gram and no vector"
                lines.append(f"warning: {blank}; they share one meaningless embedding")
        return lines


def content_hashes(catalogue: pl.DataFrame, config: EntityFeatureConfig) -> list[str]:
    """Hash everything in a row that its tower reads, to 32 hex digits (XXH3-128).

    Empty fields do not count, so a new, empty column changes nothing. Pinned by golden values:
    stores keep these hashes.

    Args:
        catalogue: N rows.
        config: Which columns the tower reads.

    Returns:
        N hashes.
    """
    catalogue = config.columns_read(catalogue)
    columns = [
        (name.encode(), row_texts(catalogue[name]))
        for name in sorted(config.text_columns)
        if name in catalogue.columns
    ]
    vectors = [
        (name.encode(), row_vectors(catalogue, name, width))
        for name, width in sorted(config.continuous.items())
        if name in catalogue.columns
    ]
    hashes = []
    for row in range(catalogue.height):
        state = xxhash.xxh3_128()
        for name, texts in columns:
            text = texts[row]
            if text:
                content = text.encode("utf-8", "surrogatepass")
                state.update(b"%b\x1f%d\x1f%b" % (name, len(content), content))
        for name, values in vectors:
            vector = values[row]
            if vector.any():
                positive_zeros = vector + np.float32(0)  # -0 becomes 0, as a mean has it
                state.update(b"%b\x1e" % name + positive_zeros.astype("<f4").tobytes())
        hashes.append(state.hexdigest())
    return hashes


def columns_read(bundle: ModelBundle) -> set[str]:
    """List the catalogue columns that the bundle's towers read, beside id and entity type."""
    columns = {"title"}  # the text of query entities
    for encoder in bundle.entity_encoders.values():
        if encoder.featurizer is not None:
            config = encoder.featurizer.config
            columns |= config.text_columns | config.continuous.keys()
    return columns


def query_hashes(texts: Sequence[str]) -> list[str]:
    """Hash each query's normalised text, to 32 hex digits (XXH3-128)."""
    return [xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass")) for text in texts]


class EntityEmbedder:
    """An entity tower made ready for inference on one device: rows in, unit vectors out."""

    def __init__(
        self, encoder: EntityEncoder, config: EmbedConfig, progress: Progress | None = None
    ) -> None:
        if encoder.featurizer is None:
            raise ConfigError(
                "this entity tower has no featuriser, so it cannot read a catalogue; load it from a"
                " bundle"
            )
        self.featurizer = encoder.featurizer
        self.config = config
        self.progress = progress
        self.device = config.resolved_device()
        self.dimension = encoder.config.dimension
        self.without_features = 0
        """Rows of the last call with no known n-gram and no vector."""
        tower = copy.deepcopy(encoder) if self.device.type != "cpu" else encoder
        dtype = torch.bfloat16 if config.form_id() == "torch-bf16" else torch.float32
        self.tower = tower.to(self.device).eval().for_inference(dtype)

    def __call__(self, catalogue: pl.DataFrame) -> Float32:
        """Embed rows.

        Args:
            catalogue: N checked rows.

        Returns:
            (N, D) float32 unit rows, in order.

        Raises:
            RowError: A vector is NaN, infinite or of another width.
        """
        vectors = np.empty((catalogue.height, self.dimension), dtype=np.float32)
        starts = range(0, catalogue.height, self.config.batch_rows)
        threads = self.config.threads or torch.get_num_threads()

        def embed(start: int) -> int:
            features = self.featurizer(catalogue[start : start + self.config.batch_rows])
            blank = features.offsets[:: features.fields].diff() == 0
            if features.continuous is not None:
                blank &= ~features.continuous.any(dim=1)
            with torch.inference_mode():
                output = self.tower(features.to(self.device))
            vectors[start : start + len(features)] = output.cpu().numpy()
            if self.progress is not None:
                self.progress.add(len(features))
            return int(blank.sum())

        if len(starts) < 2:
            self.without_features = sum(map(embed, starts))
            return vectors
        with one_kernel_thread_each(threads) as pool:
            self.without_features = sum(pool.map(embed, starts))
        return vectors


@contextmanager
def one_kernel_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Open a pool whose threads run PyTorch kernels on their own core only.

    PyTorch's own setting is restored afterwards.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _TypeRun:
    """Embeds and writes one entity type, part by part."""

    def __init__(
        self,
        entity_type: str,
        bundle: ModelBundle,
        store: SignalStore,
        config: EmbedConfig,
        progress: Progress,
    ) -> None:
        self.report = TypeReport()
        self.config = config
        self.progress = progress
        self.embedder: EntityEmbedder | QueryEncoder
        if entity_type == "query":
            self.embedder = bundle.query_encoder.to(config.resolved_device())
        elif entity_type in bundle.entity_encoders:
            self.embedder = EntityEmbedder(bundle.entity_encoders[entity_type], config, progress)
        else:
            known = ", ".join([*bundle.entity_encoders, "query"])
            raise DataError(
                f"{bundle.path}: no tower for entity type {entity_type!r}; this bundle embeds"
                f" {known}. Train with pairs of it"
            )
        form_id = config.form_id()
        if entity_type == "query":  # QueryEncoder.encode chooses by the device alone
            on_gpu = config.resolved_device().type == "cuda"
            form_id = "torch-bf16" if on_gpu else "torch-fp32"
        self.known = KnownSignals.open(store, entity_type, bundle.space_id, form_id)
        self.writer = SignalWriter(
            store, entity_type, bundle.space_id, bundle.dimension, form_id=form_id
        )
        self.space_id = bundle.space_id
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0
        self._part = 0
        self._queries_seen: set[str] = set()

    def add(self, rows: pl.DataFrame) -> None:
        """Add rows, and write every part that is full.

        Raises:
            SchemaError: A column is of one type here and of an incompatible one in the rows before.
        """
        if isinstance(self.embedder, QueryEncoder):
            rows = self._distinct_queries(rows)
        elif not self.report.rows and not self._waiting:
            self.report.missing_columns = self.embedder.featurizer.missing_columns(rows)
        self._waiting.append(rows)
        self._waiting_rows += rows.height
        while self._waiting_rows >= self.config.part_rows:
            waiting = _joined(self._waiting)
            self._write(waiting[: self.config.part_rows])
            self._waiting = [waiting[self.config.part_rows :]]
            self._waiting_rows -= self.config.part_rows

    def finish(self) -> None:
        """Write the last part."""
        if self._waiting_rows:
            self._write(_joined(self._waiting))

    def _distinct_queries(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Keep the first row of each query, which may stand in several (one per country)."""
        rows = rows.unique("id", keep="first", maintain_order=True)
        fresh = [id not in self._queries_seen for id in rows["id"].to_list()]
        rows = rows.filter(pl.Series(fresh, dtype=pl.Boolean))
        self._queries_seen.update(rows["id"].to_list())
        titles = rows["title"] if "title" in rows.columns else rows["id"]
        texts = [normalize_query(text) for text in titles.fill_null(rows["id"]).to_list()]
        return pl.DataFrame({"id": rows["id"], "title": pl.Series(texts, dtype=pl.String)})

    def _write(self, rows: pl.DataFrame) -> None:
        """Write rows as the next part, with vectors that exist already or new ones."""
        ids: list[str] = rows["id"].to_list()
        hashes = self._hashes(rows)
        self.report.rows += len(ids)
        staged_form = self._staged_form(ids, hashes)
        self._part += 1
        if staged_form == self.writer.form_id:
            self.report.resumed += len(ids)
            self.writer.keep(ids)
            self.progress.add(len(ids))
            return
        vectors, stamps, found = self.known.find(ids, hashes, self.writer.dimension)
        new = np.flatnonzero(~found)
        self.progress.add(len(ids) - len(new))
        if len(new):
            vectors[new] = self._embed(rows[new])
        self.report.embedded += len(new)
        self.report.other_form += self.known.in_other_form if staged_form is None else len(new)
        self.report.unchanged += len(ids) - len(new)
        self.writer.add(ids, vectors, hashes, stamps)

    def _hashes(self, rows: pl.DataFrame) -> list[str]:
        if isinstance(self.embedder, QueryEncoder):
            return query_hashes(rows["title"].to_list())
        return content_hashes(rows, self.embedder.featurizer.config)

    def _embed(self, rows: pl.DataFrame) -> Float32:
        if isinstance(self.embedder, QueryEncoder):
            vectors = self.embedder.encode(rows["title"].to_list())
            self.progress.add(rows.height)
            return vectors
        vectors = self.embedder(rows)
        self.report.without_features += self.embedder.without_features
        return vectors

    def _staged_form(self, ids: list[str], hashes: list[str]) -> str | None:
        """Read the form in which an earlier run staged exactly these rows as this part.

        "" if it left no mark, None if it staged other rows.
        """
        path = self.writer.staged(self._part)
        if not path.exists():
            return None
        try:
            staged = read_part(path)
        except DataError:
            return None
        same = (
            staged.space_id == self.space_id
            and staged.ids == ids
            and staged.content_hashes == hashes
        )
        return staged.form_id if same else None


def _joined(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Stack frames.

    A vector column that holds one vector a row in some and several in others holds several.

    Raises:
        SchemaError: A column's types cannot be brought together.
    """
    several = {
        name
        for frame in frames
        for name, dtype in frame.schema.items()
        if isinstance(getattr(dtype, "inner", None), pl.List)
    }
    aligned = []
    for frame in frames:
        single = [
            name for name in several & set(frame.columns) if _is_one_vector(frame.schema[name])
        ]
        aligned.append(frame.with_columns(_as_several(frame[name]) for name in single))
    try:
        return pl.concat(aligned, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise SchemaError(
            f"a column changes its type from one file or chunk to the next ({reason}); give it one"
            " type in all"
        ) from error


def _is_one_vector(dtype: pl.DataType) -> bool:
    inner = getattr(dtype, "inner", None)
    return inner is not None and (inner.is_numeric() or inner == pl.Null)


def _as_several(vectors: pl.Series) -> pl.Series:
    """Wrap each vector in a list of one."""
    lists = vectors.cast(pl.List(vectors.dtype.inner))  # type: ignore[attr-defined]
    rows = pl.DataFrame({"row": np.arange(len(lists)), "vector": lists})
    return rows.group_by("row", maintain_order=True).agg("vector")["vector"].alias(vectors.name)


def embed_catalogue(
    bundle: ModelBundle,
    chunks: Iterable[pl.DataFrame],
    store: SignalStore,
    config: EmbedConfig | None = None,
    total: int | None = None,
) -> EmbedReport:
    """Embed a stream of catalogue rows into the signal store; how far it is, is logged.

    Each entity type that occurs is replaced at the end, all at once.

    Args:
        bundle: The towers.
        chunks: Checked rows with ``id``, ``entity_type`` and what the towers read; types may be
            mixed. Query entities are embedded by the query tower from ``title`` (or their id).
        store: Where to write. Rows whose id and content hash it already holds under this space id,
            made in the form of this run, are copied.
        config: Device, precision, sizes.
        total: Rows of the stream, for the time that is left; None: unknown.

    Returns:
        Counts per entity type.

    Raises:
        DataError: An id occurs twice, or the bundle has no tower for a type.
        SchemaError: A column's type changes along the stream beyond what can be brought together.
        RowError: A row holds an impossible vector. In either case the store keeps what it had;
            finished parts wait for the next run.
    """
    config = config or EmbedConfig()
    started = time.perf_counter()
    report = EmbedReport(bundle.space_id, config.form_id(), str(config.resolved_device()))
    runs: dict[str, _TypeRun] = {}
    progress = Progress(log, "embed", total)
    with ExitStack() as open_writers:
        for chunk in chunks:
            for (entity_type,), rows in chunk.group_by(["entity_type"], maintain_order=True):
                name = str(entity_type)
                if name not in runs:
                    runs[name] = _TypeRun(name, bundle, store, config, progress)
                    open_writers.enter_context(runs[name].writer)
                    report.entity_types[name] = runs[name].report
                runs[name].add(rows)
        for run in runs.values():
            run.finish()
        for run in runs.values():
            run.writer.publish()
    report.seconds = round(time.perf_counter() - started, 3)
    return report
