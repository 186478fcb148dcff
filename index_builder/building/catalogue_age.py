"""How old catalogue files and signal stores are: what they state, and when they were written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from encoders.errors import ConfigError
from encoders.inference.signal_store import SignalStore
from encoders.tables.checks import FUTURE_TOLERANCE, check_frame
from encoders.tables.files import check_table, raise_problems
from encoders.tables.parts import table_files
from encoders.tables.reading import DEFAULT_OPTIONS
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import Column, Kind, TableSchema
from index_builder.building.inputs import EntityInput
from index_builder.live_log.source_age import (
    MODIFIED_AT,
    NOTHING_SETTLED,
    RowTimes,
    Settled,
    SourceAge,
    live_sequences,
)
from index_builder.releases.store import ReleaseStore

ExportedAt = int | Literal["file"] | None
"""When an export was made: nanoseconds since 1970, ``file`` (its file's time), or not stated."""

_KEY = ["entity_type", "id"]
_MODIFIED = TableSchema(
    name="catalogue",
    doc="The one column that says how old a row is.",
    columns=(Column(name=MODIFIED_AT, kind=Kind.TIMESTAMP, doc="When the row was last changed."),),
)


def parse_exported_at(text: str | None) -> ExportedAt:
    """Parse ``--exported-at``: an ISO 8601 time (UTC where it names no zone) or ``file``.

    Raises:
        ConfigError: It is neither, or lies in the future.
    """
    if text is None or text == "file":
        return text if text is None else "file"
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise ConfigError(
            f"--exported-at must be a time such as 2026-01-31T02:00:00Z, or the word file, but got"
            f" {text!r}"
        ) from error
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if moment > datetime.now(UTC) + FUTURE_TOLERANCE:
        raise ConfigError(f"--exported-at {text} lies in the future; give when the export was made")
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


@dataclass(frozen=True, slots=True)
class SourceTimes:
    """What is known of the sources of a rebuild before they are read.

    Attributes:
        store: Where the release goes.
        read_at: Live sequence of each log when reading began.
        files: Catalogue path -> times of its oldest and its newest file.
        exported_at: What ``--exported-at`` says.
        reading: How the catalogue's files are written.
    """

    store: ReleaseStore
    read_at: Mapping[str, int]
    files: Mapping[Path, tuple[int, int]]
    exported_at: ExportedAt = None
    reading: ReadingOptions = DEFAULT_OPTIONS

    @classmethod
    def now(
        cls,
        store: ReleaseStore,
        paths: Sequence[Path],
        exported_at: ExportedAt,
        reading: ReadingOptions = DEFAULT_OPTIONS,
    ) -> SourceTimes:
        """Note the state of the live logs and the files; to be called before anything is read."""
        files = {path: file_times(file.path for file in table_files(path)) for path in paths}
        return cls(store, live_sequences(store.live_root), files, exported_at, reading)

    def apply(
        self,
        inputs: Mapping[str, EntityInput],
        catalogue: pl.DataFrame | None,
        signals: SignalStore | None = None,
    ) -> dict[str, EntityInput]:
        """Say of each input how old its rows are.

        Args:
            inputs: Made of the sources.
            catalogue: Rows of all catalogue files, checked; None: there are none.
            signals: A signal store that the caller named; its rows are as old as what was embedded.

        Raises:
            RowError: A cell of ``modified_at`` is no time.
        """
        times = None if catalogue is None else self._row_times(catalogue)
        return {
            name: replace(
                entities,
                age=self._age(name, entities, times, _embedded_ns(signals, name)),
                settled=settled_in(self.store, name),
            )
            for name, entities in inputs.items()
        }

    def _age(
        self, entity_type: str, entities: EntityInput, times: pl.DataFrame | None, embedded: int
    ) -> SourceAge:
        read_at = self.read_at.get(entity_type, 0)
        exported = embedded if self.exported_at == "file" else self.exported_at or 0
        ids = pl.DataFrame({"id": pl.Series(list(entities.ids), dtype=pl.String)})
        if times is None:
            known = ids.with_columns(stated=pl.lit(exported), limit=pl.lit(embedded))
            stated, limit = exported, embedded
        else:
            own = times.filter(pl.col("entity_type") == entity_type).unique("id")
            known = ids.join(own, on="id", how="left", maintain_order="left")
            stated, limit = _least(own["exported"]), _least(own["limit"])
            if embedded:
                limit = min(limit, embedded) if limit else embedded
                known = known.with_columns(pl.col("limit").fill_null(embedded).clip(0, embedded))
        return SourceAge(
            read_at=read_at,
            stated=RowTimes(rows=_ns(known["stated"]), absent=stated),
            limit=RowTimes(rows=_ns(known["limit"]), absent=limit),
        )

    def _row_times(self, catalogue: pl.DataFrame) -> pl.DataFrame:
        """Return id, entity type and times (``stated``, ``exported``, ``limit``) of every row."""
        rows = catalogue.select(_KEY)
        if len(self.files) == 1:
            oldest, newest = next(iter(self.files.values()))
            rows = rows.with_columns(oldest=pl.lit(oldest), limit=pl.lit(newest))
        else:
            rows = rows.join(self._by_file(), on=_KEY, how="left", maintain_order="left")
        exported: Any = pl.lit(self.exported_at or 0)
        if self.exported_at == "file":
            exported = pl.col("oldest")
        rows = rows.with_columns(exported=exported)
        modified = modified_ns(catalogue)
        stated = modified.zip_with(modified > 0, rows["exported"].cast(pl.Int64))
        return rows.with_columns(stated=stated)

    def _by_file(self) -> pl.DataFrame:
        """Return which rows stand in which of several catalogues; in two, the newer one counts."""
        parts = [
            check_table(path, "catalogue", reading=self.reading)
            .frame.select(_KEY)
            .with_columns(oldest=pl.lit(oldest), limit=pl.lit(newest))
            for path, (oldest, newest) in self.files.items()
        ]
        return pl.concat(parts).group_by(_KEY).agg(pl.col("oldest", "limit").max())


def modified_ns(catalogue: pl.DataFrame) -> pl.Series:
    """Return ``modified_at`` of every row, nanoseconds since 1970; 0 where there is none.

    Raises:
        RowError: A cell is no time.
    """
    if MODIFIED_AT not in catalogue.columns:
        return pl.zeros(catalogue.height, dtype=pl.Int64, eager=True)
    checked = check_frame(catalogue.select(MODIFIED_AT), _MODIFIED, "catalogue")
    raise_problems(checked.report)
    return checked.frame[MODIFIED_AT].dt.epoch("us").fill_null(0) * 1000


def _embedded_ns(signals: SignalStore | None, entity_type: str) -> int:
    """Return when the catalogue that was embedded was written; 0: there is no signal store."""
    return 0 if signals is None else signals.source_time_ns(entity_type)


def _least(times: pl.Series) -> int:
    return int(times.min() or 0) if len(times) else 0  # type: ignore[arg-type]


def _ns(times: pl.Series) -> np.ndarray:
    return times.fill_null(0).cast(pl.Int64).to_numpy()


def settled_in(store: ReleaseStore, entity_type: str) -> Settled:
    """Read what is settled in the active release; nothing where none is active."""
    active = store.current()
    return NOTHING_SETTLED if active is None else Settled.read(store.path_of(active) / entity_type)


def file_times(files: Iterable[Path]) -> tuple[int, int]:
    """Return the times of the oldest and the newest of some files, nanoseconds since 1970."""
    times = [file.stat().st_mtime_ns for file in files]
    return min(times), max(times)
